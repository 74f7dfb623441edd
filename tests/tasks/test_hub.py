"""Records of hub data sets, brought into the form of a file's lines; nothing here goes to the network."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.forms import convert
from testbed.tasks.hub import parse_hub, rows_from

SQUAD = {
    "id": "a",
    "context": "Ann bakes.",
    "question": "Who?",
    "answers": {"text": ["Ann", "Ann"], "answer_start": [0, 0]},
}
HOTPOT = {
    "id": "b", "question": "Who?", "answer": "Ann", "supporting_facts": {"title": ["T", "U"], "sent_id": [0, 0]},
    "context": {"title": ["T", "S", "U"], "sentences": [["Ann ", "bakes."], ["No."], ["Yes."]]},
}  # fmt: skip
MUSIQUE = {
    "id": "c", "question": "Who?", "answer": "Ann", "answer_aliases": ["Anna"],
    "paragraphs": [{"title": "T", "paragraph_text": "Ann bakes.", "is_supporting": True}],
}  # fmt: skip
BOOLQ = {"question": "does she bake", "answer": False, "passage": "Ann bakes."}
RACE = {
    "example_id": "d",
    "article": "Ann bakes.",
    "question": "Who?",
    "options": ["Bob", "Ann", "Cid", "Dan"],
    "answer": "B",
}


def test_known_forms_become_rows() -> None:
    squad, hotpot, musique, boolq, race = rows_from([SQUAD, HOTPOT, MUSIQUE, BOOLQ, RACE], "hub:x")
    assert (squad.id, squad.answers) == ("a", ("Ann",))
    assert hotpot.paragraphs == (("T: Ann bakes.", True), ("S: No.", False), ("U: Yes.", True))
    assert musique.answers == ("Ann", "Anna") and musique.paragraphs == (("T: Ann bakes.", True),)
    assert (boolq.id, boolq.answers, boolq.choices) == ("4", ("no",), ("yes", "no"))
    assert (race.answers, race.choices) == (("Ann",), ("Bob", "Ann", "Cid", "Dan"))


def test_a_record_of_no_known_form_is_named_by_its_number() -> None:
    with pytest.raises(UsageError, match=r"hub:x:2: .*answers"):
        rows_from([SQUAD, {"question": "Who?", "text": "Ann"}], "hub:x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*SQUAD, *HOTPOT, *MUSIQUE, *BOOLQ, *RACE, "text", "title", "sentences"]),
                inner,
                max_size=7,
            )
        ),
        max_leaves=12,
    )
)
def test_no_record_does_worse_than_a_usage_error(record: object) -> None:
    convert(record)
    try:
        rows_from([record], "hub:x")
    except UsageError as error:
        assert str(error).startswith("hub:x:1:")


def test_names_are_short_or_full_with_configuration_and_split() -> None:
    assert parse_hub("squad") == ("rajpurkar/squad", None, "validation")
    assert parse_hub("a/b?config=c&split=test") == ("a/b", "c", "test")
    for wrong in ("", "?split=x", "a/b?colour=red"):
        with pytest.raises(UsageError, match="write hub:ORG/NAME"):
            parse_hub(wrong)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the library is installed here")
def test_without_the_library_the_remedy_is_told() -> None:
    with pytest.raises(UsageError, match="pip install datasets"):
        make_task("qa", path="hub:squad").examples(1, None, len, 0)
