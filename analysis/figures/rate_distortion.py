"""What the cloud's next-token distributions lose against the bits that were sent for an element of the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun, labels
from testbed.analysis.figures.axes import limit_losses, ticks
from testbed.analysis.figures.panels import FRONT, Legend, empty, fill, front
from testbed.analysis.figures.style import Frame, Mark, marks, panel_title
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.analysis.settings import DELTA_NLL, KL, Metric


@dataclass(frozen=True)
class Point:
    """One codec on one task: mean payload bits over the cache's elements, and what is lost."""

    codec: str
    bits: float
    loss: stats.Estimate


def draw(run: Run) -> Figure:
    """A panel for each task (and model): KL, or ΔNLL where the rows have none, against bits an element."""
    rows = settings.labelled(settings.encoded(run.rows))
    rows = rows[rows["bits_per_element"] > 0]
    metric = next((m for m in (KL, DELTA_NLL) if np.isfinite(m.values(rows)).any()), None)
    if metric is None:
        raise NotInThisRun(f"{run.path}: no trial that sent KV has a kl, nor an nll beside a reference_nll")
    if rows["codec"].nunique() < 2:
        raise NotInThisRun(f"{run.path}: one codec only; a rate-distortion plot compares at least 2")
    by = ["model", "task"] if rows["model"].nunique() > 1 else ["task"]
    panels = [
        (" · ".join(map(str, key)), own, _points(own, metric)) for key, own in rows.groupby(by, sort=False)
    ]
    codecs = {p.codec: (p.codec, "split", p.codec) for _, _, points in panels for p in points}
    legend = Legend(marks(codecs.values()), most=4, more=1)
    columns = min(len(panels), 2)
    frame = Frame(
        title="What is lost for the bits that are sent",
        subtitle=(
            f"{counted(len(codecs), 'codec')} · {subject(run.rows)}\n"
            f"{metric.label} against payload bits over the full cache's elements; bars: 95 % bootstrap intervals"
        ),
        footnotes=[
            "Bits are those of whole payloads, with scales, positions and headers. Grey: the least loss at so "
            "many bits or fewer. Every link gives the same quality.",
            *caveats(run),
        ],
        rows=math.ceil(len(panels) / columns),
        columns=columns,
        panel=3.0,
        legend=legend.height,
        left=0.8,
        between=0.65,
        below=0.36,
    )
    figure, axes = frame.figure()

    def draw_panel(ax: Axes, panel: tuple[str, pd.DataFrame, list[Point]]) -> None:
        title, own, points = panel
        panel_title(ax, title, f"n = {own['example'].nunique()} examples")
        _draw(ax, points, legend.looks, metric)

    fill(axes, columns, panels, draw_panel, "payload bits an element of the full cache", metric.label)
    legend.draw(figure, frame, [Line2D([], [], **FRONT, label="Pareto front"), *legend.handles()])
    return figure


def _points(rows: pd.DataFrame, metric: Metric) -> list[Point]:
    points = []
    for codec, own in settings.common(rows).groupby("codec", sort=False):
        loss = stats.mean(metric.values(own), settings.clusters(own), bounds=metric.bounds)
        bits = stats.mean(own["bits_per_element"], settings.clusters(own), resamples=1).value
        if math.isfinite(loss.value):
            points.append(Point(str(codec), bits, loss))
    return points


def _draw(ax: Axes, points: list[Point], looks: dict[str, Mark], metric: Metric) -> None:
    if not points:
        empty(ax)
        return
    ends = [e for p in points for e in (p.loss.low, p.loss.value, p.loss.high) if math.isfinite(e)]
    _limit_bits(ax, [p.bits for p in points])
    if metric is KL:
        _limit_divergences(ax, ends)
    else:
        limit_losses(ax, ends)
    for point in points:
        mark = looks[point.codec]
        if math.isfinite(point.loss.low):
            bar = (point.loss.low, point.loss.high)
            ax.plot([point.bits] * 2, bar, color=mark.color, lw=1.0, alpha=0.6, zorder=2)
        ax.plot(point.bits, point.loss.value, zorder=4, **mark.options())
    best = [
        points[int(i)] for i in stats.pareto_front([p.bits for p in points], [-p.loss.value for p in points])
    ]
    crossed = [((p.bits, p.loss.low), (p.bits, p.loss.high)) for p in points if math.isfinite(p.loss.low)]
    crossed += front(ax, [(p.bits, p.loss.value) for p in best], FRONT)
    drawn = short(p.codec for p in points)
    named = [(p.bits, p.loss.value, drawn[p.codec]) for p in best]
    labels.place(ax, named, [(p.bits, p.loss.value) for p in points], crossed)


def _limit_bits(ax: Axes, bits: list[float]) -> None:
    """A logarithmic x axis with ticks at powers of two."""
    low, high = min(bits) / 1.2, max(bits) * 1.2
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    powers = [2.0**i for i in range(-10, 6)]
    ticks(ax.xaxis, [power for power in powers if low <= power <= high])


def _limit_divergences(ax: Axes, ends: Iterable[float]) -> None:
    """A y axis that is logarithmic down to the smallest decade met (from 10^-4 on), and has a place for 0."""
    known = list(ends)
    positive = [e for e in known if e > 0] or [0.1]
    least = max(1e-4, 10.0 ** math.floor(math.log10(min(positive))))
    ax.set_yscale("symlog", linthresh=least, linscale=0.5)
    ax.set_ylim(-least / 4, max(*positive, least) * 1.6)
    decades = [10.0**i for i in range(-4, 3)]
    ticks(ax.yaxis, [0.0, *(d for d in decades if least <= d <= ax.get_ylim()[1])])
