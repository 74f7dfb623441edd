from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.jsonl import Row, read_rows
from testbed.tasks.padding import around, most_that_fit, sentences
from testbed.tasks.rows import may_distract
from tests.tasks.counting import Counter

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(*rows: Any) -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return to_file


def row(i: int, **changes: Any) -> dict[str, Any]:
    story = f"Person{i} lives in Town{i}. " + " ".join(
        f"In Year{i}x{k} there was much rain." for k in range(6)
    )
    return {
        "id": f"r{i}",
        "context": story,
        "question": f"Where does Person{i} live?",
        "answers": [f"Town{i}"],
        **changes,
    }


def test_rows_are_taken_as_they_are_without_a_length(write: Write) -> None:
    path = write(
        row(1, context="One.\n\nTwo  \n three."),
        b"",
        row(2, id=7, question=" Who\n is it? "),
        {**row(3), "choices": ["x", "y"]},
    )
    found = {e.id: e for e in make_task("qa", path=path).examples(3, None, Counter(), seed=0)}
    assert set(found) == {"r1", "7", "r3"}
    assert found["r1"].context == "One.\nTwo\nthree."
    assert found["7"].question == "Who is it?"
    assert found["r3"].context == row(3)["context"]


def test_a_row_without_an_id_has_its_lines_number(write: Write) -> None:
    nameless = row(1)
    del nameless["id"]
    assert [r.id for r in read_rows(Path(write(row(0), nameless)))] == ["r0", "2"]


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (b"{", "not a line of JSON"),
        (b'{"context": "\xff"}', "not a line of JSON in UTF-8"),
        (b"[" * 100_000, "not a line of JSON"),
        ([1], "expected an object"),
        (row(2, context=" "), "context is missing or not a text"),
        (row(2, question=None), "question is missing or not a text"),
        (row(2, answers=[]), "answers is not a list with at least one text"),
        (row(2, answers="Town"), "answers is not a list"),
        (row(2, answers=["Town", 5]), "answers[1] is missing or not a text"),
        (row(2, id=None), "id is not a text"),
        (row(2, id="r1"), "the id 'r1' was given in line 1 already"),
        (row(2, context="half \ud800 pair"), "context is missing or not a text"),
        (row(2, paragraphs="x"), "paragraphs is not a list of objects"),
        (row(2, paragraphs=[{"title": "x"}]), "paragraphs[0].text is missing"),
        (b'"' + b"x" * (4 * 2**20) + b'"', "longer than 4 MiB"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(write: Write, second: Any, told: str) -> None:
    path = write(row(1), second)
    with pytest.raises(UsageError) as error:
        make_task("qa", path=path).examples(1, None, Counter(), seed=0)
    assert str(error.value).startswith(f"{path}:2: ")
    assert told in str(error.value)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "context", "question", "answers", "paragraphs", "text"]), c
            )
        ),
    ).map(lambda v: json.dumps(v).encode())
)
def test_no_line_does_worse_than_a_usage_error(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(line)
    try:
        read_rows(path)
    except UsageError as error:
        assert str(error).startswith(f"{path}:")


@pytest.mark.parametrize("tokens", [120, 300, 1500, 5000])
def test_a_short_context_is_padded_with_other_rows_to_the_asked_length(write: Write, tokens: int) -> None:
    task, count = make_task("qa", path=write(*map(row, range(20)))), Counter()
    for example in task.examples(5, tokens, count, seed=1):
        assert tokens - 40 <= count(task.context_text(example)) <= tokens
        own = row(int(example.id[1:]))["context"]
        assert example.context.splitlines().count(own) == 1
        assert example.context.count(example.answers[0] + ".") == 1


def test_depth_says_where_the_own_context_stands(write: Write) -> None:
    path = write(*map(row, range(20)))
    for depth, where in [(0, 0), (1, -1)]:
        for example in make_task("qa", path=path, depth=depth).examples(4, 600, Counter(), seed=1):
            assert example.context.splitlines()[where] == row(int(example.id[1:]))["context"]


def test_a_context_that_answers_the_question_too_is_no_distractor(write: Write) -> None:
    twin = row(2, context="Long ago, somebody else lived in Town1. " * 3)
    examples = make_task("qa", path=write(row(1), twin)).examples(2, 400, Counter(), seed=0)
    (example,) = [e for e in examples if e.id == "r1"]
    assert "somebody else" not in example.context
    assert example.context.count("Town1") == 1


def test_contexts_that_fit_come_first_and_longer_ones_are_cut_around_the_answer(write: Write) -> None:
    count = Counter()
    filler = " ".join(f"Nothing happened on Day{k} of that year." for k in range(60))
    rows = [row(i, context=f"{filler} Person{i} lives in Town{i}. {filler}") for i in range(5)] + [row(9)]
    task = make_task("qa", path=write(*rows))
    examples = task.examples(6, 200, count, seed=3)
    assert examples[0].id == "r9"
    for example in examples[1:]:
        assert 150 < count(task.context_text(example)) <= 200
        assert f"Person{example.id[1:]} lives in Town{example.id[1:]}." in sentences(example.context)
        assert example.context in rows[int(example.id[1:])]["context"]


def test_a_long_row_whose_answer_does_not_stand_in_it_is_passed_over(write: Write) -> None:
    path = write(row(1, answers=["because it was late"], context="It was dark. " * 200))
    with pytest.raises(
        UsageError, match=r"1 examples were asked; .* has 0 with a context of at most 100 tokens"
    ):
        make_task("qa", path=path).examples(1, 100, Counter(), seed=0)


def test_a_long_multi_hop_row_keeps_its_gold_paragraphs(write: Write) -> None:
    paragraphs = [
        {"title": f"T{i}", "text": f"Text number {i} is here. " * 8, "gold": i in (1, 6)} for i in range(8)
    ]
    context = "\n".join(f"{p['title']}: {p['text']}" for p in paragraphs)
    task, count = (
        make_task("qa", path=write(row(1, context=context, paragraphs=paragraphs, answers=["no"]))),
        Counter(),
    )
    (example,) = task.examples(1, 260, count, seed=0)
    titles = [line.split(":")[0] for line in example.context.splitlines()]
    assert {"T1", "T6"} < set(titles) and titles == sorted(titles)
    assert count(task.context_text(example)) <= 260


def test_the_same_arguments_give_the_same_examples_and_a_larger_count_only_adds(write: Write) -> None:
    task = make_task("qa", path=write(*map(row, range(30))))
    few, many = task.examples(3, 300, Counter(), seed=5), task.examples(12, 300, Counter(), seed=5)
    assert many[:3] == few
    assert [e.id for e in task.examples(12, 300, Counter(), seed=6)] != [e.id for e in many]
    assert [e.id for e in task.examples(3, None, Counter(), seed=5)] == [e.id for e in few]


def test_more_examples_than_rows_are_refused(write: Write) -> None:
    with pytest.raises(UsageError, match=r"2 examples were asked; .*rows\.jsonl has 1$"):
        make_task("qa", path=write(row(1))).examples(2, None, Counter(), seed=0)


@pytest.mark.parametrize("name", ["squad", "mctest", "hotpotqa", "boolq"])
@pytest.mark.parametrize("tokens", [None, 512])
def test_well_known_data_sets_are_read(name: str, tokens: int | None, data: Path) -> None:
    path = data / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    task, count = make_task("qa", path=str(path)), Counter()
    examples = task.examples(10, tokens, count, seed=0)
    assert len(examples) == 10
    if name == "squad":
        assert all(any(gold in e.context for gold in e.answers) for e in examples)
    if tokens is not None:
        assert all(count(task.context_text(e)) <= tokens for e in examples)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 900))
