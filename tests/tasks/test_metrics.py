from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.tasks.metrics import exact_match, normalize, token_f1


def straight_normalize(text: str) -> list[str]:
    """The definition, one step a line: lower case, no punctuation, no articles, words."""
    letters = [c for c in text.lower() if c not in string.punctuation]
    return re.sub(r"\b(?:the|an|a)\b", " ", "".join(letters)).split()


def straight_f1(answer: str, gold: str) -> float:
    """2PR / (P + R) with words crossed off one by one."""
    given, left = straight_normalize(answer), straight_normalize(gold)
    if not given or not left:
        return 1.0 if given == left else 0.0
    expected, same = len(left), 0
    for word in given:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / expected
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("answer", "golds", "em", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("in 1874", ["1874"], 0.0, 2 / 3),
        ("the river Rio Claro", ["Rio Claro"], 0.0, 4 / 5),
        (
            "black and yellow",
            ["black-and-yellow"],
            0.0,
            0.0,
        ),  # punctuation goes without a space, as in SQuAD's script
        ("Paris", ["London", "Paris, France", "Paris"], 1.0, 1.0),
        ("very very good", ["very good"], 0.0, 4 / 5),
        ("", ["Paris"], 0.0, 0.0),
        ("the", ["an"], 1.0, 1.0),  # both empty after normalisation
        ("Paris", [], 0.0, 0.0),
    ],
)
def test_known_answers_get_their_known_scores(answer: str, golds: list[str], em: float, f1: float) -> None:
    assert exact_match(answer, golds) == em
    assert token_f1(answer, golds) == pytest.approx(f1)


def test_an_article_inside_a_word_stays() -> None:
    assert normalize("Theatre  of\nAnna, a an THE") == "theatre of anna"


words = st.lists(
    st.sampled_from(["the", "a", "An", "red", "Red.", "car", "car's", "x-y", "9", ",", "é"]), max_size=8
).map(" ".join)


@given(words | st.text(max_size=20), st.lists(words | st.text(max_size=20), min_size=1, max_size=3))
def test_scores_equal_the_straight_restatement_of_their_definition(answer: str, golds: list[str]) -> None:
    assert normalize(answer).split() == straight_normalize(answer)
    assert token_f1(answer, golds) == pytest.approx(max(straight_f1(answer, gold) for gold in golds))
    assert exact_match(answer, golds) == max(
        straight_normalize(answer) == straight_normalize(g) for g in golds
    )


@given(words, words)
def test_an_exact_match_has_full_f1_and_f1_is_symmetric(one: str, other: str) -> None:
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))
    if exact_match(one, [other]):
        assert token_f1(one, [other]) == 1.0
