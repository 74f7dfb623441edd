"""Rows: what a run writes is what is read, whatever version wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from testbed.analysis.run import load
from testbed.experiment.results import FORMAT, MEASURED, READABLE, RunDirectory, as_now
from tests.analysis.make_run import make_run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run as format 2 left it: zeros where a trial failed, nothing of what came with format 3."""
    path = make_run(tmp_path / "run", profiles=("lte",), codecs=("fp16",), tasks=("needle",), examples=2)
    rows = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    new = ("queue_s", "token_s", "answer_tokens", "replayed")
    rows = [{key: value for key, value in row.items() if key not in new} for row in rows]
    zeros = {column: 0 for column in MEASURED if column not in new}
    rows[0] |= {"error": "nothing arrived for 1 s", "answer": "", "score": None, **zeros}
    (path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "manifest.json").write_text('{"format": 2}')
    return path


def test_the_zeros_of_an_older_runs_failed_row_are_read_as_unknown(directory: Path) -> None:
    failed, *finished = RunDirectory.open(directory).rows()
    assert {failed[column] for column in MEASURED} == {None}
    assert failed["kv_bytes"] > 0
    assert all(row["e2e_s"] > 0 and row["queue_s"] == 0 for row in finished)


@pytest.mark.parametrize("lost", ["", "trials.jsonl"])
def test_a_mean_over_all_rows_leaves_the_failed_ones_out(directory: Path, lost: str) -> None:
    RunDirectory(directory).write_parquet()
    frame = pd.read_parquet(directory / "trials.parquet")
    assert frame["e2e_s"].isna().sum() == frame["payload_bytes"].isna().sum() == 1
    assert frame["e2e_s"].min() > 0
    assert str(frame["payload_bytes"].dtype) == "Int64"
    if lost:
        (directory / lost).unlink()
    run = load(directory)
    assert (run.rows["e2e_s"] > 0).all() and run.rows["payload_bytes"].notna().all()
    assert run.failed[list(MEASURED)].isna().all(axis=None)
    assert run.rows["answer_tokens"].isna().all()


def test_every_format_up_to_this_one_has_a_migration_that_leaves_rows_of_this_one_alone(
    directory: Path,
) -> None:
    assert tuple(range(1, FORMAT + 1)) == READABLE
    for row in RunDirectory(directory).rows():
        assert as_now(row) == row
