"""What programs of one's own came to: each column that the client printed, setting by setting, link by link."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from testbed.analysis import programs
from testbed.analysis.describe import caveats, counted
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.panels import Legend
from testbed.analysis.figures.style import Frame, Mark, marks, panel_title
from testbed.analysis.names import short
from testbed.analysis.run import Run

MOST = 8  #: so many columns have a panel


def draw(run: Run) -> Figure:
    """A panel a column, the links side by side in it; medians with their intervals, nothing between them."""
    if not programs.is_one(run):
        raise NotInThisRun(f"{run.path}: is of language models, not of programs of one's own")
    every = programs.figures(run)
    columns = list(dict.fromkeys(each.column for each in every))
    shown = columns[:MOST]
    links = list(dict.fromkeys(each.panel for each in every))
    settings = list(dict.fromkeys(each.setting for each in every))
    legend = Legend(marks([(setting, "program", setting) for setting in settings]))
    left_out = (
        f"{len(shown)} of {len(columns)} columns; programs.csv has all" if len(shown) < len(columns) else ""
    )
    wide = 2 if len(shown) > 1 else 1
    n = run.rows.groupby(["profile", "codec"]).size()
    size = f"n = {n.min()}" if n.min() == n.max() else f"n = {n.min()} to {n.max()}"
    frame = Frame(
        title=f"What the programs came to: {run.manifest.get('name') or run.path.name}",
        subtitle=(
            f"{left_out or counted(len(shown), 'column')} · {counted(len(settings), 'setting')} on "
            f"{counted(len(links), 'link')}, {size} trials each\nmedians with 95 % bootstrap intervals"
        ),
        footnotes=caveats(run),
        rows=math.ceil(len(shown) / wide),
        columns=wide,
        panel=1.9,
        legend=legend.height,
        left=0.8,
        below=0.42,
    )
    figure, axes = frame.figure()
    for ax, column in zip(axes, shown, strict=False):
        found = {(each.panel, each.setting): each for each in every if each.column == column}
        _draw_panel(ax, column, links, legend.looks, found)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    legend.draw(figure, frame)
    return figure


def _draw_panel(
    ax: Axes,
    column: str,
    links: list[str],
    looks: dict[str, Mark],
    found: dict[tuple[str, str], programs.Figure],
) -> None:
    panel_title(ax, column, "seconds" if column.endswith("_s") else "")
    step = 0.7 / max(1, len(looks))
    for number, (setting, mark) in enumerate(looks.items()):
        for place, link in enumerate(links):
            each = found.get((link, setting))
            if each is None or not math.isfinite(each.median.value):
                continue
            x = place + step * (number - (len(looks) - 1) / 2)
            if math.isfinite(each.median.low) and math.isfinite(each.median.high):
                ax.plot(
                    [x, x], [each.median.low, each.median.high], color=mark.color, lw=1.4, alpha=0.7, zorder=3
                )
            ax.plot(x, each.median.value, zorder=4, **{**mark.options(), "markersize": 5.5})
    ax.set_xticks(range(len(links)), [_two_lines(name) for name in short(links, 24).values()])
    ax.set_xlim(-0.6, len(links) - 0.4)
    ax.set_ylim(bottom=0 if ax.get_ylim()[0] >= 0 else None)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def _two_lines(name: str) -> str:
    return name.replace(",", ",\n", 1) if len(name) > 14 else name
