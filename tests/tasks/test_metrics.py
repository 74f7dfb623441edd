from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.tasks.metrics import exact_match, normalize, token_f1


def normalize_answer(s: str) -> str:
    """SQuAD's evaluate-v1.1.py."""

    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text: str) -> str:
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def f1_score(prediction: str, ground_truth: str) -> float:
    """SQuAD's evaluate-v1.1.py, but that two empty texts agree, as version 2.0 has it."""
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    if not prediction_tokens or not ground_truth_tokens:
        return float(prediction_tokens == ground_truth_tokens)
    common = Counter(prediction_tokens) & Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def mixed_segmentation(text: str) -> list[str]:
    """MLQA's mlqa_evaluation_v1.py, for Chinese."""
    segs_out: list[str] = []
    temp_str = ""
    for char in text:
        if re.search(r"[\u4e00-\u9fa5]", char) or char in PUNCT:
            if temp_str != "":
                segs_out.extend(temp_str.split())
                temp_str = ""
            segs_out.append(char)
        else:
            temp_str += char
    if temp_str != "":
        segs_out.extend(temp_str.split())
    return segs_out


PUNCT = {chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")} | set(
    string.punctuation
)


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
    st.sampled_from(["the", "a", "An", "red", "Red.", "car", "car's", "x-y", "9", ",", "caf\u00e9"]),
    max_size=8,
).map(" ".join)
ascii_text = st.text(st.characters(max_codepoint=127), max_size=20)


@given(words | ascii_text, st.lists(words | ascii_text, min_size=1, max_size=3))
def test_english_scores_are_those_of_squads_script(answer: str, golds: list[str]) -> None:
    assert normalize(answer) == normalize_answer(answer)
    assert token_f1(answer, golds) == pytest.approx(max(f1_score(answer, gold) for gold in golds))
    assert exact_match(answer, golds) == max(normalize_answer(answer) == normalize_answer(g) for g in golds)


@given(st.text(st.sampled_from("\u6771\u4eac\u90fd12 bX.\u3002\uff0c\u300c\u300d\u2026"), max_size=20))
def test_chinese_is_cut_into_words_as_mlqas_script_does(text: str) -> None:
    bare = "".join(c for c in text.lower() if c not in PUNCT)
    assert normalize(text).split() == mixed_segmentation(bare)


def korquad_f1(prediction: str, ground_truth: str) -> float:
    """KorQuAD's evaluate-v1.0.py, of texts in lower case without punctuation."""
    prediction_char = [char for token in prediction.split() for char in token]
    ground_truth_char = [char for token in ground_truth.split() for char in token]
    num_same = sum((Counter(prediction_char) & Counter(ground_truth_char)).values())
    if num_same == 0:
        return 0
    precision, recall = num_same / len(prediction_char), num_same / len(ground_truth_char)
    return (2 * precision * recall) / (precision + recall)


korean = st.text(st.sampled_from("\uc11c\uc6b8\uc5d0\uc740 12bx "), max_size=12)


@given(korean, korean)
def test_korean_scores_are_those_of_korquads_script(answer: str, gold: str) -> None:
    answer, gold = f"\ub144{answer}", f"\uc740{gold}"
    assert token_f1(answer, [gold]) == pytest.approx(korquad_f1(answer, gold))
    assert exact_match(answer, [gold]) == (answer.split() == gold.split())


@pytest.mark.parametrize(
    ("answer", "gold", "em", "f1"),
    [
        ("\u6771\u4eac\u3067\u3059\u3002", "\u6771\u4eac", 0.0, 2 / 3),  # two of four characters
        ("\u300c\u6771\u4eac\u300d\u3002", "\u6771\u4eac", 1.0, 1.0),
        ("\u00abParis\u00bb", "Paris", 1.0, 1.0),
        ("O\u2019Neill \u2014 the captain\u2026", "O'Neill captain", 1.0, 1.0),
        ("cafe\u0301 Zu\u0308rich", "caf\u00e9 Z\u00fcrich", 1.0, 1.0),  # decomposed and composed
        ("\u304b\u3099\u3063\u3053\u3046", "\u304c\u3063\u3053\u3046", 1.0, 1.0),
        (
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e2f",
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
            0.0,
            12 / 13,
        ),
        ("\u0e17\u0e35\u0e48", "\u0e17\u0e35\u0e48", 1.0, 1.0),  # a consonant with two marks is one
        (
            "\u1797\u17d2\u1793\u17c6\u200b\u1796\u17c1\u1789",
            "\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789",
            1.0,
            1.0,
        ),
        ("iPhone15\u3092 2023\u5e74", "2023\u5e74", 0.0, 2 * 2 / (4 + 2)),
        ("\ud55c\uad6d\uc758 \uc218\ub3c4", "\uc218\ub3c4", 0.0, 2 * 2 / (5 + 2)),
        (
            "\uc11c\uc6b8\uc5d0\uc11c",
            "\uc11c\uc6b8",
            0.0,
            2 * 2 / (4 + 2),
        ),  # "in Seoul": a particle is joined to it
        ("2002\ub144", "2002", 0.0, 2 * 4 / (5 + 4)),
        (
            "\u1109\u1165\u110b\u116e\u11af",
            "\uc11c\uc6b8",
            1.0,
            1.0,
        ),  # letters, and the syllables that they make
        ("co\u00adoperate", "cooperate", 1.0, 1.0),  # a soft hyphen
    ],
)
def test_other_scripts_are_compared_by_words_or_where_they_have_no_spaces_by_characters(
    answer: str, gold: str, em: float, f1: float
) -> None:
    assert exact_match(answer, [gold]) == em
    assert token_f1(answer, [gold]) == pytest.approx(f1)


@given(words, words)
def test_an_exact_match_has_full_f1_and_f1_is_symmetric(one: str, other: str) -> None:
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))
    if exact_match(one, [other]):
        assert token_f1(one, [other]) == 1.0
