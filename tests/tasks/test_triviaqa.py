"""TriviaQA's own files, of whose questions each has its texts in files: small ones of the same form, written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.forms import convert
from testbed.tasks.jsonl import Row, read_rows
from testbed.tasks.triviaqa import around_answer
from tests.tasks.counting import Counter


def question(number: int, value: str, *files: str, **more: Any) -> dict[str, Any]:
    """As wikipedia-dev.json has one."""
    return {
        "Answer": {
            "Aliases": [value, f"{value} B."],
            "MatchedWikiEntityName": value,
            "NormalizedAliases": [value.lower()],
            "NormalizedValue": value.lower(),
            "Type": "WikipediaEntity",
            "Value": value,
        },
        "EntityPages": [{"DocSource": "TagMe", "Filename": name, "Title": name} for name in files],
        "Question": f"Who is number {number}?",
        "QuestionId": f"tc_{number}",
        "QuestionSource": "http://example.org/",
        "SearchResults": [],
        **more,
    }


PAGES = {
    "Oslo.txt": "Oslo\n\nAnn Berg bakes bread in Oslo.",
    "Bergen.txt": "Bergen is rainy.",
    "Ship.txt": "Bob sails.",
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """The file, in `qa`, and its texts, in `evidence` beside that."""

    def to_file(*entries: Any, name: str = "wikipedia-dev.json") -> Path:
        texts = tmp_path / "evidence" / "wikipedia"
        texts.mkdir(parents=True, exist_ok=True)
        for file, text in PAGES.items():
            (texts / file).write_text(text)
        path = tmp_path / "qa" / name
        path.parent.mkdir(exist_ok=True)
        value = {
            "Data": list(entries),
            "Domain": "Wikipedia",
            "Split": "dev",
            "VerifiedEval": False,
            "Version": 1.0,
        }
        path.write_text(json.dumps(value))
        return path

    return to_file


def test_a_question_stands_with_the_first_of_its_texts_that_holds_an_answer(write: Write) -> None:
    rows = read_rows(
        write(
            question(1, "ann berg", "Bergen.txt", "Oslo.txt"),
            question(2, "Bob", "Oslo.txt", "Ship.txt"),
            question(3, "Cid", "Oslo.txt"),
        )
    )
    assert rows == (
        Row("tc_1", "Oslo\nAnn Berg bakes bread in Oslo.", "Who is number 1?", ("ann berg", "ann berg B.")),
        Row("tc_2", "Bob sails.", "Who is number 2?", ("Bob", "Bob B.")),
    )  # the third has none, and is passed over


def test_texts_of_the_web_lie_in_folders_of_their_own(write: Write, tmp_path: Path) -> None:
    page = tmp_path / "evidence" / "web" / "34" / "34_7.txt"
    page.parent.mkdir(parents=True)
    page.write_text("They say that Dan won.")
    (row,) = read_rows(write(question(1, "Dan", SearchResults=[{"Filename": "34/34_7.txt", "Rank": 0}])))
    assert row.context == "They say that Dan won."


def test_it_is_asked_by_qa_and_long_texts_are_cut_around_an_answer(write: Write) -> None:
    long = "It rains. " * 20_000
    path = write(question(1, "Ann Berg", "Long.txt"))
    (path.parent.parent / "evidence" / "wikipedia" / "Long.txt").write_text(f"{long}Ann Berg bakes. {long}")
    (row,) = read_rows(path)
    assert len(row.context) <= 2**15 and "Ann Berg bakes." in row.context
    (example,) = make_task("qa", path=str(path)).examples(1, 100, Counter(), 0)
    assert "Ann Berg bakes." in example.context and Counter()(example.context) <= 100


@pytest.mark.parametrize(
    "name", ["../../secret.txt", "/etc/hostname", "x/../../../secret.txt", "\0", "", "."]
)
def test_no_text_outside_of_the_folder_is_read(write: Write, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("Ann Berg keeps a secret.")
    (host := tmp_path / "evidence").mkdir()
    (host / "secret.txt").write_text("Ann Berg keeps another.")
    with pytest.raises(UsageError, match=r"wikipedia-dev\.json: no text in .* holds an answer"):
        read_rows(write(question(1, "Ann Berg", name)))


def test_a_link_out_of_the_folder_is_none_of_its_texts(write: Write, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("Ann Berg keeps a secret.")
    path = write(question(1, "Ann Berg", "link.txt"))
    (tmp_path / "evidence" / "wikipedia" / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UsageError, match="holds an answer"):
        read_rows(path)


def test_without_its_texts_the_remedy_is_said(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps({"Data": [question(1, "Ann")]}))
    with pytest.raises(UsageError, match="`evidence`; lay it beside this file"):
        read_rows(tmp_path / "dev.json")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"Question": "Who?"}, question(2, "Bob") | {"Answer": 3}, question(2, "Bob", EntityPages=[3])],
)
def test_a_question_of_another_form_is_named_by_its_number(write: Write, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"wikipedia-dev\.json:2: not a question of TriviaQA's") as caught:
        read_rows(write(question(1, "Ann Berg", "Oslo.txt"), wrong))
    assert "\n" not in str(caught.value)


KEYS = [*question(1, "Ann"), *question(1, "Ann")["Answer"], "Filename", "Data"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["Oslo.txt", "Ann", "\ud800", "../qa"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=7),
        max_leaves=15,
    )
)
def test_any_entry_gives_rows_or_one_line(write: Write, value: Any) -> None:
    path = write(question(1, "Ann Berg", "Oslo.txt"), value)
    try:
        rows = read_rows(path)
    except UsageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert rows and all(row.context and row.question and row.answers for row in rows)


@given(st.text(max_size=30), st.text("ab c", min_size=1, max_size=4), st.text(max_size=30))
def test_what_stands_around_an_answer_holds_it(before: str, answer: str, behind: str) -> None:
    found = around_answer(before + answer + behind, [answer])
    assert (found is None) == (not answer.strip())
    assert found is None or answer in found


def test_the_hubs_records_carry_their_texts() -> None:
    record = {
        "question": "Who bakes?",
        "question_id": "tc_9",
        "answer": {"value": "Ann", "aliases": ["Ann", "Ann B."], "normalized_value": "ann"},
        "entity_pages": {"title": ["Oslo"], "wiki_context": ["Bob sails.", "Ann bakes."]},
        "search_results": {"search_context": []},
    }
    assert convert(record) == {
        "id": "tc_9",
        "question": "Who bakes?",
        "context": "Ann bakes.",
        "answers": ["Ann", "Ann B."],
    }
    assert convert({**record, "entity_pages": {"wiki_context": []}}) is None