def test_the_most_that_fits_is_what_trying_every_number_finds(sizes: list[int], target: int) -> None:
    fits = [n for n in range(len(sizes) + 1) if sum(sizes[:n]) <= target]
    found = most_that_fit(lambda n: "x" * sum(sizes[:n]), len(sizes), target, len)
    assert found == max(fits)


def test_the_nearest_pieces_are_kept_in_their_order() -> None:
    assert around(["a", "b", "c", "d", "e"], [3], "", 3, len) == "cde"
    assert around(["a", "bbbb", "c"], [1], "", 3, len) is None


def test_sentences_end_before_a_capital_or_a_digit_only() -> None:
    text = 'It cost 3.5 marks. 40 came! Why? no reason at all. "Go," he said. End'
    assert sentences(text) == [
        "It cost 3.5 marks.",
        "40 came!",
        "Why? no reason at all.",
        '"Go," he said.',
        "End",
    ]


def test_line_ends_of_unicode_inside_a_text_are_the_texts_own(tmp_path: Path) -> None:
    """A file's lines end at newlines alone, and a distractor with other ones in it stays one paragraph."""
    path = tmp_path / "odd.jsonl"
    texts = [f"Boat {n}\u2028left\u0085the\x1cpier\x0bat {n} sharp." for n in range(3)]
    rows = [
        {"id": str(n), "context": text, "question": f"When did boat {n} leave?", "answers": [f"at {n} sharp"]}
        for n, text in enumerate(texts)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    task = make_task("qa", path=str(path))
    assert {e.context for e in task.examples(3, None, len, 0)} == set(texts)
    for example in task.examples(3, 120, len, 0):
        told = [line for line in example.context.split("\n") if "Boat" in line]
        assert len(told) > 1 and set(told) <= set(texts)


def test_a_text_that_answers_the_question_is_no_distractor_whatever_its_script() -> None:
    row = Row("1", "日本の首都は東京です。", "日本の首都は?", ("東京", "$5", "Café", "red"))
    for text in ("私は東京に住んでいます。", "It costs $5 today.", "the cafe\u0301 is closed", "a red door"):
        assert not may_distract(text, row)
    for text in ("京都は東にあります。", "It costs $ 5.", "cafeteria", "a hundred doors"):
        assert may_distract(text, row)
    row = Row("1", "한국의 수도는 서울이다.", "수도는?", ("서울", "2002", "Paris"))
    for text in ("그는 서울에서 산다.", "2002년에 왔다.", "Paris에 간다.", "彼はParisに行く。"):
        assert not may_distract(text, row)
    for text in ("그는 부산에서 산다.", "12002년에 왔다.", "Parisian"):
        assert may_distract(text, row)


def test_a_long_text_without_spaces_is_cut_down_to_the_sentences_around_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    context = "海は広い。" * 20 + "日本の首都は東京です。" + "山は高い！" * 20
    path.write_text(json.dumps({"context": context, "question": "日本の首都は?", "answers": ["東京"]}))
    (example,) = make_task("qa", path=str(path)).examples(1, 60, len, 0)
    assert "日本の首都は東京です。" in example.context and len(example.context) <= 60
