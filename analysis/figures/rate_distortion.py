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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun, labels
from testbed.analysis.figures.axes import limit_losses
from testbed.analysis.figures.style import (
    GREY,
    Frame,
    Mark,
    bottom_legend,
    legend_columns,
    marks,
    panel_title,
    short,
)
from testbed.analysis.run import Run
from testbed.analysis.settings import DELTA_NLL, KL, Metric

_FRONT = {"color": GREY, "lw": 2.0, "alpha": 0.55}


@dataclass(frozen=True)
class Point:
    """One codec on one task: mean payload bits over the cache's elements, and what is lost."""

    codec: str
    bits: float
    loss: stats.Estimate


def draw(run: Run) -> Figure:
    """A panel for each task (and model): KL, or ΔNLL where the rows have none, against bits an element."""
    rows = settings.labelled(run.rows)
    rows = rows[(rows["placement"] == "split") & (rows["bits_per_element"] > 0)]
    metric = next((m for m in (KL, DELTA_NLL) if np.isfinite(m.values(rows)).any()), None)
    if metric is None:
        raise NotInThisRun(f"{run.path}: no trial that sent KV has a kl, nor an nll beside a reference_nll")
    if rows["codec"].nunique() < 2:
        raise NotInThisRun(f"{run.path}: one codec only; a rate-distortion plot compares at least 2")
    by = ["model", "task"] if rows["model"].nunique() > 1 else ["task"]
    panels = [
        (" · ".join(map(str, key)), own, _points(own, metric)) for key, own in rows.groupby(by, sort=False)
    ]
    looks = marks({p.codec: (p.codec, "split", p.codec) for _, _, own in panels for p in own}.values())
    columns = min(len(panels), 2)
    drawn = short(looks)
    named = legend_columns(drawn.values(), 4)
    frame = Frame(
        title="What is lost for the bits that are sent",
        subtitle=(
            f"{counted(len(looks), 'codec')} · {subject(run.rows)}\n"
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
        legend=0.2 * math.ceil((len(looks) + 1) / named) + 0.14,
        left=0.8,
        between=0.65,
        below=0.36,
    )
    figure, axes = frame.figure()
    for i, ax in enumerate(axes):
        if i >= len(panels):
            ax.set_axis_off()
            continue
        title, own, points = panels[i]
        panel_title(ax, title, f"n = {own['example'].nunique()} examples")
        _draw(ax, points, looks, metric)
        if i % columns == 0:
            ax.set_ylabel(metric.label)
        if i + columns >= len(panels):
            ax.set_xlabel("payload bits an element of the full cache")
    front = Line2D([], [], **_FRONT, label="Pareto front")  # type: ignore[arg-type]
    handles = [front, *(mark.handle(drawn[codec]) for codec, mark in looks.items())]
    bottom_legend(figure, frame, handles, named)
    return figure


def _points(rows: pd.DataFrame, metric: Metric) -> list[Point]:
    found = []
    for codec, own in settings.common(rows).groupby("codec", sort=False):
        loss = stats.mean(metric.values(own), settings.clusters(own), bounds=metric.bounds)
        bits = stats.mean(own["bits_per_element"], settings.clusters(own), resamples=1).value
        if math.isfinite(loss.value):
            found.append(Point(str(codec), bits, loss))
    return found


def _draw(ax: Axes, points: list[Point], looks: dict[str, Mark], metric: Metric) -> None:
    if not points:
        ax.text(0.5, 0.5, "nothing measured here", transform=ax.transAxes, ha="center", color="#555555")
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
    best = stats.pareto_front([p.bits for p in points], [-p.loss.value for p in points])
    front = [points[int(i)] for i in best]
    xs, ys = [p.bits for p in front], [p.loss.value for p in front]
    ax.step([*xs, ax.get_xlim()[1]], [*ys, ys[-1]], where="post", zorder=1.5, **_FRONT)  # type: ignore[arg-type]
    bars = [((p.bits, p.loss.low), (p.bits, p.loss.high)) for p in points if math.isfinite(p.loss.low)]
    ends_x = [*xs[1:], float(ax.get_xlim()[1])]
    across = [((x, y), (end, y)) for x, end, y in zip(xs, ends_x, ys, strict=True)]
    down = [((x, above), (x, y)) for x, above, y in zip(xs[1:], ys, ys[1:], strict=False)]
    everywhere = [(p.bits, p.loss.value) for p in points]
    drawn = short(p.codec for p in points)
    labels.place(
        ax, [(p.bits, p.loss.value, drawn[p.codec]) for p in front], everywhere, [*bars, *across, *down]
    )


def _limit_bits(ax: Axes, bits: list[float]) -> None:
    """A logarithmic x axis with ticks at powers of two."""
    low, high = min(bits) / 1.2, max(bits) * 1.2
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    powers = [2.0**i for i in range(-10, 6)]
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in powers if low <= tick <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _limit_divergences(ax: Axes, ends: Iterable[float]) -> None:
    """A y axis that is logarithmic down to the smallest decade met (from 10^-4 on), and has a place for 0."""
    known = list(ends)
    positive = [e for e in known if e > 0] or [0.1]
    least = max(1e-4, 10.0 ** math.floor(math.log10(min(positive))))
    ax.set_yscale("symlog", linthresh=least, linscale=0.5)
    ax.set_ylim(-least / 4, max(*positive, least) * 1.6)
    decades = [10.0**i for i in range(-4, 3)]
    ax.yaxis.set_major_locator(FixedLocator([0.0, *(d for d in decades if least <= d <= ax.get_ylim()[1])]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
