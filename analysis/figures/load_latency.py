"""Loads: percentiles of the time to the first token, and what comes in time, against how much is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed import stats
from testbed.analysis import loads
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.axes import at_values, limit_seconds
from testbed.analysis.figures.panels import DASHES, curve
from testbed.analysis.figures.style import (
    GREY,
    Frame,
    Mark,
    bottom_legend,
    legend_columns,
    marks,
    panel_title,
)
from testbed.analysis.loads import Served
from testbed.analysis.names import short
from testbed.analysis.run import Run

_PERCENTILES = (0.5, 0.95, 0.99)
Curves = list[list[Served]]


def draw(run: Run) -> Figure:
    """A row of panels for each link, serving and family of loads: p50, p95 and p99 against the load."""
    groups = _groups(run)
    figure, axes, frame, looks = _figure(
        run,
        groups,
        "Time to the first token under load",
        "",
        "An interval of which the requests cannot bound an end is not drawn. A percentile that falls on a request that was "
        "refused, or failed, has no mark.",
        len(_PERCENTILES),
    )
    for row, (name, own) in enumerate(groups.items()):
        for column, q in enumerate(_PERCENTILES):
            ax = axes[row * len(_PERCENTILES) + column]
            _row_title(ax, name if column == 0 else "", f"p{q * 100:g}")
            ends = _draw(ax, own, looks, partial(_first_token, q))
            limit_seconds(ax, ends, "y")
            ax.set_xlabel(_asked(own))
            if column == 0:
                ax.set_ylabel("time to first token (s)")
    _legend(figure, frame, looks)
    return figure


def draw_goodput(run: Run) -> Figure:
    """A row for each link, serving and family: requests a second that have their first token in time, and the share that has."""
    groups = _groups(run)
    deadline = loads.deadline_of([each for own in groups.values() for one in own for each in one])
    figure, axes, frame, looks = _figure(
        run,
        groups,
        f"What comes within {deadline:g} s under load",
        f"first token within {deadline:g} s: a round time that every setting can meet while little is asked",
        "Dashed on the left: all that is asked in time. Dotted on the right: 95 %, of which the capacities are said: the largest "
        "load up to which it is held, straight between the loads measured, with the ends at which the intervals cross it.",
        2,
    )
    for row, (name, own) in enumerate(groups.items()):
        left, right = axes[2 * row], axes[2 * row + 1]
        _row_title(left, name, "requests a second")
        ends = _draw(left, own, looks, lambda each: each.goodput(deadline))
        if not own[0][0].closed:
            most = max(each.at for one in own for each in one)
            left.plot([0, most], [0, most], color=GREY, lw=0.8, ls=(0, (5, 3)), zorder=1)
        left.set_ylim(0, 1.12 * max(ends, default=1.0))
        left.set_ylabel("in time, requests/s")
        _draw(right, own, looks, lambda each: each.within(deadline))
        right.axhline(0.95, color=GREY, lw=0.9, ls=":", zorder=1)
        right.set_ylim(-0.03, 1.05)
        right.yaxis.set_major_formatter("{x:.0%}")
        right.set_ylabel("share in time")
        names = short(looks)
        held = [f"{names[one[0].setting]} {loads.capacity(one, deadline, 0.95).text()}" for one in own]
        panel_title(right, "", f"95 % held up to: {'  ·  '.join(held)}")
        for ax in (left, right):
            ax.set_xlabel(_asked(own))
    _legend(figure, frame, looks)
    return figure


def _first_token(q: float, each: Served) -> stats.Estimate:
    return each.first_token(q)


def _row_title(ax: Axes, name: str, below: str) -> None:
    """A row's name, which may reach over its other panels, and what this panel shows."""
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(name, (0, 1), (0, 18), fontsize=9.5, weight="bold", **look)
    ax.annotate(below, (0, 1), (0, 5), fontsize=8.5, color="#444444", **look)


def _groups(run: Run) -> dict[str, Curves]:
    every = loads.served(run)
    if not every:
        raise NotInThisRun(
            f"{run.path}: nothing was asked under a load; write one, such as load: closed(clients=8)"
        )
    found: dict[str, Curves] = {}
    for one in loads.curves(every):
        panel, _, serving, family = one[0].curve
        found.setdefault(" · ".join([panel, family, *([serving] if serving != "fifo" else [])]), []).append(
            one
        )
    return found


def _figure(
    run: Run, groups: dict[str, Curves], title: str, below: str, note: str, columns: int
) -> tuple[Figure, list[Axes], Frame, dict[str, Mark]]:
    every = [each for own in groups.values() for one in own for each in one]
    known = {each.setting: each.rows.iloc[0] for each in every}
    looks = marks(
        (name, str(row["placement"]), str(row["codec"]) if "+ " not in name else name)
        for name, row in known.items()
    )
    number = [len(each.rows) for each in every]
    frame = Frame(
        title=title,
        subtitle=(
            f"{counted(len(looks), 'setting')} · {subject(run.rows)} · {min(number):,} to {max(number):,} requests a load\n"
            f"bars: 95 % intervals by batch means{'; ' if below else ''}{below}"
        ),
        footnotes=[
            f"{note} Requests wait for each other, so they count as so many independent ones as would spread as the "
            f"{loads.dependent.BATCHES} stretches of a load do. Points are joined for the eye.",
            *caveats(run),
        ],
        rows=len(groups),
        columns=columns,
        panel=2.0,
        legend=0.2 * math.ceil(len(looks) / legend_columns(short(looks).values())) + 0.14,
        below=0.5,
    )
    figure, axes = frame.figure()
    return figure, axes, frame, looks


def _draw(
    ax: Axes, own: Curves, looks: dict[str, Mark], what: Callable[[Served], stats.Estimate]
) -> list[float]:
    """Each setting's curve; returns where values and intervals end."""
    ends: list[float] = []
    order = list(looks)
    for one in own:
        points = [(each.at, what(each)) for each in one]
        known = [(at, estimate) for at, estimate in points if math.isfinite(estimate.value)]
        number = order.index(one[0].setting)
        ends += curve(ax, number, looks[one[0].setting], 6.0, known)
    loaded = [each.at for one in own for each in one]
    if own[0][0].closed:
        at_values(ax, loaded, False)
    else:
        ax.set_xlim(0, 1.06 * max(loaded))
    return ends


def _asked(own: Curves) -> str:
    return "clients" if own[0][0].closed else "asked, requests/s"


def _legend(figure: Figure, frame: Frame, looks: dict[str, Mark]) -> None:
    names = short(looks)
    handles: Sequence[Any] = [mark.handle(names[name]) for name, mark in looks.items()]
    for number, handle in enumerate(handles):
        handle.set_linestyle(DASHES[number % len(DASHES)])
    bottom_legend(figure, frame, list(handles), legend_columns(names.values()))
