"""The run in numbers: ``summary.csv``, and the short table that the command line prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from testbed import stats
from testbed.analysis import energy, hosts, layout, loads, paired_latency, settings
from testbed.analysis.describe import caveats, computing, conditions, megabytes
from testbed.analysis.names import short
from testbed.analysis.run import Run
from testbed.experiment.row import STAGES

#: Of deliveries, stores and scouts; means.
_PIPELINE = (
    "overlap_s",
    "naive_s",
    "chunks",
    "met",
    "tokens_left_out",
    "store_prefill_s",
    "store_encode_s",
    "choice_overlap",
    "planes",
    "changed",
    "saved_s",
    "verified_s",
)
_WIDEST = 54  #: characters of a setting's name in the terminal
_SAME = ("model", "emulator", "link", "delivery", "transport", "congestion", "load", "serving", "allocate")


def write(run: Run) -> Path:
    """Write ``summary.csv``: one row per cell and task. Raises UsageError for a run without finished
    trials.
    """
    frame = summarise(run)
    return run.write("summary.csv", lambda to: frame.to_csv(to, index=False, float_format="%.6g"))


def summarise(run: Run) -> pd.DataFrame:
    """One row per cell and task, in the run's order; cells all of whose trials failed are there with n = 0.

    Seconds, bytes, fractions. `n` counts examples that were answered, `trials` rows; `_lo` and `_hi` bound the 95 %
    interval. A failed trial is infinite in medians of times and missing in means. `latency_ratio`: median of the
    examples' ratios to the latency of `latency_baseline` on the same link; `over_bound`: median of latency over `bound_s`.
    """
    run.require()
    rows = settings.labelled(run.attempts)
    # Edges of one load may have models and deliveries of their own.
    by = ["cell", "profile", "placement", "codec", "task", "model", "delivery"]
    groups = rows.groupby(by, sort=False)
    against = {
        (str(panel), str(task), ratio.setting): ratio
        for panel, own in rows.groupby("panel", sort=False)
        for task, part in own.groupby("task", sort=False)
        for ratio in paired_latency.ratios(part, paired_latency.baseline_of(own))
    }
    baselines = {
        str(panel): paired_latency.baseline_of(own) for panel, own in rows.groupby("panel", sort=False)
    }
    lines = []
    for keys, own in groups:
        panel, setting = str(own["panel"].iloc[0]), str(own["setting"].iloc[0])
        compared = against.get((panel, str(keys[4]), setting))
        lines.append(_cell(keys, own) | _ratio(baselines[panel], compared))
    return pd.DataFrame(lines)


def _ratio(baseline: str, compared: paired_latency.LatencyRatio | None) -> dict[str, Any]:
    """The columns of a latency's comparison; empty for the baseline itself."""
    unknown = float("nan")
    ratio = compared.ratio if compared else stats.NOTHING
    return {
        "latency_baseline": baseline,
        "latency_ratio": ratio.value,
        "latency_ratio_lo": ratio.low,
        "latency_ratio_hi": ratio.high,
        "latency_p": compared.p if compared else unknown,
        "latency_p_holm": compared.p_holm if compared else unknown,
    }


