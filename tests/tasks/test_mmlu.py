"""MMLU's CSV files: questions with four options, asked behind others."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.mmlu import LETTERS, read
from tests.tasks.counting import Counter

#: As the first lines of a subject's file are.
TEST = """"How many sides has a square, seen from above?",Three,Four,Five,Six,B
Find the order of Z_6.,1,3,6,12,C
"Statement 1 | Every ring is a group.
Statement 2 | Every field is a ring.","True, True","False, False","True, False","False, True",A
"""
DEV = "Find 2 + 2.,1,2,3,4,D\nWhich is prime?,7,8,9,10,A\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As the archive has them: test/ and dev/ beside each other."""
    for folder, text in (("test", TEST), ("dev", DEV)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"abstract_algebra_{folder}.csv").write_text(text)
    return tmp_path / "test" / "abstract_algebra_test.csv"


def test_questions_are_read_with_options_and_letter(file: Path) -> None:
    dev, own = read(str(file))
    assert [(asked.id, asked.letter) for asked in own] == [
        ("abstract_algebra_test-1", "B"), ("abstract_algebra_test-2", "C"), ("abstract_algebra_test-4", "A")
    ]  # fmt: skip
    assert own[0].question == "How many sides has a square, seen from above?"
    assert own[2].options == ("True, True", "False, False", "True, False", "False, True")
    assert [asked.question for asked in dev] == ["Find 2 + 2.", "Which is prime?"]


def test_a_question_is_asked_behind_those_of_dev_and_then_others_with_their_answers(file: Path) -> None:
    task = make_task("mmlu", path=str(file))
    for example in task.examples(3, None, Counter(), 0):
        assert example.context.startswith("Find 2 + 2.\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\nWhich is prime?\n")
        assert example.context.count("\nAnswer: ") == 4  # the two of dev, and the file's two others
        assert example.question not in example.context
        assert task.context_text(example).endswith("\n") and task.question_text(example).endswith("\nAnswer:")
        assert task.choice_texts(example) == [" A", " B", " C", " D"]
        assert task.answer_text(example) in task.choice_texts(example)
        right = example.answers[0]
        assert [task.score(f" {letter}", example)["score"] for letter in LETTERS] == [
            float(letter == right) for letter in LETTERS
        ]


def test_a_length_holds_as_many_as_fit(file: Path) -> None:
    task = make_task("mmlu", path=str(file))
    for tokens in (30, 60, 100):
        for example in task.examples(2, tokens, Counter(), 0):
            assert 0 < Counter()(task.context_text(example)) <= tokens
    with pytest.raises(UsageError, match="2 examples were asked"):
        task.examples(2, 5, Counter(), 0)


def test_the_same_arguments_give_the_same_examples_and_a_larger_count_only_adds(file: Path) -> None:
    task = make_task("mmlu", path=str(file))
    assert task.examples(3, 80, Counter(), 1)[:2] == task.examples(2, 80, Counter(), 1)


def test_a_file_without_dev_shows_its_own_and_a_heading_is_no_question(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_text(f"question,A,B,C,D,answer\r\n{TEST}", newline="")
    dev, own = read(str(path))
    assert not dev and len(own) == 3
    (example,) = make_task("mmlu", path=str(path)).examples(1, None, Counter(), 0)
    assert example.context.count("\nAnswer: ") == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Which?,1,2,3,4,A\nWhich, then?,1,2,3,4,B\n", r"a\.csv:2: 7 fields.*texts with commas in quotes"),
        ("Which?,1,2,3,A\n", r"a\.csv:1: 5 fields"),
        ("Which?,1,2,3,4,E\n", r"a\.csv:1: the answer 'E' is none of A, B, C, D"),
        ("Which?,1,,3,4,A\n", r"a\.csv:1: a question or an option is empty"),
        ('Which?,1,2,3,4,A\n"Which?,1,2\n', r"a\.csv:2: not CSV"),
        ("", "1 examples were asked"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named_with_the_remedy(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint) as caught:
        make_task("mmlu", path=str(path)).examples(1, None, Counter(), 0)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe,1,2,3,4,A")
    with pytest.raises(UsageError, match=r"a\.csv: not in UTF-8"):
        read(str(tmp_path / "a.csv"))


field = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.tuples(field, field, field, field, field, st.sampled_from(LETTERS)), max_size=5))
def test_what_csv_writes_is_read_as_it_was(tmp_path: Path, questions: list[tuple[str, ...]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(questions)
    path = tmp_path / "any.csv"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    known = [
        q for n, q in enumerate(questions) if not (n == 0 and [f.lower() for f in q[-2:]] == ["d", "answer"])
    ]
    _, own = read(str(path))
    assert [(a.question, *a.options, a.letter) for a in own] == [
        tuple(" ".join(f.split()) for f in q) for q in known
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.text(st.sampled_from('ab",\n\r\0A '), max_size=60) | st.text(max_size=40))
def test_any_text_gives_questions_or_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        _, own = read(str(path))
    except UsageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert all(asked.letter in LETTERS and asked.question and all(asked.options) for asked in own)
