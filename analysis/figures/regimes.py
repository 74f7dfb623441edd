"""Which setting wins where: for each rate and delay the fastest one that keeps the quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis import settings
from analysis.describe import caveats, subject
from analysis.figures import NotInThisRun
from analysis.figures.names import short
from analysis.figures.style import GREY, INK, Frame, Mark, marks, panel_title
from analysis.run import Run
from analysis.settings import QUALITY_FLOOR, Measured
from testbed.units import format_fraction, format_time


@dataclass(frozen=True)
class Square:
    """One link's winner and the runner-up among the settings that hold the quality by their estimates; None where none does.
    `shown`: the winner's interval holds it too.
    """

    profile: str
    loss: float
    best: Measured | None
    second: Measured | None
    shown: bool


Place = tuple[float, float]  #: rate up (bit/s; 0: unlimited), delay up (s)


def draw(run: Run) -> Figure:
    """Two panels: of all settings, and of those that send KV across the link."""
    found = list(settings.panels(run.rows))
    if len(found) < 2:
        raise NotInThisRun(f"{run.path} has one link only; regimes compares at least two profiles")
    maps = {
        "all settings": _squares(found, everything=True),
        "settings that send KV": _squares(found, everything=False),
    }
    maps = {name: squares for name, squares in maps.items() if squares}
    if len(maps) == 2 and not any(m.placement != "split" for m in _winners(maps["all settings"])):
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
            f"{len(found)} emulated links by rate (up) and one-way delay · {subject(run.rows)}\n"
            "its median end-to-end latency with 95 % bootstrap interval; below, the next best and how much slower it is"
        ),
        footnotes=[
            "Kept: mean score over tasks (each counts equally) at least that share of the full cache's on the "
            "same examples, by the estimate. A name in brackets: its 95 % interval does not show it, which is what "
            "`testbed recommend` asks for. Empty: not measured.",
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


def _squares(found: list[tuple[str, pd.DataFrame]], everything: bool) -> dict[Place, list[Square]]:
    """The links by place; several share one where they differ in loss or in what the place does not show."""
    squares: dict[Place, list[Square]] = {}
    for name, rows in found:
        measured = settings.measure(rows)
        full = settings.full_cache_quality(rows)
        if not everything:
            measured = [m for m in measured if m.placement == "split"]
        best = settings.fastest_that_holds(measured, full)
        rest = [m for m in measured if m is not best]
        second = settings.fastest_that_holds(rest, full) if best else None
        rate = float(rows["rate_up_bps"].median())
        place = (0.0 if rate != rate else rate, round(float(rows["delay_up_s"].median()), 6))
        loss = float(rows["loss_up"].median())
        if measured:
            shown = best is not None and settings.shown_to_hold(rows[rows["setting"] == best.label])
            squares.setdefault(place, []).append(Square(name, loss, best, second, shown))
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
    box = Rectangle(
        (x + 0.02, y + 0.02 * height),
        0.96,
        0.96 * height,
        facecolor=mark.color if mark else "white",
        alpha=0.22 if mark else 1.0,
        edgecolor="none",
    )
    ax.add_patch(box)
    edge: dict[str, Any] = {"facecolor": "none", "edgecolor": GREY, "linewidth": 0.8}
    ax.add_patch(Rectangle((x + 0.02, y + 0.02 * height), 0.96, 0.96 * height, **edge))
    ax.text(
        x + 0.5,
        y + 0.84 * height,
        _fitted(ax, f"{square.profile} · {format_fraction(square.loss)} loss", 6.8),
        ha="center",
        va="center",
        fontsize=6.8,
        color="#444444",
    )
    if square.best is None or mark is None:
        ax.text(x + 0.5, y + 0.4 * height, "none keeps it", ha="center", va="center", fontsize=8, color=INK)
        return
    name, best = _short(square.best), square.best.latency
    interval = f" [{best.low:.2f}, {best.high:.2f}]" if best.low == best.low else ""
    middle = y + 0.5 * height
    ax.plot(x + 0.08, middle, **{**mark.options(), "markersize": 8})
    ax.text(
        x + 0.5,
        middle + 0.1 * height,
        _fitted(ax, name if square.shown else f"({name})", 8.6, 0.8),
        ha="center",
        va="center",
        fontsize=8.6,
        weight="bold",
    )
    ax.text(
        x + 0.5,
        middle - 0.12 * height,
        f"{best.value:.2f} s{interval}",
        ha="center",
        va="center",
        fontsize=7.8,
    )
    if square.second is not None:
        slower = square.second.latency.value / best.value - 1
        text = f"{_short(square.second)} +{slower:.0%}"
        ax.text(
            x + 0.5,
            y + 0.14 * height,
            _fitted(ax, text, 6.8),
            ha="center",
            va="center",
            fontsize=6.8,
            color="#444444",
        )


def _short(one: Measured) -> str:
    return short([one.label])[one.label]


def _fitted(ax: Axes, text: str, size: float, share: float = 0.94) -> str:
    """The text, or its beginning and end where a square is too narrow for it at this font size (points)."""
    width = ax.get_window_extent().width / ax.figure.dpi * 72 / ax.get_xlim()[1] * share
    most = max(6, int(width / (0.58 * size)))
    return text if len(text) <= most else f"{text[: most - 4]}…{text[-3:]}"
