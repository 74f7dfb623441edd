"""One request under each sender that chooses levels: the link's rate, each chunk's level, what was under way, the deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from testbed.analysis import settings
from testbed.analysis.describe import caveats, conditions, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.panels import chunk_number
from testbed.analysis.figures.style import (
    BLUE,
    INK,
    ORANGE,
    VERMILLION,
    Frame,
    bottom_legend,
    legible,
    panel_title,
)
from testbed.analysis.levels import ladder
from testbed.analysis.link_rates import Floats, rates
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.analysis.spans import spans

MOST = 7  #: settings below each other
_RATE = "#BBD0E3"


@dataclass(frozen=True)
class Request:
    """One trial's row, the spans of its chunks on the link, and its ladder."""

    row: pd.Series[Any]
    sent: pd.DataFrame
    rungs: tuple[str, ...]


def draw(run: Run) -> Figure:
    """The same example for each setting that chooses levels, on one link: one that changes where there is one."""
    requests = _requests(run)
    rows = pd.DataFrame([request.row for request in requests])
    first = requests[0].row
    frame = Frame(
        title="Levels chosen chunk by chunk",
        subtitle=(
            f"{subject(run.rows[run.rows['profile'] == first['profile']])}\n"
            f"{str(first['profile']).replace(',', ', ')}: {conditions(rows)}\n"
            f"example {first['example']}: single requests, so without intervals; triangle: first token; numbers: chunks"
        ),
        footnotes=[
            "Bars: a chunk at its level, from its first byte handed over to its last byte in the cloud; the ladder's first level "
            "on top. Under way: bytes handed over and not arrived, as if each chunk's came evenly behind the last one's.",
            *caveats(run),
        ],
        rows=len(requests),
        columns=1,
        panel=1.15,
        legend=0.34,
        left=1.5,
        above=0.4,
        below=0.14,
    )
    figure, axes = frame.figure()
    longest = 1.02 * max(_ends(request) for request in requests)
    names = short((str(request.row["setting"]) for request in requests), 60)
    shown = set()  # of what the legend may name
    for ax, request in zip(axes, requests, strict=True):
        begin = float(request.row["trace_s"])
        rate = rates(run, str(first["profile"]), begin, longest) if math.isfinite(begin) else None
        shown |= {"rate"} if rate is not None else set()
        shown |= {"deadline"} if math.isfinite(request.row["deadline_s"]) else set()
        _draw_request(ax, request, names[str(request.row["setting"])], longest, rate)
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[-1].set_xlabel("time since the request (s)")
    rate_drawn = [Patch(color=_RATE, alpha=0.6, label="the link's rate")]
    due = [Line2D([], [], color=INK, lw=1.0, ls=(0, (4, 2)), label="deadline")]
    handles: list[Any] = [
        *(rate_drawn if "rate" in shown else []),
        Patch(facecolor=ORANGE, edgecolor=INK, linewidth=0.5, label="a chunk at its level"),
        Line2D([], [], color=BLUE, lw=1.2, label="bytes under way"),
        *(due if "deadline" in shown else []),
    ]
    bottom_legend(figure, frame, handles, 4)
    return figure


def _requests(run: Run) -> list[Request]:
    rows = settings.labelled(run.rows)
    rows = rows[rows["delivery"].map(lambda delivery: len(ladder(delivery)) > 0)]
    table = spans(run) if len(rows) else pd.DataFrame({"trial": []})
    rows = rows[rows["trial"].isin(set(table["trial"]))]
    if rows.empty:
        raise NotInThisRun(f"{run.path}: no setting of it chooses its chunks' levels, or none has spans")
    changing = rows[rows["trace_s"].notna()]
    rows = (changing if len(changing) else rows).copy()
    rows = rows[rows["panel"] == rows["panel"].iloc[0]]
    away = (rows["e2e_s"] / rows.groupby("setting")["e2e_s"].transform("median") - 1).abs()
    order = (
        rows.assign(away=away)
        .groupby(["task", "example"])
        .agg(n=("setting", "nunique"), away=("away", "mean"))
    )
    task, example = order[order["n"] == order["n"].max()]["away"].idxmin()
    own = rows[(rows["task"] == task) & (rows["example"] == example)].drop_duplicates("setting")
    requests = []
    for _, row in own.head(MOST).iterrows():
        sent = table[(table["trial"] == row["trial"]) & (table["stage"] == "transmit")]
        requests.append(Request(row, sent, ladder(str(row["delivery"]))))
    return requests