def _cell(keys: Any, both: pd.DataFrame) -> dict[str, Any]:
    rows = settings.finished(both)
    examples = settings.clusters(rows)
    score = stats.mean(rows["score"], examples, bounds=settings.SCORE.bounds)
    delta = stats.mean(settings.DELTA_NLL.values(rows), examples)
    times = both[["e2e_s", "ttft_s"]].mask(both["failed"].astype(bool), float("inf"))
    latency = stats.median(times["e2e_s"], settings.clusters(both))
    first = stats.median(times["ttft_s"], settings.clusters(both))
    payload = float(rows["payload_bytes"].mean()) if len(rows) else float("nan")
    line: dict[str, Any] = dict(zip(("cell", "profile", "placement", "codec", "task"), keys[:5], strict=True))
    line |= {name: both[name].iloc[0] for name in _SAME}
    line |= {"n": examples.nunique(), "trials": len(rows), "failed": int(len(both) - len(rows))}
    line |= {"score": score.value, "score_lo": score.low, "score_hi": score.high}
    line |= {
        name: stats.mean(rows[name], examples, resamples=1).value
        for name in ("em", "f1", "reference_score", "nll")
    }
    line |= {"delta_nll": delta.value, "delta_nll_lo": delta.low, "delta_nll_hi": delta.high}
    line |= {"e2e_s": latency.value, "e2e_s_lo": latency.low, "e2e_s_hi": latency.high}
    line |= {"ttft_s": first.value, "ttft_s_lo": first.low, "ttft_s_hi": first.high}
    line |= {f"{stage}_mean": rows[stage].mean() for stage in STAGES}
    line |= {name: rows[name].mean() for name in ("answer_tokens", "token_s") if name in rows}
    line |= {"kv_bytes": rows["kv_bytes"].mean(), "payload_bytes": payload}
    line |= {"ratio": line["kv_bytes"] / payload if payload > 0 else float("nan")}
    line |= {
        name: rows[name].mean() for name in ("wire_bytes", "retransmits", "tokens_kept", "bits_per_element")
    }
    line |= {f"{name}_mean": rows[name].mean() for name in _PIPELINE}
    line |= {
        f"radio_{name}_j": energy.per_request(rows, radio).mean() for name, radio in energy.RADIOS.items()
    }
    line |= {
        "over_bound": (rows["e2e_s"] / rows["bound_s"]).median(),
        "amortized_s": rows["amortized_s"].median(),
    }
    line |= {name: bool(both[name].all()) for name in ("calibrated", "compute_steady")}
    return line


def table(run: Run, width: int | None = None) -> str:
    """The terminal's table, in lines of `width` characters at most (None: as they come): for each profile its settings, with
    latency, quality and payload, and the one to choose marked; what a reader must know of them; and last which is chosen.
    """
    run.require()
    if run.untimed:
        return _untimed(run, width)
    panels = outcomes(run)
    notes = [*filter(None, [computing(run)]), *caveats(run)]
    tasks = run.rows["task"].nunique()
    over = f" over {tasks} tasks, then the task that keeps least and what it keeps" if tasks > 1 else ""
    legend = [
        f"latency: median {run.latency}, a failed trial being infinite",
        f"quality: mean score{over}; brackets: 95 % intervals; n: examples, of latency / of quality where these are others",
        f"*  fastest setting with at least {settings.QUALITY_FLOOR:.0%} of the full cache's quality; "
        "+  fastest of those that send KV;",
        "=  keeps it, too, and is not shown to be slower than *, example by example",
        "   (qualities by the estimates; testbed recommend asks what the intervals show)",
    ]
    told = "\n".join(layout.sentences(line, width, "   ") for line in [*legend, *notes])
    blocks = [_block(panel, width) for panel in panels]
    return "\n\n".join(
        [
            *blocks,
            *filter(None, [loads.text(run, width), hosts.text(run, width)]),
            told,
            _result(panels, width),
        ]
    )


def _untimed(run: Run, width: int | None) -> str:
    """The settings of a run without times, the smallest payload first."""
    blocks = []
    for name, rows in settings.panels(run.attempts):
        full = settings.full_cache_quality(rows)
        by_size = sorted(
            settings.measured(rows), key=lambda m: (m.payload_bytes != m.payload_bytes, m.payload_bytes)
        )
        lines = [
            [
                each.label,
                _quality(each.quality.value),
                _interval(each.quality, 2),
                megabytes(each.payload_bytes),
                "  ".join(filter(None, [each.worst.text() if each.worst else "", each.gap])),
            ]
            for each in by_size
        ]
        reference = f"full cache {full:.2f}" if full == full else "full cache unknown"
        header = ["setting", "quality", "", "payload", ""]
        blocks.append(f"{name}: {reference}\n" + layout.table(lines, header, width, texts=(0, 4), indent=2))
    over = " over its tasks, then the one that keeps least" if run.rows["task"].nunique() > 1 else ""
    legend = f"quality: mean score{over}; brackets: 95 % intervals; the smallest payload first"
    told = "\n".join(layout.sentences(line, width, "   ") for line in [legend, *caveats(run)])
    return "\n\n".join([*blocks, told])


