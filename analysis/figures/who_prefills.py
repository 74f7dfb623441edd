"""Who should prefill: which setting is fastest by the link's rate and by how much slower the edge computes than the cloud."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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
    legible,
    panel_title,
)
from testbed.analysis.latency_model import HeldOut, LatencyModel, leave_one_out, median_error, steady
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.analysis.speed_map import SpeedMap, links_of, speed_map
from testbed.analysis.stage_sums import MEET, kind
from testbed.experiment.row import SENDING
from testbed.units import format_fraction

_TEXT, _EDGE = VERMILLION, GREY
_CACHES = (BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW)


def draw(run: Run) -> Figure:
    """The model's borders, the measured links as points, and the model's error on links that it was not fitted to: of all
    settings, and of those of which one side alone prefills.
    """
    rows = steady(settings.finished(settings.labelled(run.rows)))
    rows = rows[rows["rate_up_bps"].notna() & (rows["emulator"] != "none")]
    links = links_of(rows)
    if len({link.rate_up_bps for link in links.values()}) < 2:
        what = "who_prefills compares links of at least two rates that do not change"
        raise NotInThisRun(f"{run.path}: {what}")
    names, held = _able(rows)
    charts = _charts(rows, names)
    if not charts:
        raise NotInThisRun(f"{run.path}: fewer than two settings can be predicted on other links")
    first = next(iter(charts.values()))
    won = list(dict.fromkeys(name for chart in charts.values() for name in chart.fastest_somewhere))
    colors, drawn = _colors(rows, won), short(won)
    handles = [
        Patch(facecolor=colors[name], alpha=0.55, edgecolor=INK, linewidth=0.5, label=drawn[name])
        for name in won
    ] + [_point(marker, said) for marker, said in (("o", "as the model has it"), ("X", "not the model's"))]
    legend = legend_columns([*drawn.values(), "measured fastest: as the model has it"], 3)
    settings_ = (
        "those that keep 95 % of the full cache's quality by the estimate"
        if held
        else "all; no quality is known"
    )
    frame = Frame(
        title="Who should prefill: the fastest setting by the link's rate and the edge's speed",
        subtitle=f"{counted(len(links), 'emulated link')} · {subject(run.rows)}\n{_trust(leave_one_out(rows, names))}",
        footnotes=[
            f"Computed, not measured, but for the points: the latency model fitted to this run, at "
            f"{first.middle.rtt_s * 1e3:g} ms round trip and {format_fraction(first.middle.loss_up)} loss. Other speeds: the "
            f"edge's stages, as they were measured at ×{first.ratio:.2g} (dashed), times a factor; the cloud's stay. "
            f"Settings: {settings_}.",
            *_unknown(names, first.names),
            *caveats(run),
        ],
        rows=1,
        columns=len(charts),
        panel=4.0 if len(charts) == 1 else 3.3,
        legend=0.2 * math.ceil(len(handles) / legend) + 0.14,
        left=0.8,
        below=0.45,
    )
    figure, axes = frame.figure()
    for ax, (title, chart) in zip(axes, charts.items(), strict=True):
        _draw_map(
            ax, chart, colors, f"{title}: fastest by its median {run.latency}" if len(charts) == 1 else title
        )
    axes[0].set_ylabel("edge's prefill over the cloud's (×)")
    bottom_legend(figure, frame, handles, legend)
    return figure


def _able(rows: pd.DataFrame) -> tuple[list[str], bool]:
    """The settings that hold the quality by their estimates, over all links; all of them where none is known."""
    measured = settings.measured(rows)
    full = settings.full_cache_quality(rows)
    held = full == full
    return [m.label for m in (settings.holding(measured, full) if held else measured)], held


def _charts(rows: pd.DataFrame, names: list[str]) -> dict[str, SpeedMap]:
    """Maps by title, of at least two settings each. Of a scout both sides prefill, so another edge's speed has no one factor."""
    model = LatencyModel.fit(rows)
    scouts = set(rows.loc[rows["placement"] == "scout", "setting"])
    names = [name for name in names if name not in scouts]
    met = set(rows.loc[rows["delivery"].map(kind) == MEET, "setting"])
    alone = [name for name in names if name not in met]
    wanted = {"all settings": names, "one side prefills": alone if len(alone) < len(names) else []}
    charts = {title: speed_map(rows, model, own) for title, own in wanted.items() if len(own) > 1}
    return {title: chart for title, chart in charts.items() if len(chart.names) > 1}


def _colors(rows: pd.DataFrame, names: list[str]) -> dict[str, str]:
    """Of text and of the edge one each; caches by their order."""
    placements = rows.drop_duplicates("setting").set_index("setting")["placement"]
    caches = [name for name in names if placements[name] in SENDING]
    colors = {name: _CACHES[i % len(_CACHES)] for i, name in enumerate(caches)}
    return {name: colors.get(name, _EDGE if placements[name] == "edge" else _TEXT) for name in names}


def _point(marker: str, said: str) -> Line2D:
    label = f"measured fastest: {said}"
    return Line2D([], [], marker=marker, color="white", markeredgecolor=INK, ls="none", label=label)


def _draw_map(ax: Axes, chart: SpeedMap, colors: dict[str, str], title: str) -> None:
    panel_title(ax, title, "above the dashed line: an edge slower than measured")
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
        look: dict[str, Any] = {"markeredgecolor": INK, "markersize": 9, "zorder": 5, "ls": "none"}
        ax.plot(
            rate / 1e6, chart.ratio, marker="o" if measured == said else "X", color=colors[measured], **look
        )
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(chart.speeds[0], chart.speeds[-1])
    ticks(ax.xaxis, round_values(*ax.get_xlim()))
    ticks(ax.yaxis, round_values(*ax.get_ylim()))
    ax.grid(visible=False)
    ax.set_xlabel("rate, edge to cloud (Mbit/s)")


def _name_regions(ax: Axes, chart: SpeedMap) -> None:
    """Each setting's name near the middle of where it is fastest, off the points, where there is room for it."""
    names = short(chart.names, 26)
    free = np.abs(np.log(chart.speeds / chart.ratio)) > 0.15
    for name, behind in zip(chart.names, chart.behind, strict=True):
        inside = (behind <= 0) & free[:, None]
        if inside.sum() < 0.015 * behind.size:
            continue
        rows, columns = np.nonzero(inside)
        away = (rows - np.median(rows)) ** 2 + (columns - np.median(columns)) ** 2
        row, column = rows[int(np.argmin(away))], columns[int(np.argmin(away))]
        share = column / behind.shape[1]
        side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
        at = chart.rates[column] / 1e6, chart.speeds[row]
        ax.text(*at, names[name], ha=side, va="center", fontsize=legible(7.6), bbox=box, zorder=4)


def _unknown(names: list[str], predicted: list[str]) -> list[str]:
    left = short(name for name in names if name not in predicted)
    what = "Not in the map, since what they do elsewhere is not known"
    return [f"{what}: {', '.join(left.values())}."] if left else []


def _trust(held_out: list[HeldOut]) -> str:
    if not held_out:
        return "the model's error on other links is unknown"
    right = sum(link.chosen_within <= 0.05 for link in held_out)
    cells = sum(len(link.errors) for link in held_out)
    return (
        f"each link predicted from the others: median error {median_error(held_out):.1%} over {cells} cells; the predicted "
        f"best is within 5 % of the measured best on {right} of {counted(len(held_out), 'link')}"
    )