def _ends(request: Request) -> float:
    deadline = float(request.row["deadline_s"])
    return max(
        [
            float(request.row["ttft_s"]),
            *map(float, request.sent["end_s"]),
            *([deadline] if math.isfinite(deadline) else []),
        ]
    )


def _draw_request(
    ax: Axes, request: Request, name: str, longest: float, rate: tuple[Floats, Floats] | None
) -> None:
    row, rungs = request.row, request.rungs
    left_out = float(row["tokens_left_out"])
    parts = [f"first token {row['ttft_s']:.2f} s"]
    parts += [f"{left_out:.0f} tokens left out"] if left_out > 0 else []
    parts += [f"score {row['score']:.2f}"] if row["score"] == row["score"] else []
    if math.isfinite(row["deadline_s"]):
        ax.axvline(row["deadline_s"], color=INK, lw=1.0, ls=(0, (4, 2)), zorder=6)
        parts.append(f"deadline {'met' if row['met'] else 'missed'}")
    panel_title(ax, name, " · ".join(parts))
    bottom = len(rungs) - 0.5
    if rate is not None:
        edges, values = rate
        most = float(np.max(values)) or 1.0
        heights = bottom - (bottom + 0.5) * 0.94 * values / most
        ax.stairs(heights, edges, baseline=bottom, fill=True, color=_RATE, alpha=0.6, zorder=0.5)
        _note(ax, f"{most / 1e6:.3g} Mbit/s", "top", "#557799")
    for _, span in request.sent.iterrows():
        if span["level"] in rungs:
            length = float(span["end_s"] - span["start_s"])
            look: dict[str, Any] = {"color": ORANGE, "edgecolor": INK, "linewidth": 0.5, "zorder": 3}
            rung = rungs.index(span["level"])
            ax.barh(rung, length, left=span["start_s"], height=0.62, **look)
            if length > 0.02 * longest:
                chunk_number(ax, float(span["start_s"]) + length / 2, rung, span["chunk"])
    moments = np.linspace(0.0, longest, 600)
    under_way = _under_way(request.sent, moments)
    peak = float(np.max(under_way, initial=0.0))
    if peak > 0:
        ax.plot(moments, bottom - (bottom + 0.5) * 0.94 * under_way / peak, color=BLUE, lw=1.2, zorder=5)
        _note(ax, f"{peak / 1e6:.2g} MB", "bottom", BLUE)
    ax.set_yticks(range(len(rungs)), list(short(rungs, 20).values()), fontsize=legible(7))
    ax.set_ylim(bottom, -0.5)
    ax.set_xlim(0, longest)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(8))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.plot(row["ttft_s"], -0.5, marker="v", color=INK, markersize=5, clip_on=False, zorder=7)
    if math.isfinite(row["deadline_s"]) and not row["met"]:
        ax.axvspan(row["deadline_s"], longest, color=VERMILLION, alpha=0.07, lw=0, zorder=0.4)


def _note(ax: Axes, text: str, side: str, color: str) -> None:
    """What the top of a scale stands for, at the right."""
    at: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "ha": "right",
        "fontsize": legible(6.2),
    }
    ax.annotate(text, (1, 1), (-3, -3 if side == "top" else -12), va="top", color=color, zorder=7, **at)


def _under_way(sent: pd.DataFrame, moments: Floats) -> Floats:
    """Bytes of chunks that were handed over and had not arrived, as if each came evenly once those before it were there."""
    total, before = np.zeros_like(moments), 0.0
    for _, span in sent.sort_values("end_s", kind="stable").iterrows():
        start, end = float(span["start_s"]), float(span["end_s"])
        begins = max(start, min(before, end))
        share = np.clip((moments - begins) / max(end - begins, 1e-9), 0.0, 1.0)
        total += float(span["bytes"]) * np.where(moments >= start, 1.0 - share, 0.0)
        before = end
    return total
