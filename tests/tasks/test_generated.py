"""Tasks that are generated from a seed: many keys, and chains of variables."""

from __future__ import annotations

import re

import pytest

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.task import Example
from tests.tasks.counting import Counter


@pytest.mark.parametrize("keys", [1, 4, 40, "fill"])
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_keys_differ_and_the_asked_ones_number_is_the_answer(keys: int | str, tokens: int) -> None:
    task, count = make_task("multikey", keys=keys), Counter()
    for example in task.examples(4, tokens, count, seed=1):
        assert tokens * 0.96 <= count(task.context_text(example)) <= tokens
        found = re.findall(r"The number for (\w+ \w+) is (\d+)\.", example.context)
        assert len({key for key, _ in found}) == len({value for _, value in found}) == len(found)
        assert len(found) == keys if keys != "fill" else len(found) > 50
        asked = re.fullmatch(r"What is the number for (\w+ \w+)\?", example.question)
        assert asked and dict(found)[asked[1]] == example.answers[0]


@pytest.mark.parametrize("name", ["multikey", "variables"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_evidence_begins_at_its_depth(name: str, depth: float) -> None:
    for example in make_task(name, depth=depth).examples(4, 2000, Counter(), seed=2):
        mark = f"is {example.answers[0]}." if name == "multikey" else f"VAR {example.answers[0].split()[0]} ="
        assert example.context.index(mark) / len(example.context) == pytest.approx(depth, abs=0.06)


@pytest.mark.parametrize(("hops", "chains"), [(1, 1), (2, 1), (4, 3)])
def test_a_chain_of_assignments_leads_from_the_value_to_every_name_of_the_answer(
    hops: int, chains: int
) -> None:
    task, count = make_task("variables", hops=hops, chains=chains), Counter()
    for example in task.examples(5, 900, count, seed=3):
        assert 850 <= count(task.context_text(example)) <= 900
        holds: dict[str, str] = {}
        for name, given_value in re.findall(r"VAR ([A-Z]{3}) = (\w+)\.", example.context):
            assert name not in holds
            holds[name] = holds.get(given_value, given_value)  # each is assigned before it is used
        assert len(holds) == chains * (hops + 1)
        assert all(value.isdigit() for value in holds.values())
        asked = re.search(r"(\d+)\?", example.question)
        assert asked
        assert {name for name, value in holds.items() if value == asked[1]} == set(example.answers[0].split())


def test_variables_are_scored_by_the_share_of_names_and_wrong_names_by_f1() -> None:
    task, example = make_task("variables"), Example("x", "", "", ("ABC DEF GHI",))
    assert task.score(" ABC DEF GHI\nXYZ", example) == {"score": 1.0, "em": 1.0, "f1": 1.0}
    assert task.score(" GHI, ABC", example) == {"score": 2 / 3, "em": 0.0, "f1": 0.8}
    assert task.score(" ABC DEF GHI XYZ", example)["score"] == 1.0
    assert task.score(" ABC DEF GHI XYZ", example)["em"] == 0.0
    assert task.score("", example) == {"score": 0.0, "em": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("parameters", "tokens", "told"),
    [
        ({"task": "multikey", "keys": 0}, 500, "keys 0 is not a whole number"),
        ({"task": "multikey", "keys": "many"}, 500, "keys 'many'"),
        ({"task": "multikey", "keys": 60}, 200, "needs a context of at least"),
        ({"task": "multikey", "keys": "fill"}, 100_000, "takes a context of at most"),
        ({"task": "multikey"}, None, "give context_tokens"),
        ({"task": "variables", "hops": 17}, 500, "hops 17"),
        ({"task": "variables", "chains": True}, 500, "chains True"),
        ({"task": "variables"}, 20, "needs a context of at least"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_line(
    parameters: dict[str, object], tokens: int, told: str
) -> None:
    name = str(parameters.pop("task"))
    with pytest.raises(UsageError) as error:
        make_task(name, **parameters).examples(1, tokens, Counter(), 0)
    assert told in str(error.value) and "\n" not in str(error.value)
