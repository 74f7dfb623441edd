"""Who should prefill: which setting is fastest by the link's rate and by how much slower the edge computes than the cloud."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from testbed.analysis import settings
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.axes import round_values, ticks
from testbed.analysis.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Frame,
    bottom_legend,
    legend_columns,
    panel_title,
)
from testbed.analysis.latency_model import (
    HeldOut,
    LatencyModel,
    Link,
    leave_one_out,
    link_of,
    median_error,
    steady,
)
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.analysis.stage_sums import speed_ratio
from testbed.experiment.row import SENDING
from testbed.units import format_fraction

_CELLS = (48, 36)  #: of the map: rates, speeds
_REACH = 3.0  #: rates so many times beyond the measured ones are drawn
_SPEEDS = 8.0  #: and speeds of the edge
_TEXT, _EDGE = VERMILLION, GREY
_CACHES = (BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW)


@dataclass(frozen=True)
class Map:
    """How much longer than the fastest of the others (logarithm; below 0: it is the fastest) each setting of `names` takes, by
    speed and rate (bit/s); `points`: each measured link's rate, what was fastest there, and what the model says is.
    """

    names: list[str]
    rates: npt.NDArray[np.float64]
    speeds: npt.NDArray[np.float64]
    behind: npt.NDArray[np.float64]
    points: list[tuple[float, str, str]]
    ratio: float


def draw(run: Run) -> Figure:
    """One map: the model's borders, the measured links as points, and the model's error on links that it was not fitted to."""
    rows = steady(settings.finished(settings.labelled(run.rows)))
    rows = rows[rows["rate_up_bps"].notna() & (rows["emulator"] != "none")]
    links = {str(panel): link_of(own) for panel, own in rows.groupby("panel", sort=False)}
    if len({link.rate_up_bps for link in links.values()}) < 2:
        raise NotInThisRun(
            f"{run.path}: who_prefills compares links of at least two rates that do not change"
        )
    names, held = _able(rows)
    held_out = leave_one_out(rows, names)
    middle = Link(
        math.nan,
        *(
            float(np.median([getattr(link, name) for link in links.values()]))
            for name in ("delay_up_s", "delay_down_s", "loss_up")
        ),
    )
    chart = _chart(rows, names, links, middle)
    if len(chart.names) < 2:
        raise NotInThisRun(f"{run.path}: fewer than two settings can be predicted on other links")
    colors = _colors(rows, chart.names)
    drawn = short(chart.names)
    won = [name for name, behind in zip(chart.names, chart.behind, strict=True) if (behind <= 0).any()]
    won += [name for name in dict.fromkeys(name for _, name, _ in chart.points) if name not in won]
    frame = Frame(
        title="Who should prefill: the fastest setting by the link's rate and the edge's speed",
        subtitle=f"{counted(len(links), 'emulated link')} · {subject(run.rows)}\n{_trust(held_out)}",
        footnotes=[
            f"Computed, not measured, but for the points: the latency model fitted to this run, at {middle.rtt_s * 1e3:g} ms "
            f"round trip and {format_fraction(middle.loss_up)} loss. Other speeds: the edge's stages, as they were measured, "
            f"times a factor; the cloud's stay. Measured at ×{chart.ratio:.2g} (dashed).",
            "Settings: those that keep 95 % of the full cache's quality by the estimate."
            if held
            else "Of all settings: no quality is known.",
            *_unknown(rows, names, chart.names),
            *caveats(run),
        ],
        rows=1,
        columns=1,
        panel=4.2,
        legend=0.2 * math.ceil((len(won) + 2) / legend_columns([drawn[n] for n in won], 3)) + 0.14,
        left=0.85,
        below=0.45,
    )
    figure, (ax,) = frame.figure()
    _draw_map(ax, chart, colors, run.latency)
    handles = [
        *(
            Patch(facecolor=colors[name], alpha=0.55, edgecolor=INK, linewidth=0.5, label=drawn[name])
            for name in won
        ),
        *(
            Line2D(
                [],
                [],
                marker=marker,
                color="white",
                markeredgecolor=INK,
                ls="none",
                label=f"measured fastest: {said}",
            )
            for marker, said in (("o", "as the model has it"), ("X", "not the model's"))
        ),
    ]
    bottom_legend(figure, frame, handles, legend_columns([str(h.get_label()) for h in handles], 3))
    return figure


def _able(rows: pd.DataFrame) -> tuple[list[str], bool]:
    """The settings that hold the quality by their estimates, over all links; all of them where none is known."""
    measured = settings.measured(rows)
    full = settings.full_cache_quality(rows)
    held = full == full
    return [m.label for m in (settings.holding(measured, full) if held else measured)], held


def _chart(rows: pd.DataFrame, names: list[str], links: dict[str, Link], middle: Link) -> Map:
    model, ratio = LatencyModel.fit(rows), speed_ratio(rows)
    known = [link.rate_up_bps for link in links.values()]
    rates = np.geomspace(min(known) / _REACH, max(known) * _REACH, _CELLS[0])
    speeds = np.geomspace(min(0.5, ratio / _SPEEDS**0.5), max(16.0, ratio * _SPEEDS**0.5), _CELLS[1])
    predicted = [name for name in names if name in model.medians(next(iter(links.values())))]
    taken = np.empty((len(predicted), len(speeds), len(rates)))
    for i, speed in enumerate(speeds):
        for j, rate in enumerate(rates):
            there = Link(float(rate), middle.delay_up_s, middle.delay_down_s, middle.loss_up)
            medians = model.medians(there, float(speed) / ratio)
            taken[:, i, j] = np.log([medians[name] for name in predicted])
    behind = np.array(
        [own - np.delete(taken, k, axis=0).min(axis=0, initial=np.inf) for k, own in enumerate(taken)]
    )
    points = []
    for panel, link in links.items():
        own = rows[rows["panel"] == panel]
        times = settings.latencies(own).groupby(own["setting"], sort=False).median()
        measured = {str(name): float(value) for name, value in times.items() if name in names}
        if measured and predicted:
            best = min(predicted, key=model.medians(link).__getitem__)
            points.append((link.rate_up_bps, min(measured, key=measured.__getitem__), best))
    return Map(predicted, rates, speeds, behind, points, ratio)


def _colors(rows: pd.DataFrame, names: list[str]) -> dict[str, str]:
    """Of text and of the edge one each; caches by their order."""
    placements = rows.drop_duplicates("setting").set_index("setting")["placement"]
    colors, caches = {}, 0
    for name in [*names, *(str(n) for n in placements.index if n not in names)]:
        if placements[name] in SENDING:
            colors[name] = _CACHES[caches % len(_CACHES)]
            caches += name in names
        else:
            colors[name] = _EDGE if placements[name] == "edge" else _TEXT
    return colors


def _draw_map(ax: Axes, chart: Map, colors: dict[str, str], latency: str) -> None:
    panel_title(
        ax,
        f"fastest by its median {latency}",
        "above the dashed line the edge is slower than it was measured, below faster",
    )
    x = chart.rates / 1e6
    for name, behind in zip(chart.names, chart.behind, strict=True):
        if (behind <= 0).any():
            ax.contourf(x, chart.speeds, behind, levels=[-np.inf, 0.0], colors=[colors[name]], alpha=0.45)
        if (behind <= 0).any() and (behind > 0).any():
            ax.contour(x, chart.speeds, behind, levels=[0.0], colors=INK, linewidths=0.9)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _name_regions(ax, chart)
    ax.axhline(chart.ratio, color=INK, lw=0.9, ls=(0, (5, 3)), zorder=3)
    for rate, measured, said in chart.points:
        marker = "o" if measured == said else "X"
        ax.plot(
            rate / 1e6,
            chart.ratio,
            marker=marker,
            color=colors[measured],
            markeredgecolor=INK,
            markersize=10,
            zorder=5,
        )
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(chart.speeds[0], chart.speeds[-1])
    ticks(ax.xaxis, round_values(*ax.get_xlim()))
    ticks(ax.yaxis, round_values(*ax.get_ylim()))
    ax.grid(visible=False)
    ax.set_xlabel("rate, edge to cloud (Mbit/s)")
    ax.set_ylabel("edge's prefill over the cloud's (×)")


def _name_regions(ax: Axes, chart: Map) -> None:
    """Each setting's name in the middle of where it is fastest, where that is large enough for it."""
    names = short(chart.names, 26)
    for name, behind in zip(chart.names, chart.behind, strict=True):
        rows, columns = np.nonzero(behind <= 0)
        if len(rows) < 0.015 * behind.size:
            continue
        middle = np.median(rows), np.median(columns)
        nearest = int(np.argmin((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2))
        column = columns[nearest] / behind.shape[1]
        side = "left" if column < 0.12 else "right" if column > 0.88 else "center"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
        at = chart.rates[columns[nearest]] / 1e6, chart.speeds[rows[nearest]]
        ax.text(*at, names[name], ha=side, va="center", fontsize=8, bbox=box, zorder=4)


def _unknown(rows: pd.DataFrame, names: list[str], predicted: list[str]) -> list[str]:
    left = [name for name in names if name not in predicted]
    drawn = short(left)
    return (
        [f"Not in the map, since what they do elsewhere is not known: {', '.join(drawn[n] for n in left)}."]
        if left
        else []
    )


def _trust(held_out: list[HeldOut]) -> str:
    if not held_out:
        return "the model's error on other links is unknown"
    right = sum(link.chosen_within <= 0.05 for link in held_out)
    cells = sum(len(link.errors) for link in held_out)
    return (
        f"each link predicted from the others: median error {median_error(held_out):.1%} over {cells} cells; the predicted "
        f"best is within 5 % of the measured best on {right} of {counted(len(held_out), 'link')}"
    )
