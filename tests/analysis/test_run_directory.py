"""A run's directory is read as it is: whole, cut off, old, empty."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from testbed import analysis
from testbed.analysis.run import load
from testbed.errors import UsageError
from testbed.experiment.results import COLUMNS, Row
from tests.analysis.make_run import make_run, write_rows


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "trials.jsonl").read_text().split("\n") if line]


def rewrite(run: Path, rows: list[dict]) -> None:
    (run / "trials.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(
        tmp_path / "run", profiles=("lte",), codecs=("fp16", "int8"), tasks=("needle",), examples=3
    )


def test_every_row_is_read_into_typed_columns(run: Path) -> None:
    loaded = load(run)
    assert len(loaded.rows) == 4 * 3
    assert list(loaded.rows.columns)[: len(COLUMNS)] == list(COLUMNS)
    assert loaded.rows["kv_bytes"].dtype == "int64"
    for column in ("e2e_s", "score", "payload_bytes"):
        assert loaded.rows[column].dtype == "float64"
    assert loaded.rows["calibrated"].dtype == bool
    assert loaded.notes == ()


def test_a_cut_off_last_line_is_passed_over_and_said(run: Path) -> None:
    text = (run / "trials.jsonl").read_text()
    (run / "trials.jsonl").write_text(text[:-40])
    loaded = load(run)
    assert len(loaded.rows) == 4 * 3 - 1
    assert loaded.notes == ("1 unreadable line of trials.jsonl passed over",)


def test_missing_columns_are_filled_and_unknown_ones_kept(run: Path) -> None:
    rows = [
        {k: v for k, v in r.items() if k not in ("nll", "retransmits", "calibrated")} | {"kl": 0.5}
        for r in lines(run)
    ]
    rewrite(run, rows)
    loaded = load(run).rows
    assert loaded["nll"].isna().all()
    assert loaded["retransmits"].isna().all()
    assert loaded["calibrated"].all()
    assert (loaded["kl"] == 0.5).all()


def test_values_of_the_wrong_kind_are_treated_as_missing(run: Path) -> None:
    odd = {
        "e2e_s": 10**400,
        "nll": "low",
        "payload_bytes": [1],
        "codec": 7,
        "score": float("inf"),
        "calibrated": "no",
    }
    rewrite(run, [r | odd for r in lines(run)])
    loaded = load(run).rows
    assert loaded["nll"].isna().all()
    assert loaded["score"].isna().all()
    assert loaded["payload_bytes"].isna().all()
    assert (loaded["codec"] == "").all()
    assert analysis.headline(run)


def test_failed_trials_are_kept_apart_unless_they_finished_later(run: Path) -> None:
    rows = lines(run)
    failed = rows[0] | {"error": "endpoint died", "e2e_s": 0.0}
    rewrite(run, [failed, *rows[:5], rows[5] | {"error": "timeout"}, *rows[6:]])
    loaded = load(run)
    assert len(loaded.failed) == 1
    assert len(loaded.rows) == len(rows) - 1
    assert "1 trial failed (" in analysis.headline(run)


def test_missing_manifest_and_calibration_are_said_not_fatal(run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / "calibration.json").write_text("{ broken")
    assert load(run).notes == ("manifest.json is missing", "calibration.json cannot be read")
    assert "manifest.json is missing" in analysis.headline(run)


def test_the_parquet_file_stands_in_for_lost_lines(run: Path) -> None:
    from testbed.experiment.results import RunDirectory

    RunDirectory(run).write_parquet()
    (run / "trials.jsonl").unlink()
    assert len(load(run).rows) == 4 * 3


def test_where_selects_rows(run: Path) -> None:
    assert set(load(run, 'codec == "int8" and e2e_s > 0').rows["codec"]) == {"int8"}
    assert len(load(run, 'codec != "q2c@0.25+int8"').rows) == 4 * 3


@pytest.mark.parametrize(
    "where", ["nonsense ===", "colour == 3", "@pd.read_csv('x')", "codec.__class__", "e2e_s + 1"]
)
def test_a_where_that_selects_nothing_sensible_is_a_usage_error(run: Path, where: str) -> None:
    with pytest.raises(UsageError, match="--where"):
        load(run, where)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a run directory"):
        load(tmp_path)


def test_another_format_is_refused(run: Path) -> None:
    (run / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match=r"format 99.*a newer testbed wrote it"):
        load(run)


def test_a_run_from_before_kl_and_slowdowns_opens_with_nothing_invented(run: Path) -> None:
    (run / "manifest.json").write_text('{"format": 1}')
    new = ("kl", "edge_slowdown", "cloud_slowdown")
    rewrite(run, [{key: value for key, value in r.items() if key not in new} for r in lines(run)])
    rows = load(run).rows
    assert rows["kl"].isna().all()
    assert (rows[["edge_slowdown", "cloud_slowdown"]] == 1.0).all(axis=None)


@pytest.mark.parametrize("act", [analysis.draw, analysis.write_summary, analysis.headline])
def test_a_run_without_finished_trials_says_so(run: Path, act) -> None:
    (run / "trials.jsonl").unlink()
    with pytest.raises(UsageError, match="has no finished trials"):
        act(run)
    assert not (run / "figures").exists()


def test_a_run_whose_trials_all_failed_says_with_what(run: Path) -> None:
    rewrite(run, [r | {"error": "the cloud died\nat length"} for r in lines(run)])
    with pytest.raises(
        UsageError, match="no finished trials \\(12 failed, the first with: the cloud died\\)"
    ):
        analysis.headline(run)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_what_root_writes_belongs_to_the_runs_owner(run: Path) -> None:
    os.chown(run, 12345, 23456)
    written = [analysis.write_summary(run), *analysis.draw(run, ["stages"])]
    for path in [*written, run / "figures"]:
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456), path


def test_rows_have_the_shape_that_the_runner_writes(run: Path) -> None:
    # Guards the generator: a column that `Row` gains must not be silently absent from these tests.
    assert set(lines(run)[0]) == {f.name for f in dataclasses.fields(Row)}
    write_rows(run, [Row(**r) for r in lines(run)])
