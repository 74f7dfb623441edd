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


def at_values(ax: Axes, values: Iterable[float], logarithmic: bool) -> None:
    """Ticks of the x axis at the values that were measured, and nowhere else."""
    places = sorted(set(values))
    if logarithmic:
        ax.set_xscale("log")
    ticks(ax.xaxis, places)
    if logarithmic:
        pad = (places[-1] / places[0]) ** 0.08 if places[-1] > places[0] else 1.5
        ax.set_xlim(places[0] / pad, places[-1] * pad)
    else:
        pad = 0.08 * (places[-1] - places[0]) or 0.5
        ax.set_xlim(places[0] - pad, places[-1] + pad)


def aside(value: float, number: int, count: int, low: float, high: float, logarithmic: bool) -> float:
    """Where the `number`th of `count` marks at one value stands beside the others, on an axis from `low` to `high`."""
    step = 0.013 * (number - (count - 1) / 2)
    if logarithmic:
        return float(value * max(high / low, 2.0) ** step)
    return value + step * (high - low or 1.0)


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
