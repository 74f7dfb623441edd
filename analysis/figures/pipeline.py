"""Requests as pipelines: what each side and the link did when, chunk by chunk, over what the link could carry then."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from testbed.analysis import settings
from testbed.analysis.describe import caveats, conditions, megabytes, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.panels import chunk_number, rate_above
from testbed.analysis.figures.stages import LOOKS, patch
from testbed.analysis.figures.style import (
    GREY,
    INK,
    ORANGE,
    Frame,
    bottom_legend,
    legend_height,
    panel_title,
)
from testbed.analysis.link_rates import Floats, rates
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.analysis.spans import PLACES, STAGE_NAMES, lanes, of_stages, spans

MOST = 8  #: settings below each other
#: Of the levels of chunks, one after the other; what has none looks as in `LOOKS`.
_HATCHES = ("", "xxxx", "....", "||||", "++", "oo", "**")


@dataclass(frozen=True)
class Request:
    """One trial: its row, its spans, and its link's rate where that changes."""

    row: pd.Series[Any]
    spans: pd.DataFrame
    rate: tuple[Floats, Floats] | None


def draw(run: Run) -> Figure:
    """One request for each setting, the one with the median latency, on one link: one that changes where there is one, else the
    one on which most is hidden.
    """
    table = spans(run)
    if table.empty:
        raise NotInThisRun(f"{run.path}: has no spans, which say when each stage was at work on each chunk")
    requests = _requests(run, table)
    levels = _levels(requests)
    rated = any(request.rate is not None for request in requests)
    used = [stage for stage in STAGE_NAMES if any(_shows(request, stage) for request in requests)]
    first = requests[0].row
    rows = pd.DataFrame([request.row for request in requests])
    plain = any(((r.spans["stage"] == "transmit") & (r.spans["level"] == "")).any() for r in requests)
    handles = [patch(f"{stage}_s") for stage in used if plain or stage != "transmit"]
    handles += [
        Patch(facecolor=ORANGE, hatch=hatch, edgecolor=INK, linewidth=0.5, label=f"transmit: {level}")
        for level, hatch in levels.items()
    ]
    frame = Frame(
        title="Requests as pipelines: what was at work when",
        subtitle=(
            f"{subject(run.rows[run.rows['profile'] == first['profile']])}\n"
            f"{str(first['profile']).replace(',', ', ')}: {conditions(rows)}\n"
            "of each setting the request with the median latency; triangle: first token; numbers: chunks"
        ),
        footnotes=[
            "Transmission of a chunk: from its first byte handed over to its last byte in the cloud, so chunks under way "
            "together lie above each other." + (" Rate: what the link's trace has then." if rated else ""),
            *caveats(run),
        ],
        rows=len(requests),
        columns=1,
        panel=1.1 if rated else 0.86,
        legend=legend_height([str(handle.get_label()) for handle in handles], 4),
        left=0.7,
        above=0.4,
        below=0.14,
    )
    figure, axes = frame.figure()
    longest = max(float(request.spans["end_s"].max()) for request in requests)
    names = short((str(request.row["setting"]) for request in requests), 60)
    for ax, request in zip(axes, requests, strict=True):
        _draw_request(ax, request, names[str(request.row["setting"])], levels, longest, rated)
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[-1].set_xlabel("time since the request (s)")
    bottom_legend(figure, frame, handles, 4)
    return figure


def _requests(run: Run, table: pd.DataFrame) -> list[Request]:
    """The settings' median requests on one link; at most `MOST`, of which those with most chunks stay."""
    rows = settings.labelled(run.rows)
    rows = rows[rows["trial"].isin(set(table["trial"])) | (rows["chunks"].fillna(0) <= 1)]
    changing = rows[rows["trace_s"].notna()]
    hidden = (rows["overlap_s"] / rows["e2e_s"]).groupby(rows["panel"], sort=False).mean()
    panel = changing["panel"].iloc[0] if len(changing) else hidden.fillna(0.0).idxmax()
    own = rows[(rows["panel"] == panel) & (rows["e2e_s"] > 0)]
    chosen = [_middle(of) for _, of in own.groupby("setting", sort=False)]
    kept = sorted(range(len(chosen)), key=lambda i: -float(chosen[i]["chunks"]))[:MOST]
    requests = []
    for row in (chosen[i] for i in sorted(kept)):
        mine = table[table["trial"] == row["trial"]]
        mine = mine if len(mine) else of_stages(row)
        begin = float(row["trace_s"])
        length = float(mine["end_s"].max()) if len(mine) else 0.0
        rate = rates(run, str(row["profile"]), begin, length) if math.isfinite(begin) else None
        requests.append(Request(row, mine, rate))
    return [request for request in requests if len(request.spans)]


