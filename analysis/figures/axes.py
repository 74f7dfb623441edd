"""Axes that figures share: of seconds, rates, and of quality."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

#: From this ratio of the largest to the smallest latency in a panel on, its axis is logarithmic.
LOGARITHMIC_FROM = 5.0


def limit_seconds(ax: Axes, ends: Iterable[float], which: str = "x") -> None:
    """Limits and ticks of an axis (`which`: x or y) of positive times; logarithmic where they span a lot."""
    known = [e for e in ends if e > 0 and math.isfinite(e)] or [1.0]
    low, high = min(known), max(known)
    axis, limit = (ax.xaxis, ax.set_xlim) if which == "x" else (ax.yaxis, ax.set_ylim)
    if high / low < LOGARITHMIC_FROM:
        pad = 0.1 * (high - low) or 0.1 * high
        limit(max(0, low - pad), high + pad)
        axis.set_major_locator(MaxNLocator(6))
    else:
        pad = (high / low) ** 0.1
        low, high = low / pad, high * pad
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        limit(low, high)
        ticks(axis, round_values(low, high))
    axis.set_major_formatter("{x:g}")


def ticks(axis: Axis, places: Iterable[float]) -> None:
    """Ticks at these places and nowhere else."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def round_values(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … between two positive ends; only the decades where they are far apart."""
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    return [t for t in sorted(float(d * s) for d in decades for s in steps) if low <= t <= high]


def at_values(ax: Axes, values: Iterable[float], logarithmic: bool, beside: int = 1) -> None:
    """Ticks of the x axis at the values that were measured, and nowhere else. `beside`: marks that stand `aside` at each."""
    places = sorted(set(values))
    room = 0.08 + _step(places, beside, logarithmic) * (beside - 1) / 2 if beside > 1 else 0.08
    if logarithmic:
        ax.set_xscale("log")
    ticks(ax.xaxis, places)
    if logarithmic:
        pad = (places[-1] / places[0]) ** room if places[-1] > places[0] else 1.5
        ax.set_xlim(places[0] / pad, places[-1] * pad)
    else:
        pad = room * (places[-1] - places[0]) or 0.5
        ax.set_xlim(places[0] - pad, places[-1] + pad)


def aside(value: float, number: int, count: int, values: Iterable[float], logarithmic: bool) -> float:
    """Where the `number`th of `count` marks at one of these values stands beside the others, nearest to its own value."""
    places = sorted(set(values))
    step = _step(places, count, logarithmic) * (number - (count - 1) / 2)
    if logarithmic:
        return float(value * max(places[-1] / places[0], 2.0) ** step)
    return value + step * (places[-1] - places[0] or 1.0)


def _step(places: list[float], count: int, logarithmic: bool) -> float:
    """From mark to mark, as a share of the axis from the first of these places to the last."""
    ends = np.log(places) if logarithmic else np.asarray(places)
    gaps = np.diff(ends) / (ends[-1] - ends[0]) if len(ends) > 1 else np.ones(1)
    return min(0.035, 0.7 * float(gaps.min()) / max(1, count - 1))


def limit_scores(ax: Axes, ends: Iterable[float]) -> None:
    """Limits of a y axis of scores in 0..1: from 0 where anything is low, with air around."""
    known = [e for e in ends if math.isfinite(e)] or [0.0, 1.0]
    low, high = min(known), max(known)
    low = min(low, 0.0) if low < 0.35 else low
    pad = 0.06 * (high - low) or 0.05
    ax.set_ylim(low - pad, high + pad)


def limit_losses(ax: Axes, ends: Iterable[float]) -> None:
    """Limits of a y axis of lost likelihood: linear near 0, logarithmic beyond 0.1 where it goes beyond 1."""
    known = [e for e in ends if math.isfinite(e)] or [0.0, 0.1]
    low, high = min(0.0, *known), max(known)
    if high > 1:
        ax.set_yscale("symlog", linthresh=0.1, linscale=0.7)
        low, high = min(low * 1.3, -0.03), high * 1.4
        places = (-1, -0.1, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
        ticks(ax.yaxis, [place for place in places if low <= place <= high])
    else:
        pad = 0.06 * (high - low) or 0.05
        low, high = low - pad, high + pad
    ax.set_ylim(low, high)
