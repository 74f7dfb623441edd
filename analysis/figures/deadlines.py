"""Senders with a deadline: how often each setting meets it, what its answers are worth, and at which level it sends."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from testbed import stats
from testbed.analysis import adaptive
from testbed.analysis.adaptive import Kept
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.style import BLUE, GREY, INK, VERMILLION, Frame
from testbed.analysis.names import short
from testbed.analysis.run import Run


def draw(run: Run) -> Figure:
    """A row of panels for each link: deadline met, mean score, mean level; a line a setting."""
    every = adaptive.kept(run)
    if not any(math.isfinite(each.deadline_s) for each in every):
        raise NotInThisRun(f"{run.path}: no setting of it has a deadline")
    links = list(dict.fromkeys(each.panel for each in every))
    names = short((each.setting for each in every), 40)
    most = max(sum(each.panel == link for each in every) for link in links)
    frame = Frame(
        title="Deadlines met, answers and levels",
        subtitle=(
            f"{counted(len(names), 'setting')} on {counted(len(links), 'emulated link')} · {subject(run.rows)}\n"
            "bars: 95 % intervals over examples (deadlines: Clopper and Pearson's)"
        ),
        footnotes=[
            "Red: chooses each chunk's level; dashed: the oracle, which knows the trace. Deadlines are the first token's; a "
            "setting without one meets it where its first token came by then. Level: mean rung of the chunks, 0 being the "
            "first of the ladder.",
            *caveats(run),
        ],
        rows=len(links),
        columns=3,
        panel=0.3 + 0.25 * most,
        legend=0.0,
        left=0.25 + 0.066 * max(map(len, names.values())),
        between=0.18,
        below=0.42,
    )
    figure, axes = frame.figure()
    for row, link in enumerate(links):
        own = [each for each in every if each.panel == link]
        _draw_link(axes[3 * row : 3 * row + 3], link, own, names)
    for ax, label in zip(axes[-3:], ("deadline met", "mean score", "mean level"), strict=True):
        ax.set_xlabel(label)
    return figure


def _draw_link(axes: list[Axes], link: str, own: list[Kept], names: dict[str, str]) -> None:
    deadlines = sorted({each.deadline_s for each in own if math.isfinite(each.deadline_s)})
    wanted = f"deadline {' and '.join(f'{d:g} s' for d in deadlines)}" if deadlines else "no deadline"
    for text, height, look in (
        (link[:110], 17, {"fontsize": 9.5, "weight": "bold"}),
        (wanted, 5, {"color": "#444444"}),
    ):
        at: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "fontsize": 8,
            **look,
        }
        axes[0].annotate(text, (0, 1), (0, height), **at)
    values = [
        [each.met for each in own],
        [each.score for each in own],
        [stats.Estimate(each.level, math.nan, math.nan, each.score.n) for each in own],
    ]
    for number, (ax, column) in enumerate(zip(axes, values, strict=True)):
        for place, (each, estimate) in enumerate(zip(own, column, strict=True)):
            color = VERMILLION if each.adaptive else BLUE
            if math.isfinite(estimate.low):
                ax.plot([estimate.low, estimate.high], [place] * 2, color=color, lw=1.1, alpha=0.6)
            if math.isfinite(estimate.value):
                ax.plot(estimate.value, place, marker="o", color=color, markeredgecolor=INK, markersize=6)
            if adaptive.ORACLE in each.setting and math.isfinite(estimate.value):
                ax.axvline(estimate.value, color=GREY, lw=0.9, ls=(0, (5, 3)), zorder=1)
        ax.set_yticks(range(len(own)), [names[each.setting] for each in own])
        ax.tick_params(axis="y", length=0, labelleft=number == 0)
        ax.set_ylim(len(own) - 0.5, -0.5)
        if number < 2:
            ax.set_xlim(-0.04, 1.04)
            ax.xaxis.set_major_formatter(PercentFormatter(1.0) if number == 0 else "{x:g}")
        else:
            ax.set_xlim(-0.15, max([each.level for each in own if math.isfinite(each.level)] or [1.0]) + 0.3)
