"""A load as time goes by: each client's requests, and how many wait where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from testbed.analysis import loads
from testbed.analysis.describe import caveats, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Frame,
    bottom_legend,
)
from testbed.analysis.loads import Served
from testbed.analysis.run import Run

#: Of the load that is drawn, the seconds that are: more are a blur.
MOST_S = 60.0
#: Clients that are drawn, the first by name.
MOST_CLIENTS = 16
#: What a request does, and by which stages, in their order.
_PARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("waits for its edge", GREY, ("edge_queue_s",)),
    ("edge computes", SKY, ("prefill_s", "select_s", "encode_s")),
    ("waits for its link", ORANGE, ("link_queue_s",)),
    ("crosses the link", BLUE, ("connect_s", "transmit_s")),
    ("waits in the cloud", VERMILLION, ("queue_s",)),
    ("cloud computes", GREEN, ("decode_s", "first_token_s", "generate_s")),
)
#: By what bars and lines of each are told apart without colours: what computes is plain, what waits is hatched and dashed.
_HATCHES = ("xxxxxx", "", "//////", "", "......", "")
_EDGE = "#FFFFFFB0"
_DASHES: tuple[Any, ...] = ((0, (1, 1)), "-", (0, (4, 1.5)), "-", "-", "-")


def draw(run: Run) -> Figure:
    """The load with most requests at once (another with ``--where 'cell == "…"'``): clients above, how many wait below."""
    every = loads.served(run)
    if not every:
        raise NotInThisRun(
            f"{run.path}: nothing was asked under a load; write one, such as load: closed(clients=8)"
        )
    shown = max(every, key=_busy)
    rows = _timed(run, shown)
    clients = sorted(rows["client"].unique(), key=lambda name: (len(name), name))
    begins, ends = _stretch(rows)
    rows = rows[(rows["arrived_at"] < ends) & ~(rows["arrived_at"] + rows["e2e_s"] < begins)]
    left_out = f" · the first {MOST_CLIENTS} of {len(clients)} clients" if len(clients) > MOST_CLIENTS else ""
    over = _handovers(run, shown)
    of_clients = 0.25 + 0.17 * min(len(clients), MOST_CLIENTS)
    frame = Frame(
        title="A load as time goes by",
        subtitle=(
            f"{shown.setting} · {shown.load} · {shown.serving} · {shown.panel} · {subject(shown.rows)}\n"
            f"{shown.offered:.2f} requests a second asked, {shown.carried.value:.2f} carried · cell {shown.cell}{left_out}"
        ),
        footnotes=[
            "Above: a client's requests from when they come up to the last token, in as many rows as it has under way at once; "
            "a cross: refused, or failed. Below: "
            "how many requests of all clients wait where. Grey: the warm-up, which nothing counts."
            + (
                " Purple: a handover, from when its edge is on no link until it is on the next."
                if over
                else ""
            ),
            *caveats(run),
        ],
        rows=2,
        columns=1,
        panel=max(1.6, of_clients),
        legend=0.54,
        left=0.75,
        above=0.3,
    )
    figure, (upper, lower) = frame.figure()
    _draw_clients(upper, rows, clients[:MOST_CLIENTS])
    _draw_queues(lower, rows, begins, ends)
    for ax in (upper, lower):
        for handed in over:
            ax.axvspan(
                float(handed["begun_s"]), float(handed["ended_s"]), color=PURPLE, alpha=0.35, zorder=0.5
            )
        early = rows.loc[rows["warmup"].astype(bool), "arrived_at"]
        if len(early) and float(early.max()) > begins:
            ax.axvspan(begins, float(early.max()), color="#DDDDDD", alpha=0.5, lw=0, zorder=0)
        ax.set_xlim(begins, ends)
    lower.set_xlabel("time since the load's start (s)")
    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor=_EDGE, linewidth=0, label=name)
        for (name, color, _), hatch in zip(_PARTS, _HATCHES, strict=True)
    ]
    bottom_legend(figure, frame, handles, 3)
    return figure


def _busy(served: Served) -> float:
    """Requests under way on average (J. D. C. Little, 1961); what failed counts as none."""
    return float(served.rows["e2e_s"].fillna(0.0).sum())


def _handovers(run: Run, shown: Served) -> list[dict[str, Any]]:
    """Those of the load that is drawn."""
    return [
        each
        for own in run.ended_loads
        if own.get("cell") == shown.cell and own.get("repeat") == shown.rows["repeat"].min()
        for each in own.get("handovers", ())
    ]


def _timed(run: Run, shown: Served) -> pd.DataFrame:
    """Its requests in order, those of the warm-up too; of several repeats the first."""
    early = run.warming[run.warming["cell"] == shown.cell] if len(run.warming) else run.warming
    early = early.assign(failed=early["error"] != "") if len(early) else early
    rows = pd.concat([part for part in (early, shown.rows) if len(part)])
    rows = rows[(rows["repeat"] == rows["repeat"].min()) & rows["arrived_at"].notna()]
    return rows.sort_values("arrived_at")


def _stretch(rows: pd.DataFrame) -> tuple[float, float]:
    """From when to when is drawn: all of it, or `MOST_S` that begin half a stretch before what counts."""
    last = float((rows["arrived_at"] + rows["e2e_s"].fillna(0.0)).max())
    if last <= MOST_S:
        return 0.0, last
    counted = rows.loc[~rows["warmup"].astype(bool), "arrived_at"]
    begins = max(0.0, min(float(counted.min()) - MOST_S / 4, last - MOST_S))
    return begins, begins + MOST_S


def _draw_clients(ax: Axes, rows: pd.DataFrame, clients: list[str]) -> None:
    for place, client in enumerate(clients):
        own = rows[rows["client"] == client]
        lanes = _lanes(own)
        height = 0.84 / (max(lanes, default=0) + 1)
        for (_, row), lane in zip(own.iterrows(), lanes, strict=True):
            at, y = float(row["arrived_at"]), place - 0.42 + height * (lane + 0.5)
            if row["failed"]:
                ax.plot(at, y, marker="x", color=INK, markersize=4)
                continue
            for (_, color, stages), hatch in zip(_PARTS, _HATCHES, strict=True):
                took = float(np.nansum([row[stage] for stage in stages]))
                ax.barh(
                    y, took, left=at, height=height * 0.9, color=color, hatch=hatch, edgecolor=_EDGE, lw=0
                )
                at += took
        if place:
            ax.axhline(place - 0.5, color="#DDDDDD", lw=0.5, zorder=1)
    ax.set_yticks(range(len(clients)), clients)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(clients) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def _lanes(rows: pd.DataFrame) -> list[int]:
    """A place for each request, so that those under way at once have places of their own."""
    free: list[float] = []
    places = []
    for at, took in zip(rows["arrived_at"], rows["e2e_s"].fillna(0.0), strict=True):
        place = next((i for i, until in enumerate(free) if until <= at), len(free))
        if place == len(free):
            free.append(0.0)
        free[place] = float(at + took)
        places.append(place)
    return places


def waiting(
    rows: pd.DataFrame, stages: tuple[str, ...], behind: tuple[str, ...]
) -> tuple[list[float], list[int]]:
    """When the number of requests in these stages changes, and to what; `behind`: the stages before them."""
    done = rows[~rows["failed"].astype(bool)]
    start = done["arrived_at"] + done[list(behind)].fillna(0.0).sum(axis=1)
    end = start + done[list(stages)].fillna(0.0).sum(axis=1)
    # Who goes at the same moment as another comes goes first; who did not wait is not seen.
    moved = end > start
    events = sorted([*((float(t), 1) for t in start[moved]), *((float(t), -1) for t in end[moved])])
    times, counts, now = [], [], 0
    for at, step in events:
        now += step
        times.append(at)
        counts.append(now)
    return times, counts


def _draw_queues(ax: Axes, rows: pd.DataFrame, begins: float, ends: float) -> None:
    behind: tuple[str, ...] = ()
    most = 1
    look: dict[str, Any] = {"where": "post", "lw": 1.2}
    for (name, color, stages), dashes in zip(_PARTS, _DASHES, strict=True):
        if "wait" in name:
            times, counts = waiting(rows, stages, behind)
            ax.step(
                [begins, *times, ends],
                [0, *counts, counts[-1] if counts else 0],
                color=color,
                ls=dashes,
                **look,
            )
            most = max([most, *(n for t, n in zip(times, counts, strict=True) if begins <= t <= ends)])
        behind += stages
    ax.set_ylim(-0.04 * most, most * 1.06)
    ax.set_ylabel("requests that wait")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
