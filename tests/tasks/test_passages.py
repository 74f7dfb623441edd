from __future__ import annotations

import re
from collections import Counter as Bag

import pytest

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.metrics import normalize
from testbed.tasks.passages import Passage, load_passages
from tests.tasks.counting import Counter


@pytest.mark.parametrize("passage", load_passages(), ids=lambda passage: passage.id)
def test_a_passage_is_short_and_its_answers_stand_in_it_once(passage: Passage) -> None:
    assert 80 <= len(passage.text.split()) <= 130
    assert len(passage.questions) == 3
    for question, answer in passage.questions:
        assert answer in passage.text
        assert len(re.findall(rf"\b{re.escape(answer)}\b", passage.text, re.IGNORECASE)) == 1, answer
        assert not re.search(rf"\b{re.escape(answer)}\b", question, re.IGNORECASE), question
        assert 1 <= len(answer.split()) <= 4
        assert question.endswith("?")
        assert normalize(answer)


def test_there_are_enough_passages_and_no_question_or_answer_comes_twice() -> None:
    passages = load_passages()
    assert len(passages) >= 28
    pairs = [pair for passage in passages for pair in passage.questions]
    assert len({passage.id for passage in passages}) == len(passages)
    assert Bag(question.lower() for question, _ in pairs).most_common(1)[0][1] == 1
    assert Bag(normalize(answer) for _, answer in pairs).most_common(1)[0][1] == 1


def test_a_question_names_something_that_only_its_own_passage_knows() -> None:
    passages = load_passages()
    for passage in passages:
        for question, _ in passage.questions:
            names = re.findall(r"\b[A-Z][a-z]+", question)[1:]
            assert names, question
            assert any(
                not any(name in other.text for other in passages if other is not passage) for name in names
            ), question


@pytest.mark.parametrize("tokens", [256, 400, 1000, 6000, 12_000])
def test_a_padded_context_has_the_asked_length_but_for_a_sentence(tokens: int) -> None:
    task, count = make_task("passages"), Counter()
    for example in task.examples(6, tokens, count, seed=1):
        assert tokens - 45 <= count(task.context_text(example)) <= tokens
        assert example.answers[0] in example.context


def test_the_passage_stands_whole_at_its_depth() -> None:
    by_id = {passage.id: passage for passage in load_passages()}
    for depth, where in [(0, 0), (1, -1)]:
        for example in make_task("passages", depth=depth).examples(5, 800, Counter(), seed=2):
            assert example.context.splitlines()[where] == by_id[example.id.rsplit("-", 1)[0]].text
    for example in make_task("passages", depth=0.5).examples(5, 1600, Counter(), seed=2):
        lines = example.context.splitlines()
        place = lines.index(by_id[example.id.rsplit("-", 1)[0]].text)
        assert 0 < place < len(lines) - 1


def test_every_paragraph_ends_with_a_sentence_and_none_comes_twice() -> None:
    for example in make_task("passages").examples(6, 700, Counter(), seed=4):
        lines = example.context.splitlines()
        assert all(line.endswith(".") for line in lines)
        assert len(set(lines)) == len(lines)


def test_without_a_length_the_context_is_the_passage_alone() -> None:
    texts = {passage.text for passage in load_passages()}
    assert {e.context for e in make_task("passages").examples(96, None, Counter(), seed=0)} == texts


def test_examples_are_of_different_passages_while_these_last_whatever_the_length() -> None:
    many, longer = (make_task("passages").examples(32, n, Counter(), seed=5) for n in (500, 900))
    assert len({e.id.rsplit("-", 1)[0] for e in many}) == 32
    assert [e.id for e in longer] == [e.id for e in many]


def test_too_many_examples_or_too_few_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="it has 96 questions"):
        make_task("passages").examples(97, 500, Counter(), seed=0)
    with pytest.raises(UsageError, match="alone has"):
        make_task("passages").examples(1, 60, Counter(), seed=0)
