"""A run's spans as a table: which stage was at work on which chunk of which trial, and when.

``spans.jsonl`` has a line a trial, ``{"trial": …, "spans": [{"chunk", "stage", "start_s", "end_s", "level", "bytes"}, …]}``,
written before the trial's row; ``spans.parquet`` is the same, written at the end. A run without them has stages alone:
`of_stages` makes spans of a row whose stages came one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from testbed import files
from testbed.analysis.run import Run
from testbed.experiment.row import STAGES

#: Of the table: seconds count from the request's start, bytes cross the link; stages are named as columns, without the unit.
COLUMNS = ("trial", "chunk", "stage", "start_s", "end_s", "level", "bytes")
PLACES = ("edge", "link", "cloud")
STAGE_NAMES = tuple(stage.removesuffix("_s") for stage in STAGES)
#: What stands in a line besides the trial, and its type.
_FIELDS: dict[str, type] = {"chunk": int, "stage": str, "start_s": float, "end_s": float}
_MORE: dict[str, Any] = {"level": "", "bytes": 0}


def spans(run: Run) -> pd.DataFrame:
    """The spans of the run's rows (`COLUMNS`), trial by trial in time; empty where the directory has none. What is no span is
    passed over; of a trial that was made again, the last line counts.
    """
    path = run.path / "spans.jsonl"
    found = _lines(path) if path.is_file() else _columns(run.path / "spans.parquet")
    known = set(run.rows["trial"])
    by_trial = {trial: own for trial, own in found if trial in known}
    rows = [{"trial": trial, **span} for trial, own in by_trial.items() for span in own]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["trial", "start_s", "chunk"], kind="stable", ignore_index=True)


def of_stages(row: pd.Series[Any]) -> pd.DataFrame:
    """The spans of a row whose stages came one after the other, in the order of its placement."""
    rows, at = [], 0.0
    for stage in in_order(str(row["placement"])):
        length = float(row[stage])
        if length > 0:
            sent = int(row["payload_bytes"]) if stage == "transmit_s" else 0
            span = {"chunk": 0, "stage": stage.removesuffix("_s"), "start_s": at, "end_s": at + length}
            rows.append({"trial": row["trial"], **span, "level": "", "bytes": sent})
            at += length
    return pd.DataFrame(rows, columns=list(COLUMNS))


def lanes(spans: pd.DataFrame, placement: str) -> list[int]:
    """Where each of a trial's spans was, by number in `PLACES`. A prefill is the cloud's where the text was sent, or where its
    chunk had come before.
    """
    sent = spans[spans["stage"] == "transmit"]
    arrived = {int(chunk): float(end) for chunk, end in zip(sent["chunk"], sent["end_s"], strict=True)}

    def place(span: pd.Series[Any]) -> int:
        stage = str(span["stage"])
        if stage in ("connect", "transmit"):
            return 1
        if placement == "edge" or stage in ("select", "encode"):
            return 0
        behind = float(span["start_s"]) >= arrived.get(int(span["chunk"]), math.inf) - 1e-9
        text = placement in ("cloud", "store") or span["level"] == "text"
        return 0 if stage == "prefill" and not (text or behind) else 2

    return [place(span) for _, span in spans.iterrows()]


def in_order(placement: str) -> list[str]:
    """The stages as they follow each other: a cloud that is sent the text prefills after it has arrived."""
    if placement != "cloud":
        return list(STAGES)
    rest = [stage for stage in STAGES if stage != "prefill_s"]
    behind = rest.index("queue_s") + 1
    return [*rest[:behind], "prefill_s", *rest[behind:]]


def _lines(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with files.reading(path) as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("spans"), list):
                yield str(entry.get("trial")), [span for each in entry["spans"] if (span := _span(each))]


def _columns(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    try:
        trials = pd.read_parquet(path).groupby("trial", sort=False)
    except (OSError, ValueError, KeyError):
        return
    for trial, own in trials:
        yield str(trial), [span for each in own.to_dict("records") if (span := _span(each))]


def _span(each: Any) -> dict[str, Any] | None:
    """One that can be drawn; None for anything else."""
    try:
        span: dict[str, Any] = {name: kind(each[name]) for name, kind in _FIELDS.items()}
        span |= {name: type(default)(each.get(name) or default) for name, default in _MORE.items()}
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    ends = span["start_s"], span["end_s"]
    in_time = all(map(math.isfinite, ends)) and ends[0] <= ends[1]
    return span if in_time and span["stage"] in STAGE_NAMES else None
