"""`testbed check`: a run that agrees with itself passes, and each thing that was tampered with is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.analysis import comparisons, naive, summary
from testbed.analysis.check import check
from testbed.analysis.run import load
from testbed.delivery.run_lengths import each, run_lengths
from testbed.experiment.provenance import QUESTIONS
from testbed.experiment.results import FORMAT, RunDirectory
from testbed.experiment.row import STAGES
from tests.analysis.conftest import Command
from tests.analysis.make_run import change, lines, make_run, rewrite, write_manifest

ANSWERS = {"right": 1.0, "left": 0.0}


def _consistent(row: dict[str, Any]) -> dict[str, Any]:
    name = hashlib.blake2b(
        f"{row['cell']}/{row['example']}/{row['repeat']}".encode(), digest_size=8
    ).hexdigest()
    answer = "right" if int(row["example"].rpartition("-")[2]) % 3 else "left"
    score = ANSWERS[answer]
    return {
        "trial": name,
        "answer": answer,
        "reference_answer": "right",
        **dict.fromkeys(("score", "em", "f1"), score),
        "reference_score": 1.0,
        "bits_per_element": row["payload_bytes"] * 16 / row["kv_bytes"]
        if row["placement"] == "split"
        else 0.0,
        "levels": "int8*2,text",
        "warnings": "late; later",
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: rows that follow from each other, questions, spans of stages one after the other, tables."""
    path = change(
        make_run(
            tmp_path_factory.mktemp("whole") / "run",
            ("lte",),
            ("fp16", "int8"),
            tasks=("needle",),
            examples=6,
        ),
        _consistent,
    )
    write_manifest(path, settings={"tasks": [{"task": "needle", "examples": 6}]})
    rows = lines(path)
    asked = [
        {
            "task": "needle",
            "example": name,
            "question": "Which?",
            "answers": ["the right"],
            "choices": [],
            "gold": "",
        }
        for name in dict.fromkeys(row["example"] for row in rows)
    ]
    (path / QUESTIONS).write_text("".join(json.dumps(each) + "\n" for each in asked))
    trials = len(rows) // len(asked)
    batch = {"task": "needle", "first": 0, "trials": trials, "examples": [each["example"] for each in asked]}
    (path / "examples.json").write_text(json.dumps({"format": FORMAT, "batches": [batch]}))
    with (path / "spans.jsonl").open("w") as file:
        for row in rows:
            spans, at = [], 0.0
            for stage in STAGES:
                ends = {"start_s": round(at, 6), "end_s": round(at + row[stage], 6)}
                spans.append(
                    {
                        "chunk": 0,
                        "stage": stage.removesuffix("_s"),
                        **ends,
                        "side": "edge",
                        "level": "",
                        "bytes": 0,
                    }
                )
                at += row[stage]
            file.write(json.dumps({"trial": row["trial"], "spans": spans}) + "\n")
    RunDirectory(path).write_parquet()
    for table in (summary, comparisons, naive):
        table.write(load(path))
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same, to be tampered with."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _first(**columns: Any) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        rows = lines(run)
        rewrite(run, [rows[0] | columns, *rows[1:]])

    return tamper


def _in(name: str, before: str, after: str) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        text = (run / name).read_text()
        assert before in text
        (run / name).write_text(text.replace(before, after, 1))

    return tamper


def _cell(name: str, column: str, value: str) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        table = pd.read_csv(run / name, dtype=str, keep_default_na=False)
        table.loc[0, column] = value
        table.to_csv(run / name, index=False)

    return tamper


def _twice(run: Path) -> None:
    rows = lines(run)
    rewrite(run, [*rows, rows[0]])


