"""The time to the first token: what of it each stage takes, and how much sooner or later it comes than where the text is sent."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from testbed.analysis import paired_latency, settings
from testbed.analysis.describe import caveats, counted, subject
from testbed.analysis.figures.panels import fill
from testbed.analysis.figures.stages import LOOKS, draw_panel, overlapping, patch
from testbed.analysis.figures.style import Frame, bottom_legend, legend_height
from testbed.analysis.names import short
from testbed.analysis.run import Run, stage_names


def draw(run: Run) -> Figure:
    """The median, divided by the stages' mean shares of it; beside each bar the paired difference from the baseline."""
    panels = list(settings.panels(run.attempts))
    stages = [stage for stage in stage_names(run.rows) if stage != "generate_s"]
    order = list(settings.labelled(run.attempts)["setting"].unique())
    baselines = list(
        dict.fromkeys(short([paired_latency.baseline_of(rows)]).popitem()[1] for _, rows in panels)
    )
    links = counted(len(panels), "emulated link")
    frame = Frame(
        title="Where the time to the first token goes",
        subtitle=(
            f"{counted(len(order), 'setting')} on {links} · {subject(run.rows)}\n"
            "median, divided by the stages' mean shares; whisker: 95 % bootstrap interval; each panel has its own time scale"
        ),
        footnotes=[
            f"Beside each bar: the median, and how much later (+) or sooner (-) than with {' or '.join(baselines)}: median "
            "of the examples' differences with its 95 % interval from order statistics; hid: what overlapping stages hid of "
            "one another.",
            *overlapping(run.rows),
            *caveats(run),
        ],
        rows=len(panels),
        columns=1,
        panel=0.1 + 0.205 * len(order),
        legend=legend_height([LOOKS[stage][2] for stage in stages], 4),
        left=0.2 + 0.072 * max(map(len, short(order).values())),
    )
    figure, axes = frame.figure()
    wide = partial(draw_panel, "ttft_s", stages, order, _differences, room=2.6)
    fill(axes, 1, panels, wide, "time to the first token (s)")
    bottom_legend(figure, frame, [patch(stage) for stage in stages], 4)
    return figure


def _differences(rows: pd.DataFrame) -> dict[str, str]:
    """The paired difference of each setting, and what its pipeline hid."""
    later = paired_latency.first_token_differences(rows, paired_latency.baseline_of(rows))
    hidden = settings.finished(rows).groupby("setting")["overlap_s"].median()
    said = {}
    for name in map(str, rows["setting"].unique()):
        parts = (
            [f"{later[name].text(2, '+')} s"] if name in later and math.isfinite(later[name].value) else []
        )
        hid = float(hidden.get(name, 0.0))
        said[name] = " · ".join([*parts, *([f"hid {hid:.2f} s"] if hid >= 0.005 else [])])
    return said
