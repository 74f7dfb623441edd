"""Quality against the fraction of the context's tokens that is kept, selector by selector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.axes import aside, at_values, limit_losses, limit_scores
from testbed.analysis.figures.panels import Legend, curve
from testbed.analysis.figures.style import Frame, Mark, marks, panel_title
from testbed.analysis.run import Run
from testbed.analysis.settings import DELTA_NLL, SCORE, Metric
from testbed.codecs.spec import written
from testbed.errors import SpecError


@dataclass(frozen=True)
class Curve:
    """One selector with one quantizer: quality by the fraction kept; or a quantizer alone, which keeps all."""

    label: str
    codec: str
    points: tuple[tuple[float, stats.Estimate], ...]


def split_selection(codec: str) -> tuple[str, float, str] | None:
    """(selector with its settings, ratio, the rest of the codec) of a codec's text; None without selector."""
    try:
        selector, *rest = written(codec).values()
    except (SpecError, ValueError):
        return None
    if selector.ratio is None:
        return None
    name = selector.name + (f"({selector.arguments})" if selector.arguments else "")
    return name, selector.ratio, "+".join(part.text for part in rest) or "fp16"


def draw(run: Run) -> Figure:
    """A column of panels for each task: score above, ΔNLL below (where the rows have it)."""
    rows = settings.labelled(settings.encoded(run.rows))
    if not any(split_selection(codec) for codec in rows["codec"].unique()):
        raise NotInThisRun(f"{run.path}: no codec of it selects tokens (such as q2c@0.25+int8)")
    models = rows["model"].nunique()
    panels = list(rows.groupby(["model", "task"] if models > 1 else ["task"], sort=False))
    metrics = [m for m in (SCORE, DELTA_NLL) if m.values(rows).notna().any()]
    if not metrics:
        raise NotInThisRun(f"{run.path}: no finished trial has a score or an nll")
    drawn = {(row, i): _curves(own, m) for row, m in enumerate(metrics) for i, (_, own) in enumerate(panels)}
    named = {c.label: (c.label, "split", c.codec) for curves in drawn.values() for c in curves}
    legend = Legend(marks(named.values()), most=4)
    selectors = [label for label, _, codec in named.values() if split_selection(codec)]
    frame = Frame(
        title="What is left of the answers when tokens are dropped",
        subtitle=(
            f"{counted(len(selectors), 'selector')} · {subject(run.rows)}\n"
            "mean over examples against the fraction of context tokens kept; bars: 95 % intervals"
        ),
        footnotes=[
            ("At 1: the same precision with every token kept. " if len(selectors) < len(named) else "")
            + "Dashed: the full cache. Points at one fraction stand beside each other for legibility; every link gives "
            "the same quality, since transport loses nothing.",
            *caveats(run),
        ],
        rows=len(metrics),
        columns=len(panels),
        panel=2.2,
        legend=legend.height,
        below=0.42,
    )
    figure, axes = frame.figure()
    for (row, column), curves in drawn.items():
        ax = axes[row * len(panels) + column]
        key, own = panels[column]
        lost = "likelihood lost against the full cache" if len(panels) <= 2 else "ΔNLL"
        what = "score" if metrics[row] is SCORE else lost
        panel_title(ax, " · ".join(map(str, key)), f"{what} · n = {own['example'].nunique()} examples")
        level = settings.full_cache_quality(own) if metrics[row] is SCORE else 0.0
        _draw(ax, curves, legend.looks, metrics[row], level)
        if column == 0:
            ax.set_ylabel("mean score" if metrics[row] is SCORE else "ΔNLL (nats/token)")
        if row == len(metrics) - 1:
            ax.set_xlabel("fraction of context tokens kept" if len(panels) <= 2 else "fraction kept")
    legend.draw(figure, frame)
    return figure


def _curves(rows: pd.DataFrame, metric: Metric) -> list[Curve]:
    whole: dict[str, stats.Estimate] = {}
    parts: dict[tuple[str, str], dict[float, stats.Estimate]] = {}
    for codec, own in settings.common(rows).groupby("codec", sort=False):
        estimate = stats.mean(metric.values(own), settings.clusters(own), bounds=metric.bounds)
        selection = split_selection(str(codec))
        if selection is None:
            whole[str(codec)] = estimate
        else:
            parts.setdefault((selection[0], selection[2]), {})[selection[1]] = estimate
    curves = []
    for (selector, rest), points in parts.items():
        known = sorted(points.items())
        name, _, options = selector.partition("(")
        text = f"{name}@r" + (f"({options}" if options else "") + ("" if rest == "fp16" else f"+{rest}")
        codec = f"{name}@0.6" + (f"({options}" if options else "") + f"+{rest}"
        curves.append(Curve(text, codec, tuple(p for p in known if math.isfinite(p[1].value))))
    for rest in dict.fromkeys(rest for _, rest in parts if rest in whole):
        curves.append(Curve(rest, rest, ((1.0, whole[rest]),) if math.isfinite(whole[rest].value) else ()))
    return [c for c in curves if c.points]


def _draw(ax: Axes, curves: list[Curve], looks: dict[str, Mark], metric: Metric, full: float) -> None:
    ends = [full]
    if math.isfinite(full):
        ax.axhline(full, color="#222222", lw=0.9, ls=(0, (5, 3)), zorder=1)
    values = sorted({x for c in curves for x, _ in c.points})
    at_values(ax, values, True, len(curves))
    for number, line in enumerate(curves):
        beside = {x: [c.label for c in curves if any(x == at for at, _ in c.points)] for x, _ in line.points}
        points = [
            (aside(x, beside[x].index(line.label), len(beside[x]), values, True), estimate)
            for x, estimate in line.points
        ]
        ends += curve(ax, number, looks[line.label], 6, points)
    (limit_scores if metric is SCORE else limit_losses)(ax, ends)
