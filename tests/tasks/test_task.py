from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import Example, Task, describe, make_task, parse_task
from tests.tasks.counting import Counter, pieces


@pytest.fixture(params=["needle", "passages", "qa", "choice", "multihop", "multikey", "variables"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Task:
    if request.param != "qa":
        return make_task(request.param)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"context": "Ann is a cook.", "question": "Who is a cook?", "answers": ["Ann"]}\n')
    return make_task("qa", path=str(file))


EXAMPLE = Example("x", "Rome lies on the Tiber.", "Which river is it?", ("Tiber", "the Tiber"))


def test_the_prompts_texts_join_as_the_demonstrations_show(task: Task) -> None:
    whole = (
        task.prefix
        + task.context_text(EXAMPLE)
        + task.question_text(EXAMPLE)
        + task.answer_text(EXAMPLE)
        + "\n"
    )
    entry = r"Context: [^\n]+\n([^\n:]+\n)?Question: [^\n]+\nAnswer: [^\n]+\n"
    assert re.fullmatch(f"({entry}){{3}}", whole)
    assert whole.endswith("Context: Rome lies on the Tiber.\nQuestion: Which river is it?\nAnswer: Tiber\n")


def test_the_texts_tokenised_apart_are_the_prompt_tokenised_whole(task: Task) -> None:
    texts = [task.prefix, task.context_text(EXAMPLE), task.question_text(EXAMPLE), task.answer_text(EXAMPLE)]
    assert [piece for text in texts for piece in pieces(text)] == pieces("".join(texts))


def test_the_prefix_is_short_and_its_demonstrations_answer_themselves(task: Task) -> None:
    assert len(task.prefix.split()) < 110
    for shown in task.demonstrations:  # type: ignore[attr-defined]
        assert all(word in shown.context for word in shown.answers[0].split())
        assert task.score(shown.answers[0], shown) == {"score": 1.0, "em": 1.0, "f1": 1.0}


@pytest.mark.parametrize("name", ["needle", "passages", "multihop", "multikey"])
def test_a_score_ends_at_the_stop_and_is_the_tasks_metric(name: str) -> None:
    task = make_task(name)
    scores = task.score(" the river Tiber\nQuestion: What else?", EXAMPLE)
    assert scores["em"] == 0.0
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["score"] == scores[task.metric]
    assert task.score(" Tiber.", EXAMPLE) == {"score": 1.0, "em": 1.0, "f1": 1.0}
    assert task.score("", EXAMPLE) == {"score": 0.0, "em": 0.0, "f1": 0.0}


@pytest.mark.parametrize("name", ["needle", "passages", "multihop", "multikey", "variables"])
@given(seed=st.integers(0, 99), tokens=st.integers(280, 900), count=st.integers(1, 6))
def test_the_same_arguments_give_the_same_examples_and_a_larger_count_only_adds(
    name: str, seed: int, tokens: int, count: int
) -> None:
    task = make_task(name)
    few, more = (task.examples(n, tokens, Counter(), seed) for n in (count, count + 2))
    assert more[:count] == few
    assert len({example.id for example in more}) == len(more)
    assert task.examples(count, tokens, Counter(), seed + 1) != few


def test_the_gold_answer_begins_with_a_space_and_is_the_first() -> None:
    assert make_task("needle").answer_text(EXAMPLE) == " Tiber"


def test_a_label_tells_the_parameters_that_are_not_the_defaults() -> None:
    assert make_task("needle").label == "needle"
    assert make_task("choice", path=__file__).label == "choice(path=test_task)"
    assert make_task("needle", needles=4, depth=[0, 0.5]).label == "needle(needles=4, depth=[0.0, 0.5])"


def test_a_task_is_read_from_a_scenario() -> None:
    assert parse_task("needle") == make_task("needle")
    assert parse_task({"task": "needle", "needles": 2, "depth": 0.5}) == make_task(
        "needle", needles=2, depth=0.5
    )


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("neddle", "did you mean needle"),
        ("gsm8k-zero", "known are needle, multikey, variables, passages, choice, multihop, qa"),
        ({"task": "needle", "neddles": 2}, "unknown parameter 'neddles'; did you mean needles"),
        ({"task": "needle", "color": 2}, "it takes needles, depth, distractors"),
        ({"task": "needle", "needles": 0}, "needles 0 is not a whole number from 1 to 64"),
        ({"task": "needle", "needles": True}, "needles True"),
        ({"task": "needle", "needles": 1.5}, "needles 1.5"),
        ({"task": "needle", "distractors": 8}, "distractors 8 is not a whole number from 0 to 7"),
        ({"task": "needle", "depth": 1.2}, "depth 1.2 is not a number from 0"),
        ({"task": "needle", "depth": []}, "depth []"),
        ({"task": "needle", "depth": [0.1, "deep"]}, "depth 'deep'"),
        ({"task": "needle", "depth": float("nan")}, "depth nan"),
        ({"task": "passages", "depth": "middle"}, "depth 'middle'"),
        ({"task": "qa"}, "the parameter 'path' is missing"),
        ({"task": "qa", "path": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl does not exist"),
        ({"task": "qa", "path": 7}, "path 7 is not the name of a file"),
        ({"needles": 2}, "expected a name or a mapping with 'task'"),
        ({"task": 3}, "expected a name or a mapping with 'task'"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_remedy(written: object, told: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_task(written)  # type: ignore[arg-type]
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_every_task_is_described() -> None:
    described = {row.name: row for row in describe()}
    generated = ["needle", "multikey", "variables"]
    assert list(described) == [*generated, "passages", "choice", "multihop", "qa", "summary", "mmlu"]
    assert described["needle"].parameters == {"needles": "1", "depth": "random", "distractors": "0"}
    assert described["qa"].parameters["path"] is None
    assert described["needle"].metric == "em" and described["passages"].metric == "f1"
    assert all(row.summary.endswith(".") for row in described.values())


def test_tasks_need_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from testbed.tasks import describe; from testbed.tasks import make_task; describe();"
        "make_task('passages').examples(2, 1500, len, 0); make_task('needle').examples(2, 1500, len, 0);"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
