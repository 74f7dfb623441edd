"""Labels beside points, without covering points or each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from testbed.analysis.figures.style import legible

# Where a label may stand around its point: the offset's direction, and the text's side that faces the point.
_SIDES = [
    (1, 1, "left", "bottom"),
    (-1, 1, "right", "bottom"),
    (1, -1, "left", "top"),
    (-1, -1, "right", "top"),
    (1.3, 0, "left", "center"),
    (-1.3, 0, "right", "center"),
    (0, 1.3, "center", "bottom"),
    (0, -1.3, "center", "top"),
]
_DISTANCES = (7, 11, 16, 22, 30, 40, 52, 66)  # points
_MARK = 6.5  # half a mark's width with some air, in points
_SIZE = 7.8
_SHARE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}

Floats = npt.NDArray[np.float64]
Segment = tuple[tuple[float, float], tuple[float, float]]


def place(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    marks: Sequence[tuple[float, float]],
    lines: Sequence[Segment],
) -> None:
    """Write each point's text near it.

    `points`: x, y, text in data coordinates. `marks`: all marks, which no label covers. `lines`: horizontal
    and vertical lines, as their ends, of which a label crosses as few as it can. The axes must have their
    final place and limits. A label that stands away from its point gets a thin line to it; one that fits
    nowhere is left out (the legend names all).
    """
    renderer = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[arg-type]
    pixel = axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer).padded(-2 * pixel)
    centres = np.asarray(axes.transData.transform(np.asarray(marks, dtype=float)))
    half = _MARK * pixel
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]
    crossed = [Bbox(axes.transData.transform(np.asarray(ends, dtype=float))) for ends in lines]
    for x, y, text in points:
        own = np.asarray(axes.transData.transform((x, y)))
        label = axes.annotate(text, (x, y), fontsize=legible(_SIZE), zorder=6)
        size = np.asarray(label.get_window_extent(renderer).size)
        label.remove()
        best: tuple[float, float, tuple[Any, ...], Bbox] | None = None
        for distance, side in _candidates():
            box = _box(own, size, np.array(side[:2]) * distance * pixel, side[2], side[3])
            if not _inside(box, frame) or any(box.overlaps(other) for other in taken):
                continue
            cost = (
                distance
                + 9 * sum(box.overlaps(line) for line in crossed)
                + 80 * (not _is_nearest(box, own, centres))
            )
            if best is None or cost < best[0]:
                best = (cost, distance, side, box)
        if best is not None:
            _write(axes, (x, y), text, best[1], best[2])
            taken.append(best[3].padded(1.5 * pixel))


def _candidates() -> Iterator[tuple[float, tuple[float, float, str, str]]]:
    return ((distance, side) for distance in _DISTANCES for side in _SIDES)


def _write(axes: Axes, at: tuple[float, float], text: str, distance: float, side: tuple[Any, ...]) -> None:
    dx, dy, horizontal, vertical = side
    line = {
        "arrowstyle": "-",
        "lw": 0.7,
        "color": "#555555",
        "shrinkA": 0,
        "shrinkB": 4,
        "relpos": (0.5, 0.5),
    }
    axes.annotate(
        text,
        at,
        (dx * distance, dy * distance),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=legible(_SIZE),
        zorder=6,
        arrowprops=line if distance > 7 else None,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )


def _box(own: Floats, size: Floats, offset: Floats, horizontal: str, vertical: str) -> Bbox:
    """Where a text of this size lies, in pixels, when it is aligned like this at this offset from the
    point.
    """
    share = np.array([_SHARE[horizontal], _SHARE[vertical]])
    corner = own + offset - share * size
    return Bbox([corner, corner + size])


def _inside(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def _is_nearest(box: Bbox, own: Floats, centres: Floats) -> bool:
    """Whether its own mark is clearly the closest to the text: else it would be read as another's name."""

    def distance(points: Floats) -> Floats:
        return np.asarray(
            np.linalg.norm(np.maximum(0, np.maximum(box.min - points, points - box.max)), axis=-1)
        )

    others = centres[np.abs(centres - own).max(axis=1) > 0.5]
    return len(others) == 0 or bool(distance(own) <= 0.65 * distance(others).min())
