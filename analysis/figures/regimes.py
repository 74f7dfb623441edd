"""Which setting wins where: for each rate and delay the fastest one that keeps the quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from testbed.analysis import settings
from testbed.analysis.describe import caveats, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.style import GREY, INK, Frame, Mark, legible, marks, panel_title
from testbed.analysis.latency_model import steady
from testbed.analysis.names import short
from testbed.analysis.paired_latency import LatencyRatio, ratios
from testbed.analysis.run import Run
from testbed.analysis.settings import QUALITY_FLOOR, Measured
from testbed.units import format_fraction, format_time


@dataclass(frozen=True)
class Square:
    """One link's winner and the runner-up among the settings that hold the quality by their estimates; None where none does.
    `shown`: the winner's interval holds it too. `slower`: the runner-up's paired ratio to the winner; `ties`: how many
    settings are not shown to be slower than the winner.
    """

    profile: str
    loss: float
    best: Measured | None
    second: Measured | None
    shown: bool
    changes: bool = False  #: the link follows a trace: its place is that of its means
    slower: LatencyRatio | None = None
    ties: int = 0


_ROOM_FOR_A_MARK = 110.0  #: points
_WIDE = 0.58  #: of a text's size, a character's width
_SMALLEST = 5.6  #: points of a font

Place = tuple[float, float]  #: rate up (bit/s; 0: unlimited), delay up (s)


def draw(run: Run) -> Figure:
    """Two panels: of all settings, and of those that send KV across the link."""
    panels = list(settings.panels(run.attempts))
    if len(panels) < 2:
        raise NotInThisRun(f"{run.path} has one link only; regimes compares at least two profiles")
    if unknown := settings.no_quality(run.rows):
        raise NotInThisRun(f"{run.path}: {unknown}, and regimes asks which setting keeps the quality")
    maps = {
        "all settings": _squares(panels, everything=True),
        "settings that send KV": _squares(panels, everything=False),
    }
    maps = {name: squares for name, squares in maps.items() if squares}
    if len(maps) == 2 and not any(not m.sends for m in _winners(maps["all settings"])):
        maps.pop("settings that send KV")
    rates = sorted({place[0] or float("inf") for squares in maps.values() for place in squares})
    delays = sorted({place[1] for squares in maps.values() for place in squares})
    looks = marks(
        {m.label: (m.label, m.placement, m.codec) for s in maps.values() for m in _winners(s)}.values()
    )
    deep = max(len(own) for squares in maps.values() for own in squares.values())
    frame = Frame(
        title=f"The fastest setting that keeps {QUALITY_FLOOR:.0%} of the full cache's quality, link by link",
        subtitle=(
            f"{len(panels)} emulated links by rate (up) and one-way delay · {subject(run.rows)}\n"
            f"its median {run.latency} with 95 % interval; below, the next best: how much slower (median ratio), or tied"
        ),
        footnotes=[
            "Kept: mean score over tasks (each counts equally) at least that share of the full cache's on the "
            "same examples, by the estimate. A name in brackets: its 95 % interval does not show it, which is what "
            "`testbed recommend` asks for. Tied: not shown to be slower, example by example (Wilcoxon's p after Holm's "
            "correction, and the ratio's interval). Empty: not measured.",
            *caveats(run),
        ],
        rows=len(maps),
        columns=1,
        panel=0.1 + len(delays) * (0.2 + 0.52 * deep),
        legend=0.0,
        left=0.8,
    )
    figure, axes = frame.figure()
    for ax, (name, squares) in zip(axes, maps.items(), strict=True):
        _draw_panel(ax, name, squares, rates, delays, looks)
    axes[-1].set_xlabel("rate, edge to cloud")
    return figure


def _winners(squares: dict[Place, list[Square]]) -> list[Measured]:
    return [s.best for own in squares.values() for s in own if s.best is not None]


def _squares(panels: list[tuple[str, pd.DataFrame]], everything: bool) -> dict[Place, list[Square]]:
    """The links by place; several share one where they differ in loss or in what the place does not show."""
    squares: dict[Place, list[Square]] = {}
    for name, rows in panels:
        measured = settings.measured(rows)
        full = settings.full_cache_quality(rows)
        if not everything:
            measured = [m for m in measured if m.sends]
        able = settings.holding(measured, full)
        best, second = able[0] if able else None, able[1] if len(able) > 1 else None
        rate = float(rows["rate_up_bps"].median())
        place = (0.0 if rate != rate else rate, round(float(rows["delay_up_s"].median()), 6))
        loss = float(rows["loss_up"].median())
        if measured:
            shown = best is not None and settings.shown_to_hold(rows[rows["setting"] == best.label])
            compared = ratios(rows, best.label, [m.label for m in able[1:]]) if best else []
            slower = next((other for other in compared if second and other.setting == second.label), None)
            ties = sum(not (other.differs and other.ratio.value > 1) for other in compared)
            changes = len(steady(rows)) < len(rows)
            squares.setdefault(place, []).append(
                Square(name, loss, best, second, shown, changes, slower, ties)
            )
    return squares


def _draw_panel(
    ax: Axes,
    name: str,
    squares: dict[Place, list[Square]],
    rates: list[float],
    delays: list[float],
    looks: dict[str, Mark],
) -> None:
    panel_title(ax, name, "")
    ax.grid(visible=False)
    ax.set_xlim(-0.02, len(rates) + 0.02)
    ax.set_ylim(-0.02, len(delays) + 0.02)
    for (rate, delay), own in squares.items():
        column, row = rates.index(rate or float("inf")), delays.index(delay)
        for index, square in enumerate(own):
            _draw_square(ax, square, column, row + index / len(own), 1 / len(own), looks)
    texts = ["no limit" if rate == float("inf") else f"{rate / 1e6:g} Mbit/s" for rate in rates]
    ax.set_xticks([i + 0.5 for i in range(len(rates))], texts)
    ax.set_yticks([i + 0.5 for i in range(len(delays))], [format_time(d) for d in delays])
    ax.set_ylabel("one-way delay")
    ax.tick_params(length=0)


def _draw_square(ax: Axes, square: Square, x: float, y: float, height: float, looks: dict[str, Mark]) -> None:
    mark = looks[square.best.label] if square.best else None
    at, size = (x + 0.02, y + 0.02 * height), (0.96, 0.96 * height)
    look: dict[str, Any] = {"facecolor": mark.color if mark else "white", "alpha": 0.22 if mark else 1.0}
    ax.add_patch(Rectangle(at, *size, edgecolor="none", **look))
    ax.add_patch(Rectangle(at, *size, facecolor="none", edgecolor=GREY, linewidth=0.8))

    def write(where: float, texts: Sequence[str], size: float, share: float = 0.94, **more: Any) -> None:
        _write(ax, x + 0.5, y + where * height, texts, size, share, **more)

    # A link written out says in its name what its place says already.
    named = [] if "=" in square.profile else [square.profile]
    loss = f"{format_fraction(square.loss)} loss"
    changing = ["means of a trace"] if square.changes else []
    parts = [*named, loss, *changing]
    write(
        0.84,
        [" · ".join(parts), *([" · ".join([*named, *changing])] if named else []), *named],
        6.8,
        color="#444444",
    )
    if square.best is None or mark is None:
        write(0.4, ["none keeps it"], 8.0, color=INK)
        return
    best, label = square.best.latency, _short(square.best)
    interval = f" [{best.low:.2f}, {best.high:.2f}]" if best.low == best.low else ""
    wide = _points(ax) > _ROOM_FOR_A_MARK
    if wide:
        ax.plot(x + 0.08, y + 0.5 * height, **{**mark.options(), "markersize": 8})
    share = 0.8 if wide else 0.94
    write(0.6, [label if square.shown else f"({label})"], 8.6, share, weight="bold")
    write(0.38, [f"{best.value:.2f} s{interval}", f"{best.value:.2f} s"], 7.8, share)
    if square.slower is not None and square.second is not None:
        write(0.14, [_next(square, square.second, square.slower)], 6.8, color="#444444")


def _next(square: Square, second: Measured, slower: LatencyRatio) -> str:
    """The runner-up in words: by how much it is slower, or that it is a tie."""
    if slower.differs and slower.ratio.value > 1:
        return f"{_short(second)} +{slower.ratio.value - 1:.0%}"
    more = f" and {square.ties - 1} more" if square.ties > 1 else ""
    return f"tied: {_short(second)}{more}"


def _points(ax: Axes) -> float:
    """A square's width in points."""
    return float(ax.get_window_extent().width / ax.figure.dpi * 72 / ax.get_xlim()[1])


def _write(
    ax: Axes, x: float, y: float, texts: Sequence[str], size: float, share: float, **more: Any
) -> None:
    """The first of the texts that a square has room for, smaller where it is narrow; the last cut where none fits."""
    width, least = _points(ax) * share, legible(min(size, _SMALLEST))
    most = max(6, int(width / (_WIDE * least)))
    text = next((text for text in texts if len(text) <= most), texts[-1])
    text = text if len(text) <= most else f"{text[: most - 4]}…{text[-3:]}"
    size = max(least, min(size, width / (_WIDE * max(1, len(text)))))
    ax.text(x, y, text, ha="center", va="center", fontsize=size, **more)


def _short(measured: Measured) -> str:
    return short([measured.label])[measured.label]
