"""Latency and quality against one condition of the link, all others held."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed.analysis import settings
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.axes import aside, at_values, limit_scores, limit_seconds
from testbed.analysis.figures.panels import Legend, curve
from testbed.analysis.figures.style import INK, Frame, Mark, panel_title, tell_missing
from testbed.analysis.latency_model import steady
from testbed.analysis.run import Run
from testbed.analysis.settings import Measured
from testbed.units import format_fraction


@dataclass(frozen=True)
class Condition:
    """A condition of the link: its column, and how people read it."""

    column: str
    label: str
    scale: float
    logarithmic: bool


CONDITIONS = (
    Condition("rate_up_bps", "rate, edge to cloud (Mbit/s)", 1e-6, True),
    Condition("delay_up_s", "one-way delay (ms)", 1e3, False),
    Condition("loss_up", "loss (%)", 100.0, False),
)


@dataclass(frozen=True)
class Sweep:
    """One condition's values, and each setting as it was measured there."""

    condition: Condition
    held: str
    points: dict[float, list[Measured]]

    def of(self, label: str) -> list[tuple[float, Measured]]:
        """A setting's points, by value."""
        return [(x, m) for x, all_ in sorted(self.points.items()) for m in all_ if m.label == label]


def draw(run: Run) -> Figure:
    """A column of panels for each condition that varies alone: latency above, score below."""
    sweeps = [s for condition in CONDITIONS if (s := _sweep(run.attempts, condition)) is not None]
    if not sweeps:
        raise NotInThisRun(
            f"{run.path}: no two of its links differ in rate, delay or loss alone; for this figure run a "
            "scenario whose profiles are, say, rate=10mbit,delay=20ms and rate=50mbit,delay=20ms"
        )
    legend = Legend.of(m for s in sweeps for measured in s.points.values() for m in measured)
    frame = Frame(
        title="Latency and quality against the link's "
        + " and ".join(s.condition.label.split(" (")[0].split(",")[0] for s in sweeps),
        subtitle=(
            f"{counted(len(legend.looks), 'setting')} · {subject(run.rows)}\n"
            f"median of the {run.latency} and mean score; bars: 95 % intervals over examples"
        ),
        footnotes=[
            "Latencies of one setting are joined by lines for the eye. Qualities at one value stand beside each other for "
            "legibility; what a setting's differ by between links is chance, since transport loses nothing.",
            *_left_out(run.rows),
            *caveats(run),
        ],
        rows=2,
        columns=len(sweeps),
        panel=2.1,
        legend=legend.height,
        below=0.42,
    )
    figure, axes = frame.figure()
    for index, sweep in enumerate(sweeps):
        upper, lower = axes[index], axes[len(sweeps) + index]
        _draw(upper, sweep, legend.looks, quality=False)
        _draw(lower, sweep, legend.looks, quality=True)
        if index == 0:
            upper.set_ylabel(f"{run.latency} (s)")
            lower.set_ylabel("mean score")
    legend.draw(figure, frame)
    return figure


def _left_out(rows: pd.DataFrame) -> list[str]:
    """Links that change over time have no place on an axis of one rate."""
    changing = rows.loc[~rows.index.isin(steady(rows).index), "profile"].unique()
    return (
        [f"Left out, since they change over time: {', '.join(map(str, changing))}."] if len(changing) else []
    )


def _sweep(rows: pd.DataFrame, condition: Condition) -> Sweep | None:
    """The largest group of links that differ in this condition alone; None where no two do."""
    across = steady(settings.labelled(rows))
    across = across[across[condition.column].notna()]
    others = [c.column for c in CONDITIONS if c is not condition]
    best: pd.DataFrame | None = None
    for _, own in across.groupby(others, dropna=False):
        if own[condition.column].nunique() > max(1, 0 if best is None else best[condition.column].nunique()):
            best = own
    if best is None:
        return None
    points = {
        value * condition.scale: settings.measured(best[best[condition.column] == value])
        for value in map(float, best[condition.column].unique())
    }
    return Sweep(condition, _held(best, condition), points)


def _held(rows: pd.DataFrame, condition: Condition) -> str:
    texts = {
        "rate_up_bps": lambda v: f"{v / 1e6:g} Mbit/s" if v == v else "no rate limit",
        "delay_up_s": lambda v: f"{v * 1e3:g} ms one way",
        "loss_up": lambda v: f"{format_fraction(v)} loss" if v else "no loss",
    }
    return " · ".join(
        texts[c.column](float(rows[c.column].iloc[0])) for c in CONDITIONS if c is not condition
    )


def _draw(ax: Axes, sweep: Sweep, looks: dict[str, Mark], quality: bool) -> None:
    panel_title(ax, "quality" if quality else "latency", f"at {sweep.held}")
    ends: list[float] = []
    missing: list[str] = []
    for number, (label, mark) in enumerate(looks.items()):
        points = sweep.of(label)
        estimates = [(x, m.quality if quality else m.latency) for x, m in points]
        if quality:  # whose intervals would else cover each other
            places = (sweep.points, sweep.condition.logarithmic)
            estimates = [(aside(x, number, len(looks), *places), e) for x, e in estimates]
        missing += [f"{label} {m.gap} at {x:g}" for x, m in points if m.gap and not quality]
        known = [(x, e) for x, e in estimates if math.isfinite(e.value)]
        if points:
            ends += curve(ax, number, mark, (0.6 if quality else 0.75) * mark.size, known, joined=not quality)
    (limit_scores if quality else lambda a, e: limit_seconds(a, e, "y"))(ax, ends)
    tell_missing(ax, missing)
    at_values(ax, sweep.points, sweep.condition.logarithmic, len(looks))
    if quality:
        ax.set_xlabel(sweep.condition.label, color=INK)
