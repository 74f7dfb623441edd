"""The run in numbers: ``summary.csv``, and the short table that the command line prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import settings, stats
from analysis.describe import caveats, conditions
from analysis.run import Run
from testbed.results import STAGES

_SAME = ("model", "emulator", "link", "transport", "congestion")


def write(run: Run) -> Path:
    """Write ``summary.csv``: one row per cell and task. Raises UsageError for a run without finished
    trials.
    """
    frame = summarise(run)
    return run.write("summary.csv", lambda to: frame.to_csv(to, index=False, float_format="%.6g"))


def summarise(run: Run) -> pd.DataFrame:
    """One row per cell and task, in the run's order; cells all of whose trials failed are there with n = 0.

    Seconds, bytes, fractions. `n` counts examples and `trials` rows; `_lo` and `_hi` bound the 95 % interval.
    """
    run.require()
    rows = pd.concat([run.rows.assign(finished=True), run.failed.assign(finished=False)], ignore_index=True)
    groups = rows.groupby(["cell", "profile", "placement", "codec", "task"], sort=False)
    return pd.DataFrame([_cell(keys, own) for keys, own in groups])


def _cell(keys: Any, both: pd.DataFrame) -> dict[str, Any]:
    rows = both[both["finished"]]
    examples = settings.clusters(rows)
    score = stats.mean(rows["score"], examples, bounds=settings.SCORE.bounds)
    delta = stats.mean(settings.DELTA_NLL.values(rows), examples)
    latency = stats.median(rows["e2e_s"], examples)
    payload = float(rows["payload_bytes"].mean()) if len(rows) else float("nan")
    line: dict[str, Any] = dict(zip(("cell", "profile", "placement", "codec", "task"), keys, strict=True))
    line |= {name: both[name].iloc[0] for name in _SAME}
    line |= {"n": examples.nunique(), "trials": len(rows), "failed": int(len(both) - len(rows))}
    line |= {"score": score.value, "score_lo": score.low, "score_hi": score.high}
    line |= {
        name: stats.mean(rows[name], examples, resamples=1).value
        for name in ("em", "f1", "reference_score", "nll")
    }
    line |= {"delta_nll": delta.value, "delta_nll_lo": delta.low, "delta_nll_hi": delta.high}
    line |= {"e2e_s": latency.value, "e2e_s_lo": latency.low, "e2e_s_hi": latency.high}
    line |= {"ttft_s": rows["ttft_s"].median()}
    line |= {f"{stage}_mean": rows[stage].mean() for stage in STAGES}
    line |= {"kv_bytes": rows["kv_bytes"].mean(), "payload_bytes": payload}
    line |= {"ratio": line["kv_bytes"] / payload if payload > 0 else float("nan")}
    line |= {
        name: rows[name].mean() for name in ("wire_bytes", "retransmits", "tokens_kept", "bits_per_element")
    }
    line |= {"calibrated": bool(rows["calibrated"].all())}
    return line


def table(run: Run) -> str:
    """The terminal's table: for each profile its settings, with latency, quality and payload, and the one
    to choose marked.
    """
    run.require()
    blocks = [_block(name, rows) for name, rows in settings.panels(run.rows)]
    notes = caveats(run)
    tasks = run.rows["task"].nunique()
    over = f" over {tasks} tasks" if tasks > 1 else ""
    legend = (
        f"latency: median; quality: mean score{over}; brackets: 95 % intervals\n"
        f"*  fastest setting with at least {settings.QUALITY_FLOOR:.0%} of the full cache's quality; "
        "+  fastest of those that send KV\n"
        "   (both by the estimates; testbed recommend asks what the intervals show)"
    )
    return "\n\n".join([*blocks, "\n".join([legend, *notes])])


def _block(name: str, rows: pd.DataFrame) -> str:
    measured = settings.measure(rows)
    full = settings.full_cache_quality(rows)
    chosen = settings.fastest_that_holds(measured, full)
    sending = settings.fastest_that_holds([m for m in measured if m.placement == "split"], full)
    width = max([len(m.label) for m in measured] + [7])
    reference = f"full cache {full:.2f}" if full == full else "full cache unknown"
    lines = [
        f"{name}: {conditions(rows)} · {reference}",
        f"     {'setting':<{width}}  {'latency':>8}  {'':<14}  {'quality':>7}  {'':<13}  {'payload':>9}",
    ]
    for one in sorted(measured, key=lambda m: m.latency.value):
        latency, quality = one.latency, one.quality
        mark = "*" if one is chosen else "+" if one is sending else " "
        lines.append(
            f"  {mark}  {one.label:<{width}}  {_seconds(latency.value):>8}  {_interval(latency, 3):<14}"
            f"  {quality.value:>7.3f}  {_interval(quality, 2):<13}  {_bytes(one.payload_bytes):>9}".replace(
                "nan", "  -"
            )
        )
    if chosen is None:
        lines.append(
            "     (no setting holds it)"
            if full > 0
            else "     (the full cache scores nothing here: no setting to choose)"
        )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def _interval(estimate: stats.Estimate, digits: int) -> str:
    if estimate.low != estimate.low:
        return ""
    digits = digits if estimate.high < 10 else 1
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _bytes(size: float) -> str:
    if not size > 0:
        return "-"
    return f"{size / 1e6:.2f} MB" if size >= 95_000 else f"{size / 1e3:.1f} kB"
