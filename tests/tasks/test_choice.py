"""Multiple choice: options that come with the passages, and those of files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.passages import load_passages
from testbed.tasks.rows import choice_rows
from tests.tasks.counting import Counter


def test_every_passages_question_has_four_options_of_which_its_text_holds_the_right_one_alone() -> None:
    rows = choice_rows()
    assert len(rows) == 3 * len(load_passages())
    for row in rows:
        assert len(set(row.choices)) == 4 and row.answers[0] in row.choices
        told = [c for c in row.choices if re.search(rf"\b{re.escape(c)}\b", row.context, re.IGNORECASE)]
        assert told == [row.answers[0]]


def test_the_right_options_place_among_the_options_tells_nothing() -> None:
    places = [row.choices.index(row.answers[0]) for row in choice_rows()]
    assert all(12 <= places.count(place) <= 36 for place in range(4))


def test_only_the_gold_options_very_text_is_right() -> None:
    task = make_task("choice")
    (example,) = task.examples(1, 300, Counter(), seed=0)
    for choice in example.choices:
        right = float(choice == example.answers[0])
        assert task.score(f" {choice}", example) == {"score": right, "em": right, "f1": right}
    assert task.choice_texts(example) == [f" {choice}" for choice in example.choices]
    assert task.answer_text(example) in task.choice_texts(example)


def test_options_are_shown_only_where_that_is_asked_for() -> None:
    for options, shown in (("hidden", False), ("listed", True)):
        task = make_task("choice", options=options)
        (example,) = task.examples(1, 300, Counter(), seed=0)
        assert all((choice in task.question_text(example)) == shown for choice in example.choices)


def test_a_files_rows_need_choices_that_hold_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"context": "Ann bakes.", "question": "Who bakes?", "answers": ["Ann"]}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match="no rows with choices"):
        make_task("choice", path=str(path)).examples(1, None, Counter(), 0)
    path.write_text(json.dumps({**row, "choices": ["Bob", "Cid"]}) + "\n\n")
    with pytest.raises(UsageError, match="'Ann' is none of its choices"):
        make_task("choice", path=str(path)).examples(1, None, Counter(), 0)
    path.write_text(json.dumps({**row, "choices": ["Bob", "Ann"]}) + "\n\n\n")
    (example,) = make_task("choice", path=str(path)).examples(1, None, Counter(), 0)
    assert example.choices == ("Bob", "Ann")


@pytest.mark.parametrize("choices", ["Ann", ["Ann"], ["Ann", "Ann"], ["Ann", 3], ["x"] * 65])
def test_malformed_choices_are_named_by_file_and_line(tmp_path: Path, choices: object) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"context": "Ann bakes.", "question": "Who bakes?", "answers": ["Ann"], "choices": choices}
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(UsageError, match=rf"{path}:2: choices"):
        make_task("choice", path=str(path)).examples(1, None, Counter(), 0)


@pytest.mark.parametrize("name", ["mctest", "boolq"])
def test_well_known_choice_sets_are_read(name: str, data: Path) -> None:
    path = data / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    task, count = make_task("choice", path=str(path)), Counter()
    for example in task.examples(40, 600, count, seed=0):
        assert example.answers[0] in example.choices
        assert count(task.context_text(example)) <= 600
