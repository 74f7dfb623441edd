"""Every command that reads a run does with a damaged one what it can, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed import analysis
from testbed.analysis.run import load
from testbed.cli import main
from testbed.errors import UsageError
from testbed.experiment.results import RunDirectory
from tests.analysis.make_run import make_run, write_calibration
from tests.analysis.test_run_directory import lines, rewrite

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
    return make_run(tmp_path / "run", ("5g-mid",), ("fp16", "int8"), ("split",), ("needle",), examples=6)


def told(arguments: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(run) if word == "RUN" else word for word in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_is_missing_and_goes_on(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines(run)
    rewrite(run, [rows[0] | {"error": "the cloud died"}, *rows[1:]])
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"trial": 3}\n[1]\n{"trial": "cut o')
    (run / "calibration.json").unlink()
    status, out, err = told(COMMANDS[command], run, capsys)
    assert status == 0
    assert out
    for gap in (
        "1 failed trial left out",
        "calibration.json is missing",
        "3 unreadable lines of trials.jsonl passed over",
    ):
        assert f"testbed: {run}: {gap}\n" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_manifest_that_says_nothing_stops_no_command(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "manifest.json").write_text('{"format": 2, "settings": 3, "host": [1], "name": null}')
    (run / "calibration.json").write_text('{"measurements": {"attempts": 4}}')
    status, out, _ = told(COMMANDS[command], run, capsys)
    assert status == 0
    if command == "compare":
        assert "A: settings unknown" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_run_is_one_clear_line(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "trials.jsonl").write_text("")
    status, out, err = told(COMMANDS[command], run, capsys)
    assert (status, out) == (2, "")
    assert err == (
        f"testbed: {run} has no finished trials; continue the run with: testbed run --resume {run}\n"
    )


def test_a_run_that_its_links_stopped_shows_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_calibration(run, ("5g-mid",), off=("5g-mid",))
    (run / "trials.jsonl").unlink()
    status, out, _ = told(["plot", "RUN", "fidelity"], run, capsys)
    assert status == 0
    assert "fidelity.png" in out
    assert not (run / "summary.csv").exists()


def test_one_row_is_refused_by_figures_that_compare_and_drawn_by_its_timeline(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, lines(run)[:1])
    status, _, err = told(["plot", "RUN"], run, capsys)
    assert status == 2
    assert err.endswith(f"{run} has 1 finished trial; a figure compares at least 2\n")
    assert told(["plot", "RUN", "timeline"], run, capsys)[0] == 0


def test_lines_that_are_no_trials_are_not_counted_as_finished_ones(run: Path) -> None:
    rows = lines(run)
    rewrite(run, [{"trial": 3}, {"trial": [1], "error": ""}, rows[0] | {"example": 7}, *rows])
    loaded = load(run)
    assert len(loaded.rows) == len(rows)
    assert loaded.notes == ("3 unreadable lines of trials.jsonl passed over",)


def test_failed_trials_are_not_finished_until_another_row_says_so(run: Path) -> None:
    rows = lines(run)
    failed = rows[0] | {"error": "the cloud died"}
    rewrite(run, [failed, *rows[1:]])
    assert RunDirectory(run).finished() == {r["trial"] for r in rows[1:]}
    rewrite(run, [failed, *rows])
    assert RunDirectory(run).finished() == {r["trial"] for r in rows}


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
    from testbed.experiment.runner import resume

    (run / name).write_text(content)
    with pytest.raises(UsageError, match=said):
        resume(run, lambda progress: None, False)


def test_rows_that_no_run_writes_are_said_where_they_cannot_be_written_as_a_table(run: Path) -> None:
    rows = lines(run)
    rewrite(run, [rows[0] | {"e2e_s": "soon"}, *rows[1:]])
    with pytest.raises(UsageError, match=r"trials.jsonl: rows that no run writes: .*e2e_s"):
        RunDirectory(run).write_parquet()
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []
    assert json.loads((run / "trials.jsonl").read_text().splitlines()[0])["e2e_s"] == "soon"


def test_half_a_surrogate_pair_in_a_row_or_a_manifest_is_shown_as_a_question_mark(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    rows[0] |= {"answer": "\ud800", "profile": "\ud83d\ude00 \udc80"}
    (run / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"name": "\ud800"}))
    first = next(RunDirectory(run).rows())
    assert (first["answer"], first["profile"]) == ("?", "\U0001f600 ?")
    analysis.write_summary(run)
    analysis.write_report(run, [])