def test_a_run_that_agrees_with_itself_has_no_deviation(run: Path, command: Command) -> None:
    found = check(run)
    assert found.deviations == found.notes == ()
    rows = len(lines(run))
    assert found.counts["rows"] == rows and found.counts["scores"] == 4 * rows
    assert found.counts["table cells"] > 100 and found.counts["spans"] == rows * len(STAGES)
    status, out, _ = command("check", run)
    assert status == 0 and out.startswith("no deviation in 24 rows")


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (_first(score=0.5), "its answer's score is 0, score 0.5"),
        (_first(answer="right"), "its answer's score is 1, score 0"),
        (_first(reference_answer="wrong"), "its answer's score is 0, reference_score 1"),
        (_first(e2e_s=99.0), "e2e_s 99"),
        (_first(prefill_s=0.1), "its stages' sum"),
        (_first(prefill_s=0.1), "prefill_s by its spans"),
        (_first(ttft_s=0.1), "ttft_s 0.1"),
        (_first(naive_s=1e-3), "naive_s 0.001"),
        (_first(bits_per_element=3.0), "bits_per_element 3"),
        (_first(cell="another"), "are those of trial"),
        (_first(example="needle-99"), "examples.json does not name it"),
        (_first(retransmits=10_000), "trials.parquet: row 0: retransmits"),
        (_first(retransmits=10_000), "summary.csv:2: retransmits"),
        (_twice, "has 2 finished rows"),
        (_twice, "was to have 4"),
        (_cell("summary.csv", "e2e_s", "0.5"), "summary.csv:2: e2e_s is 0.5, the rows give"),
        (_cell("comparisons.csv", "n", "7"), "comparisons.csv:2: n is 7, the rows give 6"),
        (_cell("naive_error.csv", "ratio", ""), "naive_error.csv:2: ratio is empty"),
        (_in("summary.csv", "e2e_s_lo", "low"), "summary.csv: its columns are others"),
        (_in(QUESTIONS, "the right", "the wrong"), "its answer's score"),
    ],
)
def test_what_was_tampered_with_is_named(
    run: Path, command: Command, tamper: Callable[[Path], None], said: str
) -> None:
    tamper(run)
    status, out, _ = command("check", run)
    assert status == 1 and any(said in line for line in out.splitlines()), out


def test_a_table_is_held_against_the_rows_to_its_last_digit_but_one(run: Path) -> None:
    kept = pd.read_csv(run / "summary.csv")
    _cell("summary.csv", "e2e_s", str(kept.loc[0, "e2e_s"] * (1 + 1e-5)))(run)
    assert check(run).deviations == ()
    _cell("summary.csv", "e2e_s", str(kept.loc[0, "e2e_s"] * (1 + 1e-4)))(run)
    assert len(check(run).deviations) == 1


def test_an_older_run_is_checked_as_far_as_it_goes(run: Path, command: Command) -> None:
    for name in (QUESTIONS, "spans.jsonl", "examples.json", "trials.parquet", "summary.csv"):
        (run / name).unlink()
    found = check(run)
    assert found.deviations == ()
    assert [note.partition(":")[0] for note in found.notes] == [
        "not scored again",
        "stages not derived again",
    ]
    status, out, _ = command("check", run, "--json")
    assert status == 0 and json.loads(out)["counts"]["rows"] == 24


def test_what_is_no_run_ends_in_a_line(tmp_path: Path, run: Path, command: Command) -> None:
    status, _, errors = command("check", tmp_path / "nothing")
    assert status == 2 and len(errors.splitlines()) == 1
    (run / QUESTIONS).write_text("[]\n")
    status, _, errors = command("check", run)
    assert status == 2 and f"{QUESTIONS}:1" in errors and len(errors.splitlines()) == 1


def test_columns_have_their_types_and_are_read_as_they_were_written(run: Path) -> None:
    rows = lines(run)
    failed = {"error": "no", "kv_bytes": 0, "context_tokens": 0, "e2e_s": None, "payload_bytes": None}
    rewrite(run, [rows[0] | failed, *rows[1:]])
    directory = RunDirectory(run)
    before = list(directory.rows())
    directory.write_parquet()
    table = pd.read_parquet(run / "trials.parquet")
    assert str(table["started_at"].dtype) == "datetime64[ms, UTC]"
    assert list(table["levels"][0]) == ["int8", "int8", "text"] and list(table["warnings"][0]) == [
        "late",
        "later",
    ]
    assert list(table["handover"][0]) == [] and list(table["reused"][6]) == list(
        filter(None, [rows[6]["reused"]])
    )
    assert table["kv_bytes"].isna().sum() == table["context_tokens"].isna().sum() == 1
    assert str(table["planes"].dtype) == "Int64" and str(table["met"].dtype) == "boolean"
    (run / "trials.jsonl").unlink()
    after, _ = directory.all_rows()
    for one, other in zip(before, after, strict=True):
        moments = [pd.Timestamp(row.pop("started_at")) for row in (one, other)]
        assert one == other and moments[0] == moments[1]


@given(
    st.lists(
        st.sampled_from(["int8", "text", "skip", "q2c@0.05+int4", "kvquant(bits=3,outliers=0.01)", "a*2b"])
    )
)
def test_levels_are_read_as_they_are_written(levels: list[str]) -> None:
    assert each(run_lengths(levels)) == levels


@given(st.text(max_size=40))
def test_any_text_of_levels_becomes_a_list(text: str) -> None:
    assert all(isinstance(level, str) for level in each(text))
