"""What bytes ÷ bandwidth says against what was measured: how wrong it is by size and link, and which setting it makes win."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed.analysis import naive
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.axes import limit_seconds, round_values, ticks
from testbed.analysis.figures.panels import DASHES
from testbed.analysis.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Frame,
    Mark,
    bottom_legend,
    legend_columns,
    legible,
    panel_title,
)
from testbed.analysis.naive import Choice, Error
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.experiment.row import SENDING

_COLORS, _SHAPES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK), "osD^vpPh"


def draw(run: Run) -> Figure:
    """Above: measured over formula against the payload, a line a link. Below: on each link the formula's winner beside the
    measured one.
    """
    errors = [e for e in naive.errors(run) if math.isfinite(e.ratio.value)]
    if not errors:
        raise NotInThisRun(
            f"{run.path}: nothing crossed a link with a rate, so no formula says how long it takes"
        )
    links = list(dict.fromkeys(e.panel for e in errors))
    choices = naive.choices(run)
    names = short(links, 46)
    columns = legend_columns(names.values(), 3)
    frame = Frame(
        title="Bytes ÷ bandwidth against what it took to send them",
        subtitle=f"{counted(len(links), 'emulated link')} · {subject(run.rows)}\n{_finding(choices)}",
        footnotes=[
            "Formula: payload over the link's (mean) rate. Measured: handshake and the time at work on the transmission; "
            "medians of the examples' ratios, bars: 95 % intervals. Below: latency with the formula in place of what the link "
            "took, among the settings that keep 95 % of the full cache's quality by the estimate"
            + ("" if all(c.held for c in choices) else " (all settings where no quality is known)")
            + ".",
            *([f"No rate, so no formula: {', '.join(without)}."] if (without := naive.left_out(run)) else []),
            *caveats(run),
        ],
        rows=2 if choices else 1,
        columns=1,
        panel=max(2.3, 0.44 * len(choices)),
        legend=0.2 * math.ceil(len(links) / columns) + 0.14,
        left=0.75
        if not choices
        else 0.3 + 0.062 * max(map(len, short((c.panel for c in choices), 26).values())),
        above=0.5,
        below=0.5,
    )
    figure, axes = frame.figure()
    _draw_errors(axes[0], errors, links)
    if choices:
        _draw_choices(axes[1], choices)
    handles = [_look(n).handle(names[link]) for n, link in enumerate(links)]
    bottom_legend(figure, frame, handles, columns)
    return figure


def _finding(choices: list[Choice]) -> str:
    wrong = [choice for choice in choices if choice.named != choice.measured]
    if not choices:
        return "fewer than two settings hold the quality on any link: there is nothing to choose"
    n = sum(choice.n for choice in choices)
    apart = f"in {sum(choice.apart for choice in choices)} of {n} examples on links it names another setting than was fastest"
    if not wrong:
        return f"the formula names the fastest setting on {len(choices)} of {len(choices)} links; {apart}"
    worst = max(wrong, key=lambda choice: choice.slower.value)
    most = f"which takes up to {worst.slower.text()} times as long"
    return f"the formula names another fastest setting on {len(wrong)} of {counted(len(choices), 'link')}, {most}; {apart}"


def _look(number: int) -> Mark:
    return Mark(_SHAPES[number % len(_SHAPES)], _COLORS[number % len(_COLORS)], size=6)


def _draw_errors(ax: Axes, errors: list[Error], links: list[str]) -> None:
    texts = [e.ratio.value for e in errors if e.placement not in SENDING]
    caches = [e for e in errors if e.placement in SENDING]
    left = (
        f"; without text, of which it is {min(texts):.3g} to {max(texts):.3g}: round trips"
        if caches and texts
        else ""
    )
    panel_title(ax, "how wrong it is", f"each mark: a setting{left}")
    errors = caches or errors
    for number, link in enumerate(links):
        own = sorted((e for e in errors if e.panel == link), key=lambda e: e.payload_bytes)
        mark = _look(number)
        xs, ys = [e.payload_bytes / 1e6 for e in own], [e.ratio.value for e in own]
        ax.plot(xs, ys, color=mark.color, lw=0.9, ls=DASHES[number % len(DASHES)], zorder=2)
        ax.plot(xs, ys, zorder=4, **mark.options())
        for x, each in zip(xs, own, strict=True):
            if math.isfinite(each.ratio.low) and math.isfinite(each.ratio.high):
                ax.plot(
                    [x, x], [each.ratio.low, each.ratio.high], color=mark.color, lw=1.0, alpha=0.6, zorder=3
                )
    ax.axhline(1.0, color=INK, lw=0.9, ls=(0, (5, 3)), zorder=1)
    sizes = [e.payload_bytes / 1e6 for e in errors]
    ends = [
        e for each in errors for e in (each.ratio.value, each.ratio.low, each.ratio.high) if math.isfinite(e)
    ]
    ax.set_xscale("log")
    ax.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
    limit_seconds(ax, [*ends, 1.0], "y")
    places = round_values(*ax.get_xlim())
    ticks(ax.xaxis, places if len(places) > 1 else {float(f"{size:.2g}") for size in sizes})
    ax.set_xlabel("payload (MB)")
    ax.set_ylabel("measured ÷ formula")


def _draw_choices(ax: Axes, choices: list[Choice]) -> None:
    """A line a link: what is fastest, what the formula promises of its choice, and what that takes."""
    panel_title(
        ax,
        "which setting wins",
        "dot: fastest as measured; arrow: from what the formula promises to what its choice takes",
    )
    limit_seconds(ax, [e for c in choices for e in (c.fastest_s, c.promised_s, c.takes_s)])
    names, wrapped = short((name for c in choices for name in (c.measured, c.named)), 40), False
    for row, choice in enumerate(choices):
        wrong = choice.named != choice.measured
        color = VERMILLION if wrong else GREY
        arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (choice.takes_s, row), (choice.promised_s, row), arrowprops=arrow, zorder=3)
        ax.plot(choice.fastest_s, row, marker="o", color=INK, markersize=6, zorder=4)
        said = f"{names[choice.measured]}: {choice.fastest_s:.2f} s; the formula: "
        if wrong:
            said += f"{names[choice.named]}, {choice.promised_s:.2f} s, which takes ×{choice.slower.text()}"
        else:
            said += f"the same, {choice.promised_s:.2f} s"
        said += f"; apart in {choice.apart} of {choice.n} examples"
        width = ax.get_window_extent().width / ax.figure.dpi * 72
        if len(said) * 0.52 * legible(0) > width:
            wrapped = True
            said = said.replace("; ", ";\n")
        size = min(7.2, width / (0.52 * max(map(len, said.splitlines()))))
        at: dict[str, Any] = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        ax.annotate(
            said,
            (0, row),
            (4, 6),
            fontsize=legible(size),
            color=VERMILLION if wrong else INK,
            va="bottom",
            **at,
        )
    links = short((choice.panel for choice in choices), 26)
    ax.set_yticks(range(len(choices)), [links[choice.panel] for choice in choices], fontsize=legible(7.6))
    ax.set_ylim(len(choices) - 0.6, -1.05 if wrapped else -0.85)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("latency (s)")
