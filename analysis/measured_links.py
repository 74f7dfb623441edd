"""How far a link lies from those that a run measured: within them, beyond them, or out of a model's reach."""

from __future__ import annotations

import math

import pandas as pd

from testbed.analysis.latency_model import Link, link_of, steady
from testbed.errors import UsageError

#: Beyond so many times the greatest (or below that part of the least) rate and delay measured, nothing is said.
REACH = 10.0
#: Loss beyond so many times the greatest measured, and beyond `LOSS_REACH`, is out of reach: timeouts rule there.
LOSS_FACTOR, LOSS_REACH = 3.0, 0.01
_AT_LEAST_S = 1e-3  # round trips below it are all the same to a request


def beyond(rows: pd.DataFrame, link: Link) -> list[str]:
    """What of this link lies outside of what these rows' links were, a phrase each with the nearest measured value;
    empty where it lies within. Raises UsageError where it is out of the model's reach.
    """
    known = [link_of(own) for _, own in steady(rows).groupby("profile", sort=False)]
    if not known:
        raise UsageError("every link of this run changes over time: no other link can be predicted from it")
    phrases = []
    for name, asked, values, text in (
        ("rate", link.rate_up_bps, [each.rate_up_bps for each in known], _rate),
        ("round trip", max(link.rtt_s, _AT_LEAST_S), [max(each.rtt_s, _AT_LEAST_S) for each in known], _time),
    ):
        low, high = min(values), max(values)
        if low * 0.99 <= asked <= high * 1.01:
            continue
        nearest = low if asked < low else high
        away = nearest / asked if asked < low else asked / nearest
        if not away <= REACH:
            _refuse(name, text(asked), text(nearest))
        phrases.append(f"{name} {text(asked)} (nearest measured: {text(nearest)})")
    most = max(each.loss_up for each in known)
    if link.loss_up > most * 1.05:
        if link.loss_up > max(LOSS_FACTOR * most, LOSS_REACH):
            _refuse("loss", _loss(link.loss_up), _loss(most))
        phrases.append(f"loss {_loss(link.loss_up)} (nearest measured: {_loss(most)})")
    return phrases


def _refuse(name: str, asked: str, nearest: str) -> None:
    raise UsageError(
        f"{name} {asked} is too far from what this run measured (nearest: {nearest}) for a recommendation; "
        "run the scenario on a profile like it: testbed run … --set 'profiles=…'"
    )


def _rate(value: float) -> str:
    return "without limit" if math.isinf(value) else f"{value / 1e6:g} Mbit/s"


def _time(value: float) -> str:
    return f"{value * 1e3:g} ms"


def _loss(value: float) -> str:
    return f"{value:.4g}" if value > 1 else f"{value * 100:g}%"
