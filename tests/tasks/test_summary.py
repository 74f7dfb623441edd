"""Summaries: the texts of well-known data sets, in records of their forms written here, and ROUGE-L."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.forms import SUMMARIZE
from testbed.tasks.jsonl import read_rows
from testbed.tasks.metrics import rouge_l
from tests.tasks.counting import Counter

TEXT = (
    "The council met on Monday. It heard a report on bridges. Nine of them need repair. Nobody objected. " * 6
)
GOV_REPORT = {
    "input": "", "context": TEXT, "answers": ["Nine bridges need repair."], "length": 120, "dataset": "gov_report",
    "language": "en", "all_classes": None, "_id": "g1",
}  # fmt: skip
QMSUM = GOV_REPORT | {"input": "What was said of bridges?", "dataset": "qmsum", "_id": "q1"}
XSUM = {"document": TEXT, "summary": "Bridges need repair.", "id": "x1"}
CNN = {"article": TEXT, "highlights": "Nine bridges need repair .\nNobody objected .", "id": "c1"}
OWN = {"id": "o1", "context": "Ann bakes. " * 3, "answers": ["Ann bakes."], "summary": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, (GOV_REPORT, QMSUM, XSUM, CNN, OWN))))
    return file


def test_each_form_asks_for_a_summary(path: Path) -> None:
    rows = read_rows(path)
    assert [row.id for row in rows] == ["g1", "q1", "x1", "c1", "o1"]
    assert all(row.summary for row in rows)
    assert [row.question for row in rows] == [SUMMARIZE, "What was said of bridges?", *[SUMMARIZE] * 3]
    assert rows[3].answers == ("Nine bridges need repair . Nobody objected .",)


def test_a_length_is_the_beginning_of_a_longer_text_and_shorter_ones_are_passed_over(path: Path) -> None:
    task = make_task("summary", path=str(path))
    examples = task.examples(4, 60, Counter(), 0)
    assert {example.id for example in examples} == {"g1", "q1", "x1", "c1"}
    for example in examples:
        assert TEXT.startswith(example.context) and 40 < Counter()(task.context_text(example)) <= 60
    with pytest.raises(UsageError, match="5 examples were asked"):
        task.examples(5, 60, Counter(), 0)
    assert len(task.examples(5, None, Counter(), 0)) == 5


def test_the_score_is_rouge_l(path: Path) -> None:
    task = make_task("summary", path=str(path))
    example = next(e for e in task.examples(4, 60, Counter(), 0) if e.id == "x1")
    scores = task.score(" Many bridges are in need of repair.\nMore.", example)
    assert scores["score"] == pytest.approx(2 * 3 / (3 + 7)) and scores["em"] == 0
    assert task.score(" Bridges need repair.", example) == {"score": 1.0, "em": 1.0, "f1": 1.0}
    for shown in task.demonstrations:
        assert task.score(shown.answers[0], shown)["score"] == 1.0


def test_qa_leaves_summaries_to_this_task_and_this_one_questions_to_it(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 'g1' asks for a summary; take the task summary"):
        make_task("qa", path=str(path)).examples(1, None, Counter(), 0)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"context": "Ann bakes.", "question": "Who?", "answers": ["Ann"]}))
    with pytest.raises(UsageError, match="has no rows that ask for a summary"):
        make_task("summary", path=str(asked)).examples(1, None, Counter(), 0)


@pytest.mark.parametrize("wrong", [OWN | {"summary": "yes"}, OWN | {"answers": []}, OWN | {"context": ""}])
def test_a_bad_line_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, (OWN, wrong | {"id": "o2"}))))
    with pytest.raises(UsageError, match=r"rows\.jsonl:2: "):
        read_rows(file)


def test_rouge_l_is_the_published_example() -> None:
    """Of the README of Google's rouge_score: precision 5/8, recall 5/9."""
    found = rouge_l("The quick brown dog jumps on the log.", ["The quick brown fox jumps over the lazy dog"])
    assert found == pytest.approx(2 * (5 / 8) * (5 / 9) / (5 / 8 + 5 / 9))


words = st.lists(st.sampled_from(["the", "quick", "brown", "fox", "jumps", "dog", "7"]), max_size=9)


@given(words, st.lists(words, max_size=3))
def test_rouge_l_is_its_definition(given_words: list[str], golds: list[list[str]]) -> None:
    def definition(a: list[str], b: list[str]) -> float:
        @cache
        def common(i: int, j: int) -> int:
            if not i or not j:
                return 0
            return (
                common(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(common(i - 1, j), common(i, j - 1))
            )

        precision, recall = (common(len(a), len(b)) / (len(side) or 1) for side in (a, b))
        return 2 * precision * recall / (precision + recall) if precision else 0.0

    expected = max((definition(given_words, gold) for gold in golds), default=0.0)
    assert rouge_l(", ".join(given_words).upper(), [" ".join(gold) for gold in golds]) == pytest.approx(
        expected
    )


@given(st.text(), st.lists(st.text(), max_size=2))
def test_rouge_l_of_any_texts_lies_between_0_and_1(answer: str, golds: list[str]) -> None:
    assert 0 <= rouge_l(answer, golds) <= 1


def test_characters_count_where_words_have_no_spaces() -> None:
    assert rouge_l("九座桥需要修", ["九座桥要修"]) == pytest.approx(2 * 5 / 11)
