"""Quality against end-to-end latency, one panel a profile: which settings are worth choosing on which
link.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from testbed import stats
from testbed.analysis import paired_latency, settings
from testbed.analysis.describe import caveats, conditions, counted, subject
from testbed.analysis.figures import NotInThisRun, labels
from testbed.analysis.figures.axes import limit_losses, limit_scores, limit_seconds
from testbed.analysis.figures.panels import FRONT, Legend, empty, fill, front
from testbed.analysis.figures.style import (
    INK,
    Frame,
    Mark,
    bottom_legend,
    legend_height,
    panel_title,
    tell_missing,
)
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.analysis.settings import DELTA_NLL, QUALITY_FLOOR, SCORE, Measured, Metric

_FULL: dict[str, Any] = {"color": INK, "lw": 0.9, "ls": (0, (5, 3))}
MOST_NAMED = 8  #: settings named in a panel; more would cover each other
_SPLIT_FRONT: dict[str, Any] = {"color": INK, "lw": 1.0, "ls": (0, (1, 1.6))}
_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 16,
    "markerfacecolor": "none",
    "markeredgecolor": INK,
    "ls": "none",
}
_TIE: dict[str, Any] = {
    "s": 230,
    "facecolors": "none",
    "edgecolors": INK,
    "linewidths": 0.9,
    "linestyles": (0, (1, 1.5)),
}


@dataclass(frozen=True)
class Panel:
    """What one panel shows. `full`: the full cache's quality, NaN where unknown; `chosen`: what is shown to be the fastest that
    keeps the quality, of all and of what sends KV; `tied`: what may be; `missing`: what has no place, in words.
    """

    title: str
    conditions: str
    measured: list[Measured]
    full: float
    chosen: list[Measured]
    tied: list[Measured]
    missing: list[str]


def draw(run: Run) -> Figure:
    """Mean score over all tasks against median latency; several tasks count equally."""
    _need(run, SCORE, "score")
    panels = [_panel(name, rows, SCORE) for name, rows in settings.panels(run.attempts)]
    tasks = run.rows["task"].nunique()
    what = "mean score" + (f" over {tasks} tasks" if tasks > 1 else "")
    return _figure(run, panels, _columns(panels), SCORE, f"Answer quality against {run.latency}", what)


def draw_by_task(run: Run) -> Figure:
    """Mean score against median latency: a row of panels for each profile, a column for each task."""
    _need(run, SCORE, "score")
    tasks = list(run.rows["task"].unique())
    if len(tasks) < 2:
        raise NotInThisRun(f"{run.path} has one task only; draw latency_quality instead")
    panels = [
        _panel(f"{name} · {task}", rows[rows["task"] == task], SCORE)
        for name, rows in settings.panels(run.attempts)
        for task in tasks
        if (rows["task"] == task).any()
    ]
    title = f"Answer quality against {run.latency}, task by task"
    return _figure(run, panels, min(3, len(tasks)), SCORE, title, "mean score")


def draw_nll(run: Run) -> Figure:
    """Paired rise of the gold answer's NLL over the full cache's against median latency."""
    _need(run, DELTA_NLL, "nll beside a reference_nll")
    panels = [_panel(name, rows, DELTA_NLL) for name, rows in settings.panels(run.attempts)]
    title = f"Lost likelihood of the gold answer against {run.latency}"
    what = "mean of NLL − full cache's NLL on the same example, lower is better"
    return _figure(run, panels, _columns(panels), DELTA_NLL, title, what)


def _need(run: Run, metric: Metric, column: str) -> None:
    if not np.isfinite(metric.values(run.rows)).any():
        raise NotInThisRun(
            f"{run.path}: {settings.no_quality(run.rows) or f'no finished trial has a {column}'}"
        )


def _columns(panels: list[Panel]) -> int:
    return 1 if len(panels) == 1 else 2 if len(panels) <= 6 else 3


def _panel(name: str, rows: pd.DataFrame, metric: Metric) -> Panel:
    every = settings.measured(rows, metric)
    measured = [m for m in every if math.isfinite(m.quality.value) and 0 < m.latency.value < math.inf]
    full = settings.full_cache_quality(rows) if metric is SCORE else 0.0
    able = settings.holding(measured, full) if metric is SCORE else []
    chosen, tied = [], dict[str, Measured]()
    for group in (able, _split(able)):
        level = paired_latency.tied(rows, group[0].label, [m.label for m in group]) if group else []
        if level or (group and not settings.shown_to_hold(rows[rows["setting"] == group[0].label])):
            tied |= {m.label: m for m in group if m is group[0] or m.label in level}
        else:
            chosen += group[:1]
    missing = [f"{m.label} {m.gap}" for m in every if m.gap]
    return Panel(name, conditions(rows), measured, full, chosen, list(tied.values()), missing)


def _split(measured: list[Measured]) -> list[Measured]:
    return [m for m in measured if m.sends]


def _figure(run: Run, panels: list[Panel], columns: int, metric: Metric, title: str, what: str) -> Figure:
    legend = Legend.of(m for p in panels for m in p.measured)
    links = counted(run.rows["profile"].nunique(), "emulated link")
    compared = f"{counted(len(legend.looks), 'setting')} on {links} · {subject(run.rows)}"
    lines = _lines(panels)
    below = legend_height([str(line.get_label()) for line in lines], len(lines))
    frame = Frame(
        title=title,
        subtitle=f"{compared}\n{what}; median of the {run.latency}; bars: 95 % intervals over examples, of the fronts",
        footnotes=[_reading(panels), *caveats(run)],
        rows=math.ceil(len(panels) / columns),
        columns=columns,
        panel={1: 3.4, 2: 2.25, 3: 1.95}[columns],
        legend=legend.height + below - 0.08,
    )
    figure, axes = frame.figure()

    def draw_panel(ax: Axes, panel: Panel) -> None:
        _limit_quality(ax, panels, metric)
        _draw_panel(ax, panel, legend.looks, metric)

    fill(axes, columns, panels, draw_panel, f"{run.latency} (s)", metric.label)
    bottom_legend(figure, frame, lines, len(lines))
    legend.draw(figure, frame, above=below - 0.1)
    return figure


def _reading(panels: list[Panel]) -> str:
    note = "Shape: selector or placement. Fill: precision (full 16 bit, left half 8 bit, open 4 bit, lower half other)."
    note += " Size: tokens kept."
    if any(p.chosen for p in panels):
        note += " Ring: shown to keep the quality, and to be the fastest of all, or that sends KV, that does."
    if any(p.tied for p in panels):
        note += " Dotted ring: keeps it by its estimate, and is not shown to be slower than the fastest, example by example."
    return note


def _lines(panels: list[Panel]) -> list[Line2D]:
    """What stands for the lines and the ring in a legend."""
    lines = [Line2D([], [], **FRONT, label="Pareto front")]
    if any(0 < len(_split(p.measured)) < len(p.measured) for p in panels):
        lines.append(Line2D([], [], **_SPLIT_FRONT, label="… of the settings that send KV"))
    lines.append(Line2D([], [], **_FULL, label="full cache"))
    if any(p.chosen for p in panels):
        ring = {**_RING, "markersize": 11}
        lines.append(Line2D([], [], **ring, label=f"fastest with ≥ {QUALITY_FLOOR:.0%} of full cache"))
    if any(p.tied for p in panels):
        ring = {**_RING, "marker": "$\u25cc$", "markersize": 11, "markeredgewidth": 0.2}  # a dotted circle
        lines.append(
            Line2D([], [], **ring, label=f"may be the fastest with ≥ {QUALITY_FLOOR:.0%}: tied, or not shown")
        )
    return lines


def _draw_panel(ax: Axes, panel: Panel, looks: dict[str, Mark], metric: Metric) -> None:
    panel_title(ax, panel.title, panel.conditions)
    tell_missing(ax, panel.missing)
    if not panel.measured:
        empty(ax)
        return
    if math.isfinite(panel.full):
        ax.axhline(panel.full, zorder=1, **_FULL)
    for shown in panel.measured:
        ax.plot(shown.latency.value, shown.quality.value, zorder=4, **looks[shown.label].options())
    for shown in panel.chosen:
        ax.plot(shown.latency.value, shown.quality.value, zorder=3.5, markeredgewidth=1.4, **_RING)
    for shown in panel.tied:
        ax.scatter([shown.latency.value], [shown.quality.value], zorder=3.5, **_TIE)
    limit_seconds(ax, (e for m in panel.measured for e in (m.latency.low, m.latency.value, m.latency.high)))
    whole, sent = (_front(measured, metric) for measured in (panel.measured, _split(panel.measured)))
    crossed = front(ax, [_place(m) for m in whole], FRONT)
    if sent != whole:
        crossed += front(ax, [_place(m) for m in sent], _SPLIT_FRONT)
    barred = {m.label: m for m in whole + sent}.values()  # all settings' bars would be a fence
    for shown in barred:
        for xs, ys in _bars(shown):
            look: dict[str, Any] = {"color": looks[shown.label].color, "lw": 1.0, "alpha": 0.6, "zorder": 2}
            ax.plot(xs, ys, gid="interval", solid_capstyle="butt", **look)
    crossed += [((xs[0], ys[0]), (xs[1], ys[1])) for m in barred for xs, ys in _bars(m)]
    _label(ax, panel, sent + whole, crossed)


def _bars(measured: Measured) -> Iterable[tuple[tuple[float, float], tuple[float, float]]]:
    """The intervals' lines as (xs, ys)."""
    x, y = measured.latency, measured.quality
    return ((x.low, x.high), (y.value, y.value)), ((x.value, x.value), (y.low, y.high))


