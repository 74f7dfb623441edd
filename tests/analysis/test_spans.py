"""Spans are read from a run's directory as they are, whichever file is there, and made of stages where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from testbed.analysis.run import load
from testbed.analysis.spans import COLUMNS, in_order, of_stages, spans
from testbed.experiment.results import RunDirectory
from testbed.experiment.row import BUSY, STAGES
from tests.analysis.make_run import change, lines, make_run, rewrite

SENT = {
    "chunk": 1,
    "stage": "transmit",
    "start_s": 0.5,
    "end_s": 0.75,
    "side": "link",
    "level": "int8",
    "bytes": 1000,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", ("lte",), ("int8",), tasks=("needle",), examples=2)


def write(run: Path, *entries: Any) -> None:
    (run / "spans.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_spans_are_those_of_the_rows_and_of_a_trial_s_last_line(run: Path) -> None:
    trial = load(run).rows["trial"].iloc[0]
    first = {**SENT, "chunk": 0, "start_s": 0.25, "end_s": 0.5}
    write(run, {"trial": trial, "spans": [SENT]}, {"trial": trial, "spans": [SENT, first]}, {"trial": "gone"})
    found = spans(load(run))
    assert list(found.columns) == list(COLUMNS)
    assert found.drop(columns="trial").to_dict("records") == [first, SENT]
    found.to_parquet(run / "spans.parquet")
    (run / "spans.jsonl").unlink()
    pd.testing.assert_frame_equal(spans(load(run)), found)


@pytest.mark.parametrize(
    "odd",
    [
        {"stage": "sleep"},
        {"start_s": 2.0},
        {"end_s": float("inf")},
        {"chunk": "x"},
        {"bytes": []},
        {"start_s": None},
    ],
)
def test_what_is_no_span_is_passed_over(run: Path, odd: dict[str, Any]) -> None:
    trial = load(run).rows["trial"].iloc[0]
    write(run, 3, [], {"trial": trial, "spans": 3}, {"trial": trial, "spans": [7, {**SENT, **odd}, SENT]})
    with (run / "spans.jsonl").open("a") as file:
        file.write('{"trial": "cut o')
    kept = spans(load(run))["chunk"]
    assert len(kept) == (2 if odd == {"bytes": []} else 1)  # no bytes are none


def test_a_run_without_spans_has_those_of_its_stages(run: Path) -> None:
    assert spans(load(run)).empty
    for _, row in load(run).rows.iterrows():
        own = of_stages(row)
        assert own["end_s"].iloc[-1] == pytest.approx(row["e2e_s"])
        assert (own["end_s"].iloc[:-1].to_numpy() == own["start_s"].iloc[1:].to_numpy()).all()
    assert in_order("cloud").index("prefill_s") > in_order("cloud").index("transmit_s")


def test_rows_from_before_pipelines_overlapped_nothing(run: Path) -> None:
    new = ("overlap_s", "bound_s", "naive_s", "chunks", "amortized_s", "edge_decode_slowdown", *BUSY)
    older = [{k: v for k, v in row.items() if k not in new} | {"edge_slowdown": 3.0} for row in lines(run)]
    older[0] |= {"error": "the cloud died"}
    rewrite(run, older)
    failed, *rows = RunDirectory.open(run).rows()
    assert {failed[column] for column in new if column != "edge_decode_slowdown"} == {None}
    for row in rows:
        assert [row[busy] for busy in BUSY] == [row[stage] for stage in STAGES]
        assert row["overlap_s"] == 0 and row["bound_s"] == row["amortized_s"] == row["e2e_s"]
        assert row["edge_decode_slowdown"] == 3
        assert row["chunks"] == int(row["placement"] != "edge")
        assert row["naive_s"] == pytest.approx(row["payload_bytes"] * 8 / row["rate_up_bps"])
    change(run, lambda row: {"rate_up_bps": None})
    change(run, lambda row: {} if row["placement"] != "edge" else {"rate_up_bps": None})
    sent = [row for row in RunDirectory.open(run).rows() if row["placement"] != "edge" and not row["error"]]
    assert {row["naive_s"] for row in sent} == {None}  # a link without a limit has no formula