def _middle(rows: pd.DataFrame) -> pd.Series[Any]:
    """The row whose latency is nearest to the median."""
    away = (rows["e2e_s"] - rows["e2e_s"].median()).abs()
    return rows.iloc[int(np.argmin(away.to_numpy()))]


def _shows(request: Request, stage: str) -> bool:
    """Whether a stage takes time enough to be seen."""
    own = request.spans[request.spans["stage"] == stage]
    return bool((own["end_s"] - own["start_s"] > 2e-3 * request.spans["end_s"].max()).any())


def _levels(requests: Iterable[Request]) -> dict[str, str]:
    """A hatch for each level that a chunk crossed at, in the order in which they are met."""
    sent = [r.spans.loc[r.spans["stage"] == "transmit", "level"] for r in requests]
    met = dict.fromkeys(level for levels in sent for level in levels if level)
    return {level: _HATCHES[i % len(_HATCHES)] for i, level in enumerate(met)}


def _draw_request(
    ax: Axes, request: Request, name: str, levels: dict[str, str], longest: float, rated: bool
) -> None:
    row, table = request.row, request.spans
    payload = float(row["payload_bytes"])
    parts = [f"{row['e2e_s']:.2f} s", f"{megabytes(payload)} sent" if payload else "nothing sent"]
    parts += [f"hid {row['overlap_s']:.2f} s"] if row["overlap_s"] >= 0.005 else []
    parts += [f"score {row['score']:.2f}"] if row["score"] == row["score"] else []
    if math.isfinite(row["deadline_s"]):
        parts.append(f"deadline {row['deadline_s']:g} s {'met' if row['met'] else 'missed'}")
        ax.axvline(row["deadline_s"], color=INK, lw=1.0, ls=(0, (4, 2)), zorder=6)
    panel_title(ax, name, " · ".join(parts))
    of = lanes(table)
    for number in range(len(PLACES)):
        _draw_lane(ax, number, table[[lane == number for lane in of]], levels, longest)
    top = -1.55 if rated else -0.6
    if request.rate is not None:
        rate_above(ax, request.rate)
    first = table.loc[table["stage"] == "first_token", "end_s"]
    if len(first):
        ax.plot(first.max(), top, marker="v", color=INK, markersize=5, clip_on=False, zorder=7)
    for border in (-0.5, 0.5, 1.5):
        ax.axhline(border, color=GREY, lw=0.3)
    ax.set_yticks([*([-1] if rated else []), 0, 1, 2], [*(["rate"] if rated else []), *PLACES])
    ax.set_ylim(2.5, top)
    ax.set_xlim(0, longest * 1.02)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(8))
    ax.xaxis.set_major_formatter("{x:g}")


def _draw_lane(ax: Axes, lane: int, table: pd.DataFrame, levels: dict[str, str], longest: float) -> None:
    """The lane's bars; what is at work together lies above each other."""
    places = _apart(table)
    height = 0.8 / (1 + max(places, default=0))
    several = table["chunk"].nunique() > 1
    for place, (_, span) in zip(places, table.iterrows(), strict=True):
        color, hatch, _ = LOOKS[f"{span['stage']}_s"]
        hatch = levels.get(str(span["level"]), hatch) if span["stage"] == "transmit" else hatch
        length = float(span["end_s"] - span["start_s"])
        y = lane - 0.4 + height * (place + 0.5)
        look: dict[str, Any] = {
            "color": color,
            "hatch": hatch,
            "edgecolor": INK,
            "linewidth": 0.4,
            "zorder": 3,
        }
        ax.barh(y, length, left=span["start_s"], height=0.94 * height, **look)
        if several and span["stage"] == "transmit" and length > 0.018 * longest and height > 0.15:
            chunk_number(ax, float(span["start_s"]) + length / 2, y, span["chunk"])


def _apart(table: pd.DataFrame) -> list[int]:
    """Into which row of its lane each span goes, so that none covers another."""
    ends: list[float] = []
    places = []
    for start, end in zip(table["start_s"], table["end_s"], strict=True):
        place = next((i for i, last in enumerate(ends) if last <= start + 1e-6), len(ends))
        ends[place : place + 1] = [float(end)]
        places.append(place)
    return places
