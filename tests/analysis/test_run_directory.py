"""A run's directory is read as it is: whole, cut off, old, empty; every command does with a damaged one what it can."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pandas as pd
import pytest

from testbed.analysis import report, summary
from testbed.analysis.run import load
from testbed.errors import UsageError
from testbed.experiment.results import FORMAT, READABLE, RunDirectory, as_now
from testbed.experiment.row import COLUMNS, MEASURED, Row
from testbed.experiment.runner import resume
from tests.analysis.conftest import Command
from tests.analysis.make_run import (
    change,
    draw,
    headline,
    lines,
    make_run,
    rewrite,
    write_calibration,
    write_manifest,
)
from tests.analysis.test_figures import words

COMMANDS = {
    "plot": ["plot", "RUN", "stages"],
    "report": ["report", "RUN"],
    "claims": ["claims", "RUN"],
    "recommend": ["recommend", "RUN", "--rate", "40mbit", "--delay", "20ms"],
    "compare": ["compare", "RUN", "RUN"],
    "guide": ["guide", "RUN"],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), tasks=("needle",), examples=3)


def of(run: Path, arguments: list[str]) -> list[str]:
    return [str(run) if word == "RUN" else word for word in arguments]


def test_every_row_is_read_into_typed_columns(run: Path) -> None:
    loaded = load(run)
    assert len(loaded.rows) == 4 * 3
    assert list(loaded.rows.columns)[: len(COLUMNS)] == list(COLUMNS)
    assert loaded.rows["kv_bytes"].dtype == "int64"
    for column in ("e2e_s", "score", "payload_bytes"):
        assert loaded.rows[column].dtype == "float64"
    assert loaded.rows["calibrated"].dtype == bool
    assert loaded.notes == ()
    # Guards the generator: a column that `Row` gains must not be silently absent from these tests.
    assert set(lines(run)[0]) == {f.name for f in dataclasses.fields(Row)}


def test_missing_columns_are_filled_and_unknown_ones_kept(run: Path) -> None:
    gone = ("nll", "retransmits", "calibrated")
    rewrite(run, [{k: v for k, v in r.items() if k not in gone} | {"kl": 0.5} for r in lines(run)])
    loaded = load(run).rows
    assert loaded[["nll", "retransmits"]].isna().all(axis=None)
    assert loaded["calibrated"].all()
    assert (loaded["kl"] == 0.5).all()


def test_values_of_the_wrong_kind_are_treated_as_missing(run: Path) -> None:
    odd = {
        "e2e_s": 10**400,
        "nll": "low",
        "payload_bytes": [1],
        "codec": 7,
        "score": math.inf,
        "calibrated": 3,
    }
    loaded = load(change(run, lambda row: odd)).rows
    assert loaded[["nll", "score", "payload_bytes"]].isna().all(axis=None)
    assert (loaded["codec"] == "").all()
    assert headline(run)


def test_failed_trials_are_kept_apart_unless_they_finished_later(run: Path) -> None:
    rows = lines(run)
    failed = rows[0] | {"error": "endpoint died", "e2e_s": 0.0}
    rewrite(run, [failed, *rows[1:]])
    assert RunDirectory(run).finished() == {r["trial"] for r in rows[1:]}
    rewrite(run, [failed, *rows[:5], rows[5] | {"error": "timeout"}, *rows[6:]])
    assert RunDirectory(run).finished() == {r["trial"] for r in rows} - {rows[5]["trial"]}
    loaded = load(run)
    assert (len(loaded.failed), len(loaded.rows)) == (1, len(rows) - 1)
    assert "1 trial failed (" in headline(run)


def test_lines_that_are_no_trials_are_not_counted_as_finished_ones(run: Path) -> None:
    rows = lines(run)
    rewrite(run, [{"trial": 3}, {"trial": [1], "error": ""}, rows[0] | {"example": 7}, *rows])
    loaded = load(run)
    assert len(loaded.rows) == len(rows)
    assert loaded.notes == ("3 unreadable lines of trials.jsonl passed over",)


def test_missing_or_broken_files_are_said_not_fatal(run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / "calibration.json").write_text("{ broken")
    (run / "compute.json").write_text('{"starts": [{"measurements": [{"edge": 3}]}]}')
    (run / "trials.jsonl").write_text((run / "trials.jsonl").read_text()[:-40])
    known = (
        "manifest.json is missing",
        "calibration.json cannot be read",
        "compute.json cannot be read",
        "1 unreadable line of trials.jsonl passed over",
    )
    assert load(run).notes == known
    assert f"Run directory: {'; '.join(known)}." in headline(run)
    assert all(gap in words("stages", run) for gap in known)


def test_where_selects_rows(run: Path) -> None:
    assert set(load(run, 'codec == "int8" and e2e_s > 0').rows["codec"]) == {"int8"}
    assert len(load(run, 'codec != "q2c@0.25+int8"').rows) == 4 * 3


@pytest.mark.parametrize(
    "where", ["nonsense ===", "colour == 3", "@pd.read_csv('x')", "codec.__class__", "e2e_s + 1"]
)
def test_a_where_that_selects_nothing_sensible_is_a_usage_error(run: Path, where: str) -> None:
    with pytest.raises(UsageError, match="--where"):
        load(run, where)


@pytest.mark.parametrize("opened", [load, RunDirectory.open, lambda path: resume(path, print, False)])
def test_what_is_no_run_directory_or_of_another_format_is_refused_by_whoever_opens_it(
    run: Path, tmp_path: Path, opened
) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a run directory"):
        opened(tmp_path)
    write_manifest(run, format=99)
    with pytest.raises(UsageError, match=r"format 99.*a newer testbed wrote it"):
        opened(run)


def test_a_run_from_before_kl_and_slowdowns_opens_with_nothing_invented(run: Path) -> None:
    write_manifest(run, format=1)
    new = ("kl", "edge_slowdown", "cloud_slowdown")
    rewrite(run, [{key: value for key, value in r.items() if key not in new} for r in lines(run)])
    rows = load(run).rows
    assert rows["kl"].isna().all()
    assert (rows[["edge_slowdown", "cloud_slowdown"]] == 1.0).all(axis=None)
    assert draw(run, ["latency_quality"])


def test_in_a_run_from_before_tokens_had_a_factor_of_their_own_they_were_stretched_as_all_else(
    run: Path,
) -> None:
    new = ("edge_decode_slowdown", "cloud_decode_slowdown", "edge_device", "cloud_device")
    rows = [{key: value for key, value in r.items() if key not in new} for r in lines(run)]
    rewrite(run, [row | {"edge_slowdown": 4.0} for row in rows])
    write_manifest(run, format=4)
    read = load(run).rows
    assert (read["edge_decode_slowdown"] == 4.0).all() and (read["cloud_decode_slowdown"] == 1.0).all()
    assert (read[["edge_device", "cloud_device"]] == "").all(axis=None)


@pytest.fixture
def older(run: Path) -> Path:
    """A run as format 2 left it: zeros where a trial failed, nothing of what came with format 3."""
    new = ("queue_s", "token_s", "answer_tokens", "replayed", "delivery")
    rows = [{key: value for key, value in row.items() if key not in new} for row in lines(run)]
    zeros = {column: 0 for column in MEASURED if column not in new}
    rows[0] |= {"error": "nothing arrived for 1 s", "answer": "", "score": None, **zeros}
    rewrite(run, rows)
    write_manifest(run, format=2, settings={"timeout": 90.0})
    return run


def test_the_zeros_of_an_older_runs_failed_row_are_read_as_unknown_and_its_seconds_have_a_unit(
    older: Path,
) -> None:
    directory = RunDirectory.open(older)
    failed, *finished = directory.rows()
    assert {failed[column] for column in MEASURED} == {None}
    assert failed["kv_bytes"] > 0
    assert all(row["e2e_s"] > 0 and row["queue_s"] == 0 and row["delivery"] == "whole" for row in finished)
    assert directory.settings() == load(older).scenario == {"timeout": "90s"}
    assert tuple(range(1, FORMAT + 1)) == READABLE
    assert all(
        as_now(row) == row for row in directory.rows()
    )  # migrations leave rows of today's format alone


@pytest.mark.parametrize("lost", ["", "trials.jsonl"])
def test_a_mean_over_all_rows_leaves_the_failed_ones_out(older: Path, lost: str) -> None:
    """Also where the table has to stand in for lost lines."""
    RunDirectory(older).write_parquet()
    frame = pd.read_parquet(older / "trials.parquet")
    assert frame["e2e_s"].isna().sum() == frame["payload_bytes"].isna().sum() == 1
    assert frame["e2e_s"].min() > 0
    assert str(frame["payload_bytes"].dtype) == "Int64"
    if lost:
        (older / lost).unlink()
    loaded = load(older)
    assert len(loaded.rows) == 4 * 3 - 1
    assert (loaded.rows["e2e_s"] > 0).all() and loaded.rows["payload_bytes"].notna().all()
    assert loaded.failed[list(MEASURED)].isna().all(axis=None)
    assert loaded.rows["answer_tokens"].isna().all()


@pytest.mark.parametrize("act", [draw, lambda run: summary.write(load(run)), headline])
def test_a_run_without_finished_trials_says_so(run: Path, act) -> None:
    change(run, lambda row: {"error": "the cloud died\nat length"})
    with pytest.raises(UsageError, match=r"no finished trials \(12 failed, the first with: the cloud died\)"):
        act(run)
    (run / "trials.jsonl").unlink()
    with pytest.raises(UsageError, match="has no finished trials"):
        act(run)
    assert not (run / "figures").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_what_root_writes_belongs_to_the_runs_owner(run: Path) -> None:
    os.chown(run, 12345, 23456)
    written = [summary.write(load(run)), *draw(run, ["stages"])]
    for path in [*written, run / "figures"]:
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456), path


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_is_missing_and_goes_on(name: str, run: Path, command: Command) -> None:
    rows = lines(run)
    rewrite(run, [rows[0] | {"error": "the cloud died"}, *rows[1:]])
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"trial": 3}\n[1]\n{"trial": "cut o')
    (run / "calibration.json").unlink()
    status, out, err = command(*of(run, COMMANDS[name]))
    assert status == 0
    assert out
    for gap in (
        "1 failed trial left out",
        "calibration.json is missing",
        "3 unreadable lines of trials.jsonl passed over",
    ):
        assert f"testbed: {run}: {gap}\n" in err


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_manifest_that_says_nothing_stops_no_command(name: str, run: Path, command: Command) -> None:
    (run / "manifest.json").write_text('{"format": 2, "settings": 3, "host": [1], "name": null, "inputs": 7}')
    (run / "calibration.json").write_text('{"measurements": {"attempts": 4}}')
    status, out, _ = command(*of(run, COMMANDS[name]))
    assert status == 0
    if name == "compare":
        assert "A: settings unknown" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_run_is_one_clear_line(name: str, run: Path, command: Command) -> None:
    (run / "trials.jsonl").write_text("")
    complaint = f"{run} has no finished trials; continue the run with: testbed run --resume {run}"
    assert command(*of(run, COMMANDS[name])) == (2, "", f"testbed: {complaint}\n")


def test_a_run_that_its_links_stopped_shows_them(run: Path, command: Command) -> None:
    write_calibration(run, ("lte",), off=("lte",))
    (run / "trials.jsonl").unlink()
    status, out, _ = command("plot", run, "fidelity")
    assert status == 0
    assert "fidelity.png" in out
    assert not (run / "summary.csv").exists()


def test_one_row_is_refused_by_figures_that_compare_and_drawn_by_its_timeline(
    run: Path, command: Command
) -> None:
    rewrite(run, lines(run)[:1])
    status, _, err = command("plot", run)
    assert status == 2
    assert err.endswith(f"{run} has 1 finished trial; a figure compares at least 2\n")
    assert not (run / "figures").exists()
    assert command("plot", run, "timeline")[0] == 0


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("manifest.json", '{"format": 2, "settings": [1]}', "has no `settings`"),
        ("manifest.json", "{ broken", "manifest.json cannot be read"),
        ("counters.json", "{ broken", "counters.json cannot be read"),
        ("calibration.json", "[]", "calibration.json does not hold a JSON object"),
    ],
)
def test_a_run_that_cannot_be_gone_on_with_is_refused_before_anything_is_built(
    run: Path, name: str, content: str, said: str
) -> None:
    (run / name).write_text(content)
    with pytest.raises(UsageError, match=said):
        resume(run, lambda progress: None, False)


def test_rows_that_no_run_writes_are_said_where_they_cannot_be_written_as_a_table(run: Path) -> None:
    rows = lines(run)
    rewrite(run, [rows[0] | {"e2e_s": "soon"}, *rows[1:]])
    with pytest.raises(UsageError, match=r"trials.jsonl: rows that no run writes: .*e2e_s"):
        RunDirectory(run).write_parquet()
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []
    assert lines(run)[0]["e2e_s"] == "soon"


def test_half_a_surrogate_pair_in_a_row_or_a_manifest_is_shown_as_a_question_mark(run: Path) -> None:
    first, *others = lines(run)
    rewrite(run, [first | {"answer": "\ud800", "profile": "\ud83d\ude00 \udc80"}, *others])
    write_manifest(run, name="\ud800")
    read = next(RunDirectory(run).rows())
    assert (read["answer"], read["profile"]) == ("?", "\U0001f600 ?")
    summary.write(load(run))
    report.write(load(run), [])