@dataclass(frozen=True)
class Panel:
    """A link's settings, from the fastest on, and which of them are chosen."""

    name: str
    conditions: str
    reference: str
    measured: list[settings.Measured]
    chosen: settings.Measured | None
    sending: settings.Measured | None  #: the fastest of those that send KV
    level: list[str]  #: what is not shown to be slower than the one chosen
    nothing: str  #: why none is chosen
    unknown: str  #: why no quality is known


def outcomes(run: Run) -> list[Panel]:
    """What came out on each of the run's links."""
    return [_panel(name, rows) for name, rows in settings.panels(run.attempts)]


def _panel(name: str, rows: pd.DataFrame) -> Panel:
    measured = settings.measured(rows)
    full = settings.full_cache_quality(rows)
    able = settings.holding(measured, full)
    chosen = next(iter(able), None)
    unknown = settings.no_quality(settings.finished(rows))
    nothing = unknown or (
        "the full cache scores nothing here" if full == full else "the full cache's score is unknown"
    )
    return Panel(
        name,
        conditions(rows),
        f"full cache {full:.2f}" if full == full else unknown or "full cache unknown",
        sorted(measured, key=lambda m: m.latency.value),
        chosen,
        next((m for m in able if m.sends), None),
        paired_latency.tied(rows, chosen.label, [m.label for m in able]) if chosen else [],
        "no setting holds it" if full > 0 else f"{nothing}: no setting to choose",
        unknown,
    )


def _block(panel: Panel, width: int | None) -> str:
    names = short((m.label for m in panel.measured), _WIDEST)
    lines = []
    for each in panel.measured:
        latency, quality = each.latency, each.quality
        tie = "=" if each.label in panel.level else ""
        mark = "*" if each is panel.chosen else "+" + tie if each is panel.sending else tie
        # Which the heading says of all.
        gap = each.gap if each.scored or each.failed or not panel.unknown else ""
        notes = "  ".join([*([each.worst.text()] if each.worst else []), *([gap] if gap else [])])
        figures = [
            _seconds(latency.value),
            _interval(latency, 3),
            _quality(quality.value),
            _interval(quality, 2),
        ]
        about = [mark, names[each.label], _counts(latency.n, quality.n)]
        lines.append([*about, *figures, megabytes(each.payload_bytes), notes])
    head = layout.sentences(f"{panel.name}: {panel.conditions} · {panel.reference}", width, "  ")
    columns = ["", "setting", "n", "latency", "", "quality", "", "payload", ""]
    rows = layout.table(lines, columns, width, texts=(0, 1, 4, 6, 8), indent=2)
    return "\n".join([head, rows, *([f"     ({panel.nothing})"] if panel.chosen is None else [])])


def _result(panels: list[Panel], width: int | None) -> str:
    """What came out, a line a link."""
    names = short((m.label for panel in panels for m in panel.measured), _WIDEST)
    rows = []
    for panel in panels:
        if panel.chosen is None:
            rows.append([panel.name, "none", "", "", "", panel.nothing])
            continue
        latency, also = panel.chosen.latency, [names[label] for label in panel.level]
        notes = [f"not shown to be slower: {', '.join(also)}"] if also else []
        if panel.sending is not None and panel.sending is not panel.chosen:
            notes.append(f"of those that send KV {names[panel.sending.label]}")
        figures = [_seconds(latency.value), _interval(latency, 3), str(latency.n)]
        rows.append([panel.name, names[panel.chosen.label], *figures, "; ".join(notes)])
    head = f"fastest with at least {settings.QUALITY_FLOOR:.0%} of the full cache's quality, by the estimates"
    columns = ["link", "setting", "latency", "", "n", ""]
    return head + "\n" + layout.table(rows, columns, width, texts=(0, 1, 3, 5), indent=2)


def _counts(latency: int, quality: int) -> str:
    """How many examples stand behind a latency, and behind a quality where these are others."""
    return str(latency) if quality in (0, latency) else f"{latency}/{quality}"


def _quality(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "none" if value > 0 else "-"
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def _interval(estimate: stats.Estimate, digits: int) -> str:
    if estimate.low != estimate.low or math.isinf(estimate.low):
        return ""
    digits = digits if estimate.high < 10 else 1
    high = f"{estimate.high:.{digits}f}" if math.isfinite(estimate.high) else "∞"
    return f"[{estimate.low:.{digits}f}, {high}]"
