"""What figures share that have a panel for each link or task: marks and their legend, the panels' labels, curves and fronts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from testbed import stats
from testbed.analysis.figures.labels import Segment
from testbed.analysis.figures.style import (
    BLUE,
    GREY,
    Frame,
    Mark,
    bottom_legend,
    legend_columns,
    legible,
    marks,
)
from testbed.analysis.link_rates import Floats
from testbed.analysis.names import short
from testbed.analysis.settings import Measured

#: Lines of curves, one after the other.
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2))]
#: How a Pareto front is drawn.
FRONT: dict[str, Any] = {"color": GREY, "lw": 2.2, "alpha": 0.55}

_RATE = "#BBD0E3"

Panel = TypeVar("Panel")


@dataclass(frozen=True)
class Legend:
    """Each setting's mark by its label, for the panels and below them. `most`: columns; `more`: handles besides the marks."""

    looks: dict[str, Mark]
    most: int = 5
    more: int = 0

    @classmethod
    def of(cls, measured: Iterable[Measured]) -> Legend:
        """Of settings, each of which may have been measured several times."""
        return cls(marks({m.label: (m.label, m.placement, m.codec) for m in measured}.values()))

    @cached_property
    def names(self) -> dict[str, str]:
        """Each label as it is drawn."""
        return short(self.looks)

    @property
    def columns(self) -> int:
        return legend_columns(self.names.values(), self.most)

    @property
    def height(self) -> float:
        """What a figure leaves free for it, in inches."""
        return 0.2 * math.ceil((len(self.looks) + self.more) / self.columns) + 0.14

    def handles(self) -> list[Line2D]:
        """The marks with their names."""
        return [mark.handle(self.names[label]) for label, mark in self.looks.items()]

    def draw(
        self, figure: Figure, frame: Frame, handles: list[Any] | None = None, above: float = 0.0
    ) -> None:
        """Below the panels, `above` inches above the footnotes; `handles`: others than the marks."""
        bottom_legend(figure, frame, handles or self.handles(), self.columns, above)


def fill(
    axes: list[Axes],
    columns: int,
    panels: Sequence[Panel],
    draw: Callable[[Axes, Panel], object],
    x: str,
    y: str = "",
) -> None:
    """Draw each panel into its axes. Names of axes stand at the edges alone, and axes that are left over stay empty."""
    spec = axes[0].get_subplotspec()
    columns = columns if spec is None else spec.get_gridspec().ncols  # fewer where the paper is narrow
    for index, ax in enumerate(axes):
        if index >= len(panels):
            ax.set_axis_off()
            continue
        draw(ax, panels[index])
        if y and index % columns == 0:
            ax.set_ylabel(y)
        if index + columns >= len(panels):
            ax.set_xlabel(x)


def empty(ax: Axes) -> None:
    """Say that a panel has nothing to show."""
    ax.text(0.5, 0.5, "nothing measured here", transform=ax.transAxes, ha="center", color="#555555")


def curve(
    ax: Axes,
    number: int,
    mark: Mark,
    size: float,
    points: Sequence[tuple[float, stats.Estimate]],
    joined: bool = True,
) -> list[float]:
    """The `number`th setting's estimates with their intervals, `joined` for the eye; returns where they end."""
    xs, ends = [x for x, _ in points], [estimate.value for _, estimate in points]
    if joined and len(xs) > 1:
        ax.plot(xs, ends, color=mark.color, lw=1.0, ls=DASHES[number % len(DASHES)], zorder=2, gid="joined")
    ax.plot(xs, ends, zorder=4, **{**mark.options(), "markersize": size})
    for x, estimate in points:
        if math.isfinite(estimate.low) and math.isfinite(estimate.high):
            interval = [estimate.low, estimate.high]
            ax.plot([x, x], interval, color=mark.color, lw=1.0, alpha=0.6, zorder=3, gid="interval")
            ends = [*ends, *interval]
    return ends


def rate_above(ax: Axes, rate: tuple[Floats, Floats]) -> None:
    """A link's rate as it changes, in the lane above the first: edges of bins (s) and bit/s in them."""
    edges, values = rate
    most = float(np.max(values)) or 1.0
    ax.stairs(-0.58 - 0.85 * values / most, edges, baseline=-0.58, fill=True, color=_RATE, zorder=0.5)
    ax.annotate(
        f"{most / 1e6:.3g} Mbit/s",
        (1, -1.43),
        (-2, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=legible(6),
        color=BLUE,
    )


def chunk_number(ax: Axes, x: float, y: float, chunk: object) -> None:
    """A chunk's number on its bar."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85}
    ax.text(x, y, str(chunk), ha="center", va="center", fontsize=legible(5.8), bbox=box, zorder=4)


def front(ax: Axes, points: Sequence[tuple[float, float]], look: dict[str, Any]) -> list[Segment]:
    """A step at each of a front's points: the best to be had at that cost or less. Returns its horizontal and vertical pieces,
    which labels avoid. The axes must have their limits.
    """
    if not points:
        return []
    last = (float(ax.get_xlim()[1]), points[-1][1])
    ax.step(*zip(*points, last, strict=True), where="post", zorder=1.5, **look)
    behind = [*points[1:], last]
    across = [((x, y), (then, y)) for (x, y), (then, _) in zip(points, behind, strict=True)]
    return across + [((then, y), (then, above)) for (_, y), (then, above) in zip(points, behind, strict=True)]
