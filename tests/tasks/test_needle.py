from __future__ import annotations

import itertools
import random
import re

import pytest

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.filler import filler
from tests.tasks.counting import Counter


@pytest.mark.parametrize("tokens", [64, 100, 256, 512, 1000, 4096])
def test_a_context_has_the_asked_length_or_up_to_three_percent_less(tokens: int) -> None:
    task, count = make_task("needle"), Counter()
    for example in task.examples(5, tokens, count, seed=1):
        assert tokens * 0.97 - 2 <= count(task.context_text(example)) <= tokens


def test_a_long_text_is_tokenised_a_few_times_and_not_once_a_sentence() -> None:
    count = Counter()
    context = make_task("needle").examples(1, 50_000, count, seed=1)[0].context
    assert count.characters < 12 * len(context)


@pytest.mark.parametrize(("needles", "distractors"), [(1, 0), (4, 0), (1, 7), (64, 7)])
def test_the_answer_is_unique_and_stands_with_its_key(needles: int, distractors: int) -> None:
    task = make_task("needle", needles=needles, distractors=distractors)
    for example in task.examples(6, 3000, Counter(), seed=2):
        (answer,) = example.answers
        assert example.context.count(answer) == 1
        assert answer not in example.question
        key = re.fullmatch(r"What is the access code for the (\w+ \w+)\?", example.question)
        assert key is not None
        assert f"The access code for the {key[1]} is {answer}." in example.context
        hidden = re.findall(r"access code for the (\w+) (\w+) is (\d{5})\.", example.context)
        assert len(hidden) == needles + distractors
        assert len({(owner, place) for owner, place, _ in hidden}) == len(hidden)
        assert len({code for _, _, code in hidden}) == len(hidden)
        assert sum(owner == key[1].split()[0] for owner, _, _ in hidden) == 1 + distractors


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_needle_stands_at_its_depth(depth: float) -> None:
    for example in make_task("needle", depth=depth).examples(4, 2000, Counter(), seed=3):
        before, after = re.split(r"The access code for the \w+ \w+ is \d+\.", example.context)
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.02)
        assert depth > 0 or before == ""
        assert depth < 1 or after == ""


def test_a_list_of_depths_is_taken_in_turn_and_random_ones_differ() -> None:
    def shares(depth: object) -> list[float]:
        found = make_task("needle", depth=depth).examples(8, 2000, Counter(), seed=3)
        return [round(e.context.index("access code") / len(e.context), 1) for e in found]

    assert shares([0, 0.5]) == [0.0, 0.5] * 4
    assert len(set(shares("random"))) > 3


def test_the_question_does_not_depend_on_the_length_or_the_depth() -> None:
    short = make_task("needle").examples(4, 200, Counter(), seed=5)
    long = make_task("needle", depth=0.3).examples(4, 2000, Counter(), seed=5)
    assert [(e.question, e.answers) for e in short] == [(e.question, e.answers) for e in long]


def test_the_filler_hardly_repeats_itself_and_gives_no_code_away() -> None:
    drawn = list(itertools.islice(filler(random.Random(0)), 3000))
    assert len(set(drawn)) == len(drawn)
    assert not any(re.search(r"\d|access|code|\{", sentence) for sentence in drawn)
    assert all(re.fullmatch(r"[A-Z].*\.", sentence) for sentence in drawn)


@pytest.mark.parametrize(
    ("tokens", "told"), [(10, "at least"), (0, "outside 1.."), (None, "give context_tokens")]
)
def test_a_length_that_cannot_be_had_is_refused(tokens: int | None, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        make_task("needle").examples(1, tokens, Counter(), seed=0)
