"""One request from the question to the last token, stage by stage: at the edge, on the link, in the cloud."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from testbed.analysis import settings
from testbed.analysis.describe import caveats, conditions, megabytes
from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.panels import rate_above
from testbed.analysis.figures.stages import LOOKS, patch
from testbed.analysis.figures.style import (
    GREY,
    INK,
    Frame,
    bottom_legend,
    legend_height,
    legible,
    panel_title,
)
from testbed.analysis.link_rates import rates
from testbed.analysis.run import Run, stage_names
from testbed.analysis.spans import PLACES, lanes, of_stages, spans

MOST = 5  #: settings beside each other


def draw(run: Run) -> Figure:
    """The same example on the same link under a few settings, on one time axis; one trial where one is chosen
    (``--where 'trial == "…"'``).
    """
    rows = settings.labelled(run.rows)
    rows = rows[rows["e2e_s"] > 0]
    if rows.empty:
        raise NotInThisRun(f"{run.path}: no finished trial has a latency")
    chosen = _trials(rows)
    used = stage_names(chosen)
    first = chosen.iloc[0]
    longest = float(chosen["e2e_s"].max())
    of_link = [
        rates(run, str(trial["profile"]), float(trial["trace_s"]), longest)
        if trial["trace_s"] == trial["trace_s"]
        else None
        for _, trial in chosen.iterrows()
    ]
    rated = any(rate is not None for rate in of_link)
    frame = Frame(
        title="One request" if len(chosen) == 1 else f"One request under {len(chosen)} settings",
        subtitle=(
            f"{first['model']} · {first['task']}, example {first['example']}, {first['context_tokens']} tokens "
            f"of context · {str(first['panel']).replace(',', ', ')} ({first['emulator']} emulator): {conditions(chosen)}\n"
            "single trials, so without intervals; triangle: the first token reaches the user"
        ),
        footnotes=[
            "The example is the one whose latencies are nearest to the settings' medians. "
            "Stages in parentheses were taken over from an identical earlier trial."
            + (" Rate: what the link's trace has then." if rated else ""),
            *caveats(run),
        ],
        rows=len(chosen),
        columns=1,
        panel=0.95 if rated else 0.72,
        legend=legend_height([LOOKS[stage][2] for stage in used], 4),
        left=0.7,
        above=0.4,
        below=0.12,
    )
    figure, axes = frame.figure()
    table = spans(run)
    for ax, (_, trial), rate in zip(axes, chosen.iterrows(), of_link, strict=True):
        own = table[table["trial"] == trial["trial"]]
        _draw_trial(ax, trial, own if len(own) else of_stages(trial), longest)
        ax.set_yticks([*([-1] if rated else []), 0, 1, 2], [*(["rate"] if rated else []), *PLACES])
        ax.set_ylim(2.5, -1.55 if rated else -0.6)
        if rate is not None:
            rate_above(ax, rate)
        ax.set_xlim(0, longest * 1.02)
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[-1].set_xlabel("time since the request (s)")
    bottom_legend(figure, frame, [patch(stage) for stage in used], 4)
    return figure


def _trials(rows: pd.DataFrame) -> pd.DataFrame:
    """Trials of one example on one link: the reference, the fastest that keep the quality, the placements."""
    if len(rows) == 1:
        return rows
    panel = rows["panel"].iloc[0]
    own = rows[rows["panel"] == panel]
    full = settings.full_cache_quality(own)
    measured = settings.measured(own)
    sending = [m for m in measured if m.sends]
    best = settings.fastest_that_holds(sending, full)
    wanted = ["fp16", *([best.label] if best else []), "cloud", "edge"]
    small = min(sending, key=lambda m: m.payload_bytes, default=None)
    wanted += [small.label] if small else []
    known = [m.label for m in measured]
    order = [w for w in dict.fromkeys([*wanted, *known]) if w in known][:MOST]
    example = _typical(own, order)
    trials = own[(own["task"] == example[0]) & (own["example"] == example[1])]
    trials = trials[trials["setting"].isin(order)].drop_duplicates("setting")
    return trials.sort_values("setting", key=lambda s: s.map(order.index))


def _typical(rows: pd.DataFrame, order: list[str]) -> tuple[str, str]:
    """The example that most of these settings have, and whose latencies are nearest to their medians."""
    own = rows[rows["setting"].isin(order)]
    away = (own["e2e_s"] / own.groupby("setting")["e2e_s"].transform("median") - 1).abs()
    table = (
        own.assign(away=away)
        .groupby(["task", "example"])
        .agg(n=("setting", "nunique"), away=("away", "mean"))
    )
    task, example = table[table["n"] == table["n"].max()]["away"].idxmin()
    return str(task), str(example)


def _draw_trial(ax: Axes, trial: pd.Series, table: pd.DataFrame, longest: float) -> None:
    payload = trial["payload_bytes"]
    sent = f"{megabytes(float(payload))} sent" if payload else "nothing sent"
    score = f"score {trial['score']:.2f}" if trial["score"] == trial["score"] else "no score"
    panel_title(ax, str(trial["setting"]), f"{trial['e2e_s']:.2f} s · {sent} · {score}")
    reused = {f"{name.strip()}_s" for name in str(trial["reused"]).split(",") if name.strip()}
    for (_, span), lane in zip(table.iterrows(), lanes(table), strict=True):
        stage, start, length = (
            f"{span['stage']}_s",
            float(span["start_s"]),
            float(span["end_s"] - span["start_s"]),
        )
        color, hatch, _ = LOOKS[stage]
        look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": INK, "linewidth": 0.4}
        ax.barh(lane, length, left=start, height=0.78, **look)
        text = f"{length:.2f} s" if length >= 0.1 else f"{length * 1e3:.0f} ms"
        text = f"({text})" if stage in reused else text
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        if length > 0.05 * longest:
            ax.text(start + length / 2, lane, text, ha="center", va="center", fontsize=legible(6.6), bbox=box)
        if span["stage"] == "first_token":
            above = blended_transform_factory(ax.transData, ax.transAxes)
            look = {"marker": "v", "color": INK, "markersize": 5, "clip_on": False, "zorder": 5}
            ax.plot(start + length, 1.0, transform=above, **look)
    for border in (-0.5, 0.5, 1.5):
        ax.axhline(border, color=GREY, lw=0.3)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(8))
    ax.xaxis.set_major_formatter("{x:g}")
