"""How latency is spread over requests: for each setting the share of requests that are done by then."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.describe import caveats, conditions, counted, subject
from testbed.analysis.figures import NotInThisRun, labels
from testbed.analysis.figures.axes import limit_seconds
from testbed.analysis.figures.panels import DASHES, Legend, fill
from testbed.analysis.figures.style import INK, Frame, panel_title, tell_missing
from testbed.analysis.run import Run
from testbed.analysis.settings import Measured

MOST = 5  #: so many curves can be told apart in one panel, and have a dash of their own


def draw(run: Run) -> Figure:
    """One panel a profile; median and 95th percentile of each curve carry its mark and an interval."""
    panels = list(settings.panels(run.attempts))
    if settings.labelled(run.rows).groupby(["panel", "setting"]).size().max() < 2:
        raise NotInThisRun(f"{run.path}: no setting has two finished trials on one link")
    measured = [m for _, rows in panels for m in settings.measured(rows)]
    every = list(dict.fromkeys(m.label for m in measured))
    shown = _few(run.attempts, measured, every)
    looks = Legend.of(measured).looks
    legend = Legend({label: looks[label] for label in shown})
    columns = 1 if len(panels) == 1 else 2
    left_out = (
        "" if len(shown) == len(every) else f"{len(shown)} of {len(every)} settings; --where shows others"
    )
    frame = Frame(
        title="How long requests take: the share that is done by then",
        subtitle=(
            f"{left_out or counted(len(shown), 'setting')} · {subject(run.rows)}\n"
            f"marks: median and 95th percentile of the {run.latency}, with 95 % intervals"
        ),
        footnotes=[
            "The 95th percentile is marked only where there are enough requests (72 examples) to bound it. A request that "
            "failed is never done: its setting's curve ends below 100 %.",
            *caveats(run),
        ],
        rows=math.ceil(len(panels) / columns),
        columns=columns,
        panel=2.0,
        legend=legend.height,
        left=0.75,
    )
    figure, axes = frame.figure()
    draw_panel = partial(_draw_panel, legend)
    fill(axes, columns, panels, draw_panel, f"{run.latency} (s)", "share of requests")
    handles = [
        Line2D(
            [], [], **{**mark.options(), "linestyle": DASHES[i % len(DASHES)], "markersize": 6}, label=name
        )
        for i, (mark, name) in enumerate(zip(legend.looks.values(), legend.names.values(), strict=True))
    ]
    legend.draw(figure, frame, handles)
    return figure


def _few(rows: pd.DataFrame, measured: list[Measured], every: list[str]) -> list[str]:
    """At most `MOST` settings: the reference, the placements, then those that are fastest somewhere with the
    quality kept, then in the run's order.
    """
    wanted: list[str] = [label for label in ("fp16", "cloud", "edge") if label in every]
    for _, own in settings.panels(rows):
        full = settings.full_cache_quality(own)
        sending = [m for m in settings.measured(own) if m.sends]
        best = settings.fastest_that_holds(sending, full)
        wanted += [best.label] if best else []
    order = list(dict.fromkeys([*wanted, *every]))[:MOST]
    return [label for label in every if label in order]


def _draw_panel(legend: Legend, ax: Axes, panel: tuple[str, pd.DataFrame]) -> None:
    name, rows = panel
    panel_title(ax, name, conditions(rows))
    ends: list[float] = []
    missing: list[str] = []
    named: list[tuple[float, float, str]] = []
    crossed: list[labels.Segment] = []
    for number, (label, mark) in enumerate(legend.looks.items()):
        own = rows[rows["setting"] == label]
        if own.empty:
            continue
        every = settings.latencies(own)
        times = np.sort(every[np.isfinite(every)].to_numpy())
        if len(times) < len(own):
            missing.append(f"{label} failed {len(own) - len(times)} of {len(own)}")
        if not len(times):
            continue
        shares = np.arange(1, len(times) + 1) / len(own)
        ax.step(
            [times[0], *times],
            [0.0, *shares],
            where="post",
            color=mark.color,
            lw=1.2,
            ls=DASHES[number % len(DASHES)],
            zorder=2,
        )
        for q in (0.5, 0.95):
            point = stats.quantile(every, q, settings.clusters(own))
            if not math.isfinite(point.value) or (q > 0.5 and not math.isfinite(point.high)):
                continue
            height = q - 0.014 * (number - len(legend.looks) / 2)  # intervals beside each other, not on top
            if math.isfinite(point.low) and math.isfinite(point.high):
                interval = [point.low, point.high]
                ax.plot(
                    interval, [height, height], color=mark.color, lw=1.6, alpha=0.6, zorder=3, gid="interval"
                )
            ax.plot(point.value, height, zorder=4, **{**mark.options(), "markersize": 5.5})
            if q == 0.5:
                named.append((point.value, height, legend.names[label]))
        for low, high in zip((0, 0.2, 0.4, 0.6, 0.8), (0.2, 0.4, 0.6, 0.8, 1), strict=True):
            part = times[(shares >= low) & (shares <= high)]
            crossed += [((float(part[0]), low), (float(part[-1]), high))] if len(part) else []
        ends += [float(times[0]), float(times[-1])]
    limit_seconds(ax, ends)
    tell_missing(ax, missing)
    ax.set_ylim(-0.02, 1.04)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.axhline(0.5, color=INK, lw=0.4, zorder=1)
    labels.place(ax, named, [(x, y) for x, y, _ in named], crossed)