def _front(measured: list[Measured], metric: Metric) -> list[Measured]:
    sign = 1.0 if metric.higher_is_better else -1.0
    indices = stats.pareto_front(
        [m.latency.value for m in measured], [sign * m.quality.value for m in measured]
    )
    return [measured[int(i)] for i in indices]


def _place(measured: Measured) -> tuple[float, float]:
    return measured.latency.value, measured.quality.value


def _label(ax: Axes, panel: Panel, fronts: list[Measured], crossed: list[labels.Segment]) -> None:
    """Name the members of both fronts and the placements in the panel itself, some where they are many; the legend names all."""
    named = fronts + [m for m in panel.measured if not m.sends]
    drawn = short(m.label for m in panel.measured)
    points = {m.label: (*_place(m), drawn[m.label]) for m in _thinned(named, panel.chosen + panel.tied)}
    lines = [*crossed, ((ax.get_xlim()[0], panel.full), (ax.get_xlim()[1], panel.full))]
    known = [line for line in lines if np.isfinite(line).all()]
    labels.place(ax, list(points.values()), [_place(m) for m in panel.measured], known)


def _thinned(named: list[Measured], chosen: list[Measured]) -> list[Measured]:
    """At most `MOST_NAMED`: what is chosen, the placements, and of the rest every so many, from the fastest on."""
    distinct = list({m.label: m for m in named}.values())
    if len(distinct) <= MOST_NAMED:
        return distinct
    first = [m for m in distinct if not m.sends or any(m is c for c in chosen)]
    rest = sorted((m for m in distinct if m not in first), key=lambda m: m.latency.value)
    room = max(1, MOST_NAMED - len(first))
    return first + [rest[i * (len(rest) - 1) // max(1, room - 1)] for i in range(min(room, len(rest)))]


def _limit_quality(ax: Axes, panels: list[Panel], metric: Metric) -> None:
    ends = [e for p in panels for m in p.measured for e in (m.quality.low, m.quality.value, m.quality.high)]
    ends += [p.full for p in panels]
    (limit_scores if metric is SCORE else limit_losses)(ax, ends)
