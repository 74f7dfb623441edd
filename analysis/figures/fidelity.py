"""Asked against measured: every link's rate, delay and loss as the run found them before its trials; jitter and bursts, too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from testbed.analysis.describe import counted, uncalibrated
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.style import (
    BLUE,
    INK,
    ORANGE,
    VERMILLION,
    Frame,
    Mark,
    bottom_legend,
    panel_title,
)
from testbed.analysis.run import Run
from testbed.net.calibration.outcome import Check, Outcome, outcomes

#: way -> its mark, where it stands beside the profile's middle, and its name
WAYS = {
    "up": (Mark("^", BLUE, size=6), -0.17, "edge to cloud"),
    "down": (Mark("v", ORANGE, "none", size=6), 0.17, "cloud to edge"),
}
_BAND = "#DDEFE6"
_ALWAYS = ("rate", "delay", "loss")
_EXTRA = (
    "Jitter: standard deviation of delays; line: 99 % interval under the law asked for. Bursts: packets lost in a row; line: "
    "99 % interval of their mean. Both are in tolerance where the line reaches the band.",
)
_ROW, _LEAST_PANEL = 0.36, 0.75  # inches
_NAME = 27  # characters of a profile's name


def _error(check: Check | None) -> tuple[float, float, float] | None:
    """Measured and its interval, as drawn: delay minus asked in ms, loss in %, else the error in %. None: not known."""
    if check is None or check.measured is None or check.asked is None or (check.relative and not check.asked):
        return None
    low, high = (check.measured if end is None else end for end in (check.low, check.high))
    points = (check.measured, low, high)
    if check.what == "loss":
        return points[0] * 100, points[1] * 100, points[2] * 100
    scale = 100 / check.asked if check.relative else 1e3
    return (
        (points[0] - check.asked) * scale,
        (points[1] - check.asked) * scale,
        (points[2] - check.asked) * scale,
    )


def draw(run: Run) -> Figure:
    """A line for each profile: rate, one-way delay and loss, both ways, with tolerances; jitter and bursts where there are."""
    links = [
        m
        for m in measured_links(run)
        if any(_error(m.check(w, q)) for w in WAYS for q in ("rate", "delay", "loss"))
    ]
    if not links:
        raise NotInThisRun(f"{run.path}: its calibration.json has no measured link")
    panels = [
        ("rate", "rate", "relative error (%)"),
        ("delay", "one-way delay", "measured minus asked (ms)"),
        ("loss", "loss", "lost packets (%)"),
        ("jitter", "jitter", "deviation's error (%)"),
        ("burst", "bursts", "mean length's error (%)"),
    ]
    panels = [
        each
        for each in panels
        if each[0] in _ALWAYS or any(_error(m.check(w, each[0])) for m in links for w in WAYS)
    ]
    frame = Frame(
        title=_verdict([m for m in links if not m.ok], len(links), bool(uncalibrated(run.rows))),
        subtitle=f"{_worst(links)}\n{subject(links)}",
        footnotes=[
            "Rate: a saturating flow at the receiver; line: 99 % interval of the mean over ten parts. Delay: median of probes "
            "that meet no queue, without their own serialisation; line: 99 % interval from order statistics, in tolerance where "
            "it reaches the band. Loss: fraction of probes; line: exact binomial 99 % interval, which must hold what was asked "
            "(none may be lost where none was asked for). Of a trace: under its means. No rate: no limit was asked for.",
            *_EXTRA[: 1 if len(panels) > len(_ALWAYS) else 0],
            *notes(run),
        ],
        rows=1,
        columns=len(panels),
        panel=max(_LEAST_PANEL, _ROW * len(links)),
        legend=0.3,
        left=2.0,
        between=0.22 if len(panels) == len(_ALWAYS) else 0.16,
        below=0.26,
        stacks=False,  # the first one's names are all panels'
    )
    figure, axes = frame.figure()
    for ax, (what, title, label) in zip(axes, panels, strict=True):
        panel_title(ax, title, label)
        _panel(ax, links, what, 5 if len(panels) == len(_ALWAYS) else 3)
    axes[0].set_yticks(range(len(links)), [_short(m.label) + ("" if m.ok else "  ✗") for m in links])
    for tick, each in zip(axes[0].get_yticklabels(), links, strict=True):
        tick.set_color(INK if each.ok else VERMILLION)
    handles = [mark.handle(name) for mark, _, name in WAYS.values()]
    handles += [Line2D([], [], marker="|", ls="", ms=11, mew=1.8, color=INK, label="asked")]
    bottom_legend(figure, frame, [*handles, Patch(color=_BAND, label="tolerance")], 4)
    return figure


def _panel(ax: Axes, links: list[Outcome], what: str, ticks: int) -> None:
    ends = [0.0]
    for row, link in enumerate(links):
        for way, (mark, shift, _) in WAYS.items():
            y = row + shift
            check = link.check(way, what)
            if check is None or (error := _error(check)) is None:
                continue
            if check.band is not None:
                scale = 100 if check.relative else 1e3
                band = scale * check.band[0], scale * check.band[1]
                ax.fill_betweenx([y - 0.17, y + 0.17], *band, color=_BAND, lw=0, zorder=1)
                ends += band
            value, low, high = error
            asked = 100 * (check.asked or 0.0) if what == "loss" else 0.0
            ax.plot([asked], [y], marker="|", ms=11, mew=1.8, color=INK, ls="none", zorder=2)
            ax.plot([low, high], [y, y], color=mark.color, lw=1.4, zorder=3)
            ax.plot([value], [y], zorder=4, **mark.options())
            ends += [value, low, high, asked]
    pad = 0.06 * (max(ends) - min(ends)) or 0.5
    ax.set_xlim(min(ends) - pad, max(ends) + pad)
    ax.set_ylim(len(links) - 0.5, -0.5)
    ax.set_yticks(range(len(links)), [])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    for row in range(1, len(links)):
        ax.axhline(row - 0.5, color="#E6E6E6", lw=0.7, zorder=0)


def _verdict(out: list[Outcome], n: int, off: bool) -> str:
    """`off`: some trials ran on a link that was then out of tolerance, whatever was measured later."""
    if not out and off:
        return f"Within tolerance when last measured; trials ran while {'a link' if n > 1 else 'it'} was not"
    if not out:
        return (
            f"All {n} links were within tolerance of what was asked"
            if n > 1
            else "The link was within tolerance"
        )
    return f"{len(out)} of {n} links {'was' if len(out) == 1 else 'were'} out of tolerance"


def _worst(links: list[Outcome]) -> str:
    """The largest error of each, in words."""
    errors = {
        what: [error[0] for m in links for way in WAYS if (error := _error(m.check(way, what))) is not None]
        for what in ("rate", "delay")
    }
    parts = []
    if errors["rate"]:
        worst = round(float(max(errors["rate"], key=abs)), 2) + 0.0  # which makes -0.0 a plain one
        parts.append(f"largest error of a rate {worst:+.2f} %")
    if errors["delay"]:
        parts.append(f"of a delay {max(errors['delay'], key=abs):+.2f} ms")
    losses = [check.ok for m in links for check in m.checks if check.what == "loss"]
    if losses:
        parts.append(f"loss as asked in {sum(ok is True for ok in losses)} of {len(losses)} ways")
    return " · ".join(parts)


def subject(links: list[Outcome]) -> str:
    emulators = ", ".join(dict.fromkeys(m.emulator for m in links if m.emulator))
    sizes = [check.n for m in links for check in m.checks if check.what in _ALWAYS and check.n]
    number = counted(len(links), "link profile")
    probes = [f"n = {min(sizes)} to {max(sizes)} probe packets a figure"] if sizes else []
    return " · ".join(
        [number, *([f"{emulators} emulator"] if emulators else []), *probes, "last measurement of each"]
    )


def notes(run: Run) -> Iterator[str]:
    if run.where:
        yield f"Only links of rows where {run.where}."
    off = uncalibrated(run.rows)
    if off:  # a run that was resumed measured its links again
        yield f"Trials ran while a measurement before them was out of tolerance: {', '.join(off)}."
    if run.notes:
        yield f"Run directory: {'; '.join(run.notes)}."


def measured_links(run: Run) -> list[Outcome]:
    """The last measurement of each profile that the rows name."""
    wanted = set(map(str, run.rows["profile"])) if run.where else None
    return [outcome for outcome in outcomes(run.calibration) if wanted is None or outcome.profile in wanted]


def spaced(profile: str) -> str:
    return profile.replace(",", ", ").replace(";", "; ")


def _short(profile: str) -> str:
    """On two lines at most."""
    return "\n".join(textwrap.wrap(spaced(profile), _NAME, max_lines=2, placeholder=" …")) or profile
