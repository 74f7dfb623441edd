"""A run's spans as a table: which stage was at work on which chunk of which trial, and when.

``spans.jsonl`` has a line a trial, written before the trial's row: ``{"trial": …, "spans": [{"chunk", "stage", "start_s",
"end_s", "side", "level", "bytes"}, …]}``; ``spans.parquet`` is the same, written at the end. A run without them has stages
alone: `of_stages` makes spans of a row whose stages came one after the other.
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
from testbed.endpoints.protocol import CLOUD, EDGE, LINK
from testbed.experiment.row import STAGES

#: Of the table: seconds count from the request's start, bytes cross the link; stages are named as columns, without the unit.
COLUMNS = ("trial", "chunk", "stage", "start_s", "end_s", "side", "level", "bytes")
PLACES = (EDGE, LINK, CLOUD)
STAGE_NAMES = tuple(stage.removesuffix("_s") for stage in STAGES)
#: What stands in a line besides the trial, and its type.
_FIELDS: dict[str, type] = {"chunk": int, "stage": str, "start_s": float, "end_s": float}
_MORE: dict[str, Any] = {"side": "", "level": "", "bytes": 0}


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
            name = stage.removesuffix("_s")
            span = {"chunk": 0, "stage": name, "start_s": at, "end_s": at + length}
            span |= {"side": _side(name, str(row["placement"])), "level": "", "bytes": sent}
            rows.append({"trial": row["trial"], **span})
            at += length
    return pd.DataFrame(rows, columns=list(COLUMNS))


def lanes(spans: pd.DataFrame) -> list[int]:
    """Where each of a trial's spans was, by number in `PLACES`."""
    return [PLACES.index(side) if side in PLACES else 0 for side in map(str, spans["side"])]


def _side(stage: str, placement: str) -> str:
    """Where a stage is that comes after the others."""
    if stage in ("link_queue", "connect", "transmit"):
        return "link"
    if placement == "edge" or stage in ("edge_queue", "select", "encode"):
        return "edge"
    return "edge" if stage == "prefill" and placement != "cloud" else "cloud"


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
