"""Links that change: what was delivered, and how long packets took, along a stretch of a trace beside what the trace says."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.fidelity import WAYS, measured_links, notes, spaced, subject
from testbed.analysis.figures.style import BLUE, VERMILLION, Frame, bottom_legend, panel_title
from testbed.analysis.run import Run
from testbed.net.calibration.outcome import Curve, Outcome, Track

_ASKED = "#CFCFCF"
_LOOK = {"up": (BLUE, "-"), "down": (VERMILLION, "--")}


def draw(run: Run) -> Figure:
    """A panel for each trace and way: bytes per tenth of a second, asked and delivered; delays and losses in the same way."""
    links = [m for m in measured_links(run) if m.curves or m.tracks]
    if not links:
        raise NotInThisRun(f"{run.path}: none of its links was measured along a trace")
    drawn: list[tuple[Outcome, Curve | Track]] = []
    for link in links:
        drawn += [(link, curve) for curve in link.curves] + [(link, track) for track in link.tracks]
    frame = Frame(
        title=_followed(drawn),
        subtitle=f"{_worst(drawn)}\n{subject(links)}",
        footnotes=[
            "Bytes: of the network layer in equal parts of one stretch of the trace, while a flow saturates the link; no "
            "correlation is given where the trace is as good as constant. Delay and loss: means of the probes sent in each part; "
            "those that had to queue are left out.",
            *notes(run),
        ],
        rows=math.ceil(len(drawn) / 2),
        columns=2 if len(drawn) > 1 else 1,
        panel=1.35,
        legend=0.34,
        left=0.72,
        between=0.7,
        below=0.42,
    )
    figure, axes = frame.figure()
    for ax, (link, line) in zip(axes, drawn, strict=False):
        if isinstance(line, Curve):
            _curve(ax, link, line)
        else:
            _track(ax, link, line)
    for ax in axes[len(drawn) :]:
        ax.remove()
    handles = [
        Patch(color=_ASKED, label="asked"),
        Line2D([], [], color=BLUE, lw=1.3, label="measured, edge to cloud"),
        Line2D([], [], color=VERMILLION, lw=1.3, ls="--", label="measured, cloud to edge"),
    ]
    bottom_legend(figure, frame, handles, 3)
    return figure


def _curve(ax: Axes, link: Outcome, curve: Curve) -> None:
    shape = curve.correlation
    fit = f"correlation {shape:.4f}" if shape is not None else "constant: no correlation"
    name = f"{WAYS[curve.way][2]}: {spaced(link.label)}"
    panel_title(ax, name, f"{fit} · total {_total_error(curve):+.2f} %")
    _steps(ax, curve, np.array(curve.asked_bytes) / 1e3, np.array(curve.delivered_bytes) / 1e3)
    ax.set_ylabel(f"kB per {curve.bin_s * 1e3:g} ms")


def _track(ax: Axes, link: Outcome, track: Track) -> None:
    check = link.check(track.way, f"{track.what} trace")
    scale, label = (1e3, "one-way delay (ms)") if track.what == "delay" else (100.0, "lost probes (%)")
    note = f"n = {check.n if check else None}"
    if check is not None and (measured := check.measured) is not None and (asked := check.asked) is not None:
        note = (
            f"median error {1e3 * measured:.2f} ms · {note}"
            if track.what == "delay"
            else f"in all {100 * measured:.2f} %, asked {100 * asked:.2f} % · {note}"
        )
    panel_title(ax, f"{WAYS[track.way][2]}: {spaced(link.label)}", note)
    wanted, seen = (
        scale * np.array([math.nan if v is None else v for v in values], dtype=float)
        for values in (track.asked, track.measured)
    )
    _steps(ax, track, wanted, seen)
    ax.set_ylabel(label)


def _steps(ax: Axes, line: Curve | Track, asked: np.ndarray, measured: np.ndarray) -> None:
    color, style = _LOOK[line.way]
    edges = line.begin_s + line.bin_s * np.arange(len(asked) + 1)
    ax.stairs(asked, edges, fill=True, color=_ASKED, zorder=1)
    ax.stairs(measured, edges, color=color, ls=style, lw=1.3, zorder=3, baseline=None)
    top = max([v for v in (*asked, *measured) if not math.isnan(v)], default=0.0)
    ax.set_ylim(0, 1.08 * top or 1.0)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("time in the trace (s)")


def _total_error(curve: Curve) -> float:
    """Percent."""
    asked, delivered = curve.totals
    return 100 * (delivered - asked) / asked if asked else 0.0


def _worst(drawn: list[tuple[Outcome, Curve | Track]]) -> str:
    curves = [line for _, line in drawn if isinstance(line, Curve)]
    phrases = []
    if shapes := [shape for curve in curves if (shape := curve.correlation) is not None]:
        phrases.append(f"least correlation {min(shapes):.4f}")
    if curves:
        off = max((_total_error(curve) for curve in curves), key=abs)
        phrases.append(f"largest error of the total {off:+.2f} %")
    errors = [m.check(line.way, "delay trace") for m, line in drawn]
    if known := [check.measured for check in errors if check is not None and check.measured is not None]:
        phrases.append(f"of a delay (median) {1e3 * max(known):.2f} ms")
    parts = sum(len(line.asked_bytes if isinstance(line, Curve) else line.asked) for _, line in drawn)
    return f"{', '.join(phrases)} · n = {parts} parts of {len(drawn)} stretches"


def _followed(drawn: list[tuple[Outcome, Curve | Track]]) -> str:
    """Whether all of what each was judged by was in tolerance."""
    kinds = {
        "bytes": ("rate shape", "rate trace"),
        "delay": ("delay trace",),
        "loss": ("loss trace", "loss shape"),
    }
    off = [
        line
        for link, line in drawn
        if any(
            (check := link.check(line.way, what)) is not None and check.ok is False
            for what in kinds["bytes" if isinstance(line, Curve) else line.what]
        )
    ]
    if not off:
        return "The links followed their traces, within tolerance"
    return f"{len(off)} of {len(drawn)} stretches were out of tolerance of their trace"
