"""Where the time goes: each setting's median latency by stages, stacked, one panel a profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.describe import caveats, conditions, counted, megabytes, subject
from testbed.analysis.figures.panels import fill
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
    legend_height,
    legible,
    panel_title,
)
from testbed.analysis.names import short
from testbed.analysis.run import Run, stage_names

# Hatches alternate between dense and sparse, so that neighbours differ in a black-and-white print.
LOOKS = {
    "edge_queue_s": (GREY, "xxxx", "queue (edge)"),
    "prefill_s": (BLUE, "", "prefill"),
    "select_s": (YELLOW, "....", "select (edge)"),
    "encode_s": (PURPLE, "xxxx", "encode (edge)"),
    "link_queue_s": (GREY, "////", "queue (link)"),
    "connect_s": (INK, "", "connect"),
    "transmit_s": (ORANGE, "////", "transmit"),
    "queue_s": (GREY, "....", "queue (cloud)"),
    "decode_s": (GREEN, "----", "decode (cloud)"),
    "first_token_s": (SKY, "", "first token"),
    "generate_s": (VERMILLION, "\\\\\\\\", "further tokens"),
}


#: Settings that are drawn; slower ones are left out.
MOST = 20
#: What stands beside each setting's bar, of a panel's rows.
Beside = Callable[[pd.DataFrame], dict[str, str]]


def draw(run: Run) -> Figure:
    """The median of the whole, as every figure has it, divided as the stages divide a request on average: means of the
    stages would add up to another latency than the other figures show.
    """
    panels = list(settings.panels(run.attempts))
    columns = 1 if len(panels) == 1 else 2
    stages = stage_names(run.rows)
    every = by_latency(settings.labelled(run.attempts))
    order = every[:MOST]
    bars, left_out = len(order), len(every) - len(order)
    links = counted(len(panels), "emulated link")
    frame = Frame(
        title="Where the time of a request goes",
        subtitle=(
            f"{counted(bars, 'setting')} on {links} · {subject(run.rows)}\n"
            "median end-to-end latency, divided by the stages' mean shares; whisker: 95 % bootstrap interval; each panel has its "
            "own time scale"
        ),
        footnotes=[
            "Beside each bar: median end-to-end latency, and mean payload. "
            "First token: from the cache rebuilt (or the text received) to the first token at the edge. "
            "In the order of their latencies over all panels"
            + (f"; {counted(left_out, 'slower setting')} left out." if left_out else "."),
            *overlapping(run.rows),
            *caveats(run),
        ],
        rows=math.ceil(len(panels) / columns),
        columns=columns,
        panel=0.1 + 0.205 * bars,
        legend=legend_height([LOOKS[stage][2] for stage in stages], 4),
        left=0.2 + 0.072 * max(map(len, short(order).values())),
        between=0.22,
    )
    figure, axes = frame.figure()
    fill(axes, columns, panels, partial(draw_panel, "e2e_s", stages, order, payloads), "time (s)")
    for ax in axes:
        spec = ax.get_subplotspec()
        ax.tick_params(labelleft=spec is None or spec.is_first_col())
    bottom_legend(figure, frame, [patch(stage) for stage in stages], 4)
    return figure


def by_latency(rows: pd.DataFrame) -> list[str]:
    """The settings of labelled rows, the fastest first: by the mean, over the panels that have it, of the logarithm of the median
    latency over the panel's fastest. One that failed most of the time somewhere comes last.
    """
    times = rows["e2e_s"].mask(rows["failed"].astype(bool), math.inf).fillna(math.inf)
    medians = times.groupby([rows["setting"], rows["panel"]]).median().unstack()
    behind = pd.DataFrame(np.log(medians / medians.min())).fillna(math.inf).where(medians.notna())
    return [str(name) for name in behind.mean(axis=1).sort_values(kind="stable").index]


def patch(stage: str) -> Patch:
    """What stands for a stage in a legend."""
    color, hatch, label = LOOKS[stage]
    return Patch(facecolor=color, hatch=hatch, edgecolor=INK, linewidth=0.5, label=label)


def draw_panel(
    whole: str,
    stages: list[str],
    names: list[str],
    beside: Beside,
    ax: Axes,
    panel: tuple[str, pd.DataFrame],
    room: float = 1.3,
) -> None:
    """One profile's bars of the column `whole`; every panel has every setting's place, so that rows of bars line up across
    panels. `room`: inches for a bar's text.
    """
    name, rows = panel
    panel_title(ax, name, conditions(rows))
    ends = _draw_bars(ax, rows, whole, stages, names, beside(rows))
    ax.set_yticks(range(len(names)), list(short(names).values()))
    ax.set_ylim(len(names) - 0.4, -0.6)
    width = ax.get_window_extent().width / ax.figure.dpi
    ax.set_xlim(0, (max(ends) or 1.0) * width / max(0.3 * width, width - room))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def payloads(rows: pd.DataFrame) -> dict[str, str]:
    """Each setting's mean payload."""
    means = settings.finished(rows).groupby("setting")["payload_bytes"].mean()
    return {str(name): megabytes(float(size)) for name, size in means.items() if size > 0}


def _draw_bars(
    ax: Axes, rows: pd.DataFrame, column: str, stages: list[str], names: list[str], beside: dict[str, str]
) -> list[float]:
    """A bar for each setting with its interval and its text; returns where bars and intervals end."""
    done = settings.finished(rows)
    shares = done[stages].div(done[column], axis=0).groupby(done["setting"]).mean().reindex(names)
    shares = shares.div(shares.sum(axis=1), axis=0)
    times = rows[column].mask(rows["failed"].astype(bool), math.inf)
    whole = {
        str(k): stats.median(times[own.index], settings.clusters(own)) for k, own in rows.groupby("setting")
    }
    failed = {str(k): int(own["failed"].sum()) for k, own in rows.groupby("setting")}
    tried = rows.groupby("setting").size()
    total = np.array(
        [whole[n].value if n in whole and math.isfinite(whole[n].value) else np.nan for n in names]
    )
    places, start = list(range(len(names))), np.zeros(len(names))
    for stage in stages:
        color, hatch, _ = LOOKS[stage]
        length = np.nan_to_num(shares[stage].to_numpy() * total)
        ax.barh(
            places, length, left=start, height=0.74, color=color, hatch=hatch, edgecolor=INK, linewidth=0.4
        )
        start = start + length
    ends = [float(start.max())]
    for place, label in enumerate(names):
        if label not in whole:
            continue  # not run on this profile
        note = f"failed {failed[label]} of {tried[label]}" if failed[label] else ""
        end, median = float(start[place]), whole[label]
        if math.isfinite(median.low) and math.isfinite(median.high):
            ax.plot([median.low, median.high], [place, place], color=INK, lw=1.0, zorder=4)
            ends.append(median.high)
            end = max(end, median.high)
        parts = [_seconds(median.value)] if math.isfinite(median.value) else []
        parts += [beside[label]] if beside.get(label) else []
        text = " · ".join([*parts, *([note] if note else [])])
        look: dict[str, Any] = {
            "va": "center",
            "fontsize": legible(7.6),
            "color": VERMILLION if note else INK,
        }
        ax.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", **look)
    return ends


def overlapping(rows: pd.DataFrame) -> list[str]:
    """What is to be known of bars of stages that overlap, a sentence; empty where none do."""
    if not (rows["overlap_s"] > 1e-3 * rows["e2e_s"]).any():
        return []
    return [
        "Where stages overlap, each instant is billed to the latest of the pipeline: a bar shows of each stage what no later "
        "one hid."
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
