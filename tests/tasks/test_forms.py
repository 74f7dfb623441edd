"""Files of well-known data sets, as they are distributed: small ones of the same form, written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.jsonl import Row, read_rows
from tests.tasks.counting import Counter

STORY = "Ann bakes bread in Oslo. Bob sails."

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Oslo",
            "paragraphs": [
                {
                    "context": STORY,
                    "qas": [
                        {
                            "id": "s1",
                            "question": "Who bakes?",
                            "answers": [
                                {"text": "Ann", "answer_start": 0},
                                {"text": "Ann", "answer_start": 0},
                                {"text": "Ann bakes", "answer_start": 0},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "id": "s2",
                            "question": "Who flies?",
                            "answers": [],
                            "plausible_answers": [{"text": "Bob", "answer_start": 25}],
                            "is_impossible": True,
                        },
                    ],
                },
                {
                    "context": "Snow fell.",
                    "qas": [
                        {
                            "id": "s3",
                            "question": "What fell?",
                            "answers": [{"text": "Snow", "answer_start": 0}],
                        }
                    ],
                },
            ],
        }
    ],
}
HOTPOT = [
    {
        "_id": "h1",
        "question": "Where does the baker live?",
        "answer": "Oslo",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [["Ann", 0], ["Bread", 1]],
        "context": [["Ann", ["Ann lives in Oslo.", " She bakes."]], ["Bob", ["Bob sails."]], ["Bread", ["It is baked."]]],
    }
]  # fmt: skip
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where does the baker live?",
    "answer": "Oslo",
    "answer_aliases": ["Christiania"],
    "answerable": True,
    "question_decomposition": [],
    "paragraphs": [
        {"idx": 0, "title": "Ann", "paragraph_text": "Ann lives in Oslo.", "is_supporting": True},
        {"idx": 1, "title": "Bob", "paragraph_text": "Bob sails.", "is_supporting": False},
    ],
}
LONGBENCH = {
    "input": "Who bakes?",
    "context": STORY,
    "answers": ["Ann", "Ann B."],
    "length": 7,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "l1",
}
RULER = {
    "index": 3,
    "input": "A special magic number is hidden within the following text.\nThe number for hall is 71. The sea.\n"
    "What is the special magic number for hall mentioned in the provided text?",
    "outputs": ["71"],
    "length": 40,
}


def written(path: Path, text: str) -> tuple[Row, ...]:
    path.write_text(text, encoding="utf-8")
    return read_rows(path)


def test_squads_nested_articles_are_rows_and_questions_without_an_answer_are_passed_over(
    tmp_path: Path,
) -> None:
    for number, indent in enumerate((None, 1)):
        rows = written(tmp_path / f"{number}.json", json.dumps(SQUAD, indent=indent))
        assert [(row.id, row.question, row.context, row.answers) for row in rows] == [
            ("s1", "Who bakes?", STORY, ("Ann", "Ann bakes")),
            ("s3", "What fell?", "Snow fell.", ("Snow",)),
        ]
    task = make_task("qa", path=str(tmp_path / "0.json"))
    assert {example.answers[0] for example in task.examples(2, None, Counter(), 0)} == {"Ann", "Snow"}


def test_hotpotqas_own_file_has_its_gold_paragraphs(tmp_path: Path) -> None:
    (row,) = written(tmp_path / "dev.json", json.dumps(HOTPOT))
    assert (row.id, row.answers) == ("h1", ("Oslo",))
    assert row.paragraphs == (
        ("Ann: Ann lives in Oslo. She bakes.", True),
        ("Bob: Bob sails.", False),
        ("Bread: It is baked.", True),
    )
    assert make_task("multihop", path=str(tmp_path / "dev.json")).examples(1, None, Counter(), 0)


def test_lines_of_musique_longbench_and_ruler_are_rows_beside_our_own(tmp_path: Path) -> None:
    own = {"id": "o1", "context": STORY, "question": "Who sails?", "answers": ["Bob"]}
    text = "\n".join(map(json.dumps, (MUSIQUE, LONGBENCH, RULER, own)))
    musique, longbench, ruler, ours = written(tmp_path / "rows.jsonl", text)
    assert (musique.id, musique.answers) == ("2hop__1_2", ("Oslo", "Christiania"))
    assert [gold for _, gold in musique.paragraphs] == [True, False]
    assert (longbench.id, longbench.question, longbench.answers) == ("l1", "Who bakes?", ("Ann", "Ann B."))
    assert ruler.context.endswith("is 71. The sea.") and ruler.answers == ("71",)
    assert ruler.question == "What is the special magic number for hall mentioned in the provided text?"
    assert (ours.id, ours.answers) == ("o1", ("Bob",))
    assert written(tmp_path / "lines.json", text) == (musique, longbench, ruler, ours)


def test_a_classifications_classes_are_its_choices_and_all_that_is_to_be_found_is_one_answer(
    tmp_path: Path,
) -> None:
    classified = LONGBENCH | {"answers": ["Food"], "all_classes": ["Food", "Place"]}
    several = RULER | {"outputs": ["71", "72"]}
    first, second = written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, (classified, several))))
    assert first.choices == ("Food", "Place") and second.answers == ("71, 72",)


def test_questions_whose_text_holds_no_answer_are_passed_over(tmp_path: Path) -> None:
    unanswerable = MUSIQUE | {"id": "2hop__3_4", "answerable": False}
    hub = {"id": "h", "context": STORY, "question": "Who flies?", "answers": {"text": [], "answer_start": []}}
    rows = written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, (unanswerable, MUSIQUE, hub))))
    assert [row.id for row in rows] == ["2hop__1_2"]
    assert written(tmp_path / "rows.json", json.dumps([unanswerable, MUSIQUE, hub])) == rows


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[{]", r"a\.json:1: not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"data": [{"paragraphs": 3}]}', r"a\.json:1: answers"),
        ('[{"question": "Who?", "answers": []}]', r"a\.json:1: answers"),
        (json.dumps([*HOTPOT, {"_id": "x"}]), r"a\.json:2: answers"),
        ('{"version": "1.1"}', r"a\.json:1: answers"),
        (json.dumps([RULER | {"input": "What?"}]), r"a\.json:1: context is missing"),
        (json.dumps([LONGBENCH | {"input": ""}]), r"a\.json:1: question is missing"),
        ('["\\ud800"]', r"a\.json:1: expected an object"),
    ],
)
def test_a_file_of_no_known_form_is_named_with_the_record(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        written(tmp_path / "a.json", text)
    assert "\n" not in str(caught.value)


KEYS = [*SQUAD, "paragraphs", "qas", "text", "title", *HOTPOT[0], *MUSIQUE, *LONGBENCH, *RULER]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
        max_leaves=12,
    )
)
def test_any_value_gives_rows_or_one_line(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "any.json"
    try:
        rows = written(path, json.dumps(value))
    except UsageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.context and row.question and row.answers for row in rows)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(
        st.tuples(texts, st.lists(st.tuples(texts, st.lists(texts, max_size=3)), max_size=3)), max_size=4
    )
)
def test_squads_nesting_keeps_each_answered_question_with_its_paragraph(
    tmp_path: Path, paragraphs: list[tuple[str, list[tuple[str, list[str]]]]]
) -> None:
    number = 0
    nested: list[dict[str, Any]] = []
    expected = []
    for context, asked in paragraphs:
        qas = []
        for question, answers in asked:
            number += 1
            qas.append(
                {
                    "id": f"q{number}",
                    "question": question,
                    "answers": [{"text": text, "answer_start": 0} for text in answers],
                    "is_impossible": not answers,
                }
            )
            if answers:
                expected.append((f"q{number}", " ".join(question.split())))
        nested.append({"context": context, "qas": qas})
    rows = written(tmp_path / "squad.json", json.dumps({"data": [{"title": "t", "paragraphs": nested}]}))
    assert [(row.id, row.question) for row in rows] == expected
