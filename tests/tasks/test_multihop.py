"""Multi-hop questions: every gold paragraph is there, where it was asked to be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from testbed.errors import UsageError
from testbed.tasks import make_task
from testbed.tasks.passages import load_passages
from testbed.tasks.rows import multihop_rows
from tests.tasks.counting import Counter

PASSAGES = {passage.id: passage for passage in load_passages()}


def golds(name: str) -> list[str]:
    return [text for row in multihop_rows() if row.id == name for text, gold in row.paragraphs if gold]


def test_a_question_names_its_bridge_and_the_passage_alone_has_the_answer() -> None:
    rows = multihop_rows()
    assert len(rows) == 3 * len(PASSAGES) == len({row.question for row in rows})
    for row in rows:
        (bridge, _), (passage, _) = row.paragraphs
        answer = rf"\b{re.escape(row.answers[0])}\b"
        assert re.search(answer, passage)
        assert not re.search(answer, bridge + row.question, re.IGNORECASE)
        names = set(re.findall(r"\b[A-Z][a-zü]+", row.question)[1:]) - set(re.findall(r"\w+", passage))
        assert names & set(re.findall(r"\w+", bridge)), row.question
        others = " ".join(other.text for name, other in PASSAGES.items() if not row.id.startswith(name))
        assert names - set(re.findall(r"\w+", others)), row.question


@pytest.mark.parametrize("tokens", [300, 512, 1500, 6000])
def test_a_context_has_its_gold_paragraphs_whole_and_the_asked_length(tokens: int) -> None:
    task, count = make_task("multihop"), Counter()
    for example in task.examples(6, tokens, count, seed=1):
        assert tokens - 45 <= count(task.context_text(example)) <= tokens
        assert all(example.context.splitlines().count(gold) == 1 for gold in golds(example.id))


@pytest.mark.parametrize(("depth", "where"), [(0, [0, 1]), (1, [-2, -1])])
def test_depth_says_where_all_of_the_evidence_stands(depth: float, where: list[int]) -> None:
    for example in make_task("multihop", depth=depth).examples(5, 900, Counter(), seed=2):
        lines = example.context.splitlines()
        assert [lines[i] for i in where] == golds(example.id)


def test_drawn_depths_put_gold_paragraphs_apart_and_in_either_order() -> None:
    orders, apart = set(), 0
    for example in make_task("multihop").examples(24, 1500, Counter(), seed=3):
        lines = example.context.splitlines()
        first, second = (lines.index(gold) for gold in golds(example.id))
        orders.add(first < second)
        apart += abs(first - second) > 1
    assert orders == {True, False} and apart > 8


def test_no_distractor_holds_the_answer() -> None:
    for example in make_task("multihop").examples(20, 1200, Counter(), seed=4):
        others = set(example.context.splitlines()) - set(golds(example.id))
        assert not any(re.search(rf"\b{re.escape(example.answers[0])}\b", text) for text in others)


def test_a_files_rows_need_gold_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {
        "context": "Ann bakes.",
        "question": "Who bakes?",
        "answers": ["Ann"],
        "paragraphs": [{"text": "Ann bakes."}],
    }
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match="no rows with paragraphs of which some are gold"):
        make_task("multihop", path=str(path)).examples(1, None, Counter(), 0)


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihop"])
def test_well_known_multi_hop_sets_are_read_and_too_long_evidence_is_passed_over(
    name: str, data: Path
) -> None:
    path = data / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    records = {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
    task, count = make_task("multihop", path=str(path)), Counter()
    for example in task.examples(20, 700, count, seed=0):
        assert 500 < count(task.context_text(example)) <= 700
        for paragraph in records[example.id]["paragraphs"]:
            if paragraph["gold"]:
                assert " ".join(paragraph["text"].split()) in example.context
