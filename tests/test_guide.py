"""The deployment procedure on a model: which steps are taken, and that each is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from testbed.analysis.run import load
from testbed.cli import cli
from testbed.guide import procedure
from testbed.guide.procedure import (
    DIAGNOSIS,
    INT4,
    MIXED,
    NO,
    SKIPPED,
    UNDECIDED,
    UNFIT,
    YES,
    Diagnosed,
    Question,
    Step,
    chosen,
)
from tests.analysis.make_run import change, losing

BY_TOKEN, SYMMETRIC = "int4(group=0, symmetric=true)", "int4(symmetric=true)"
FORMS = {BY_TOKEN: 3.7, SYMMETRIC: 3.5, "int4": 3.2}
SIZES = {"int8": 2.0, **FORMS, "mixed(high=16, protect=K3)": 3.1}
#: INT4 in no form is enough; of these answers the walk takes the last form that was asked for.
NO_INT4 = dict.fromkeys(FORMS, NO)


def walked(
    answers: dict[str, str], bottleneck: bool = True, smaller: float | None = None
) -> tuple[list[Step], list[str]]:
    """The steps where the settings have these answers (others: yes), and what was measured."""
    asked: list[str] = []

    def measure(question: Question, codecs: Sequence[str]) -> Step:
        for codec in codecs:
            asked.append(codec)
            kept = float(codec[4:].split("+")[0]) if codec.startswith("q2c") else 1.0
            size = SIZES.get(codec.split("+", 1)[-1], 1.0) / kept
            step = Step(question.text, codec, answers.get(codec, YES), smaller=size)
            if step.answer == YES:
                break
        return step

    def diagnose(scale: str) -> Diagnosed:
        asked.append(f"diagnosis of {scale}")
        return Diagnosed("K3", bottleneck, "bottleneck: K3" if bottleneck else "no bottleneck", 8)

    return list(procedure.steps(measure, diagnose, smaller)), asked


def test_where_int4_is_enough_no_layers_are_diagnosed() -> None:
    steps, asked = walked({BY_TOKEN: NO, f"q2c@0.5+{SYMMETRIC}": NO})
    assert asked == ["int8", BY_TOKEN, SYMMETRIC, f"q2c@0.75+{SYMMETRIC}", f"q2c@0.5+{SYMMETRIC}"]
    assert [s.answer for s in steps if s.question in (DIAGNOSIS.text, MIXED.text)] == [SKIPPED, SKIPPED]
    best = chosen(steps)
    assert best is not None
    assert best.setting == f"q2c@0.75+{SYMMETRIC}"


def test_a_bottleneck_is_protected_and_tokens_are_selected_on_top() -> None:
    protected = "mixed(high=16, protect=K3)"
    _, asked = walked(NO_INT4 | {f"q2c@0.75+{protected}": NO})
    assert asked == ["int8", *FORMS, "diagnosis of group", protected, f"q2c@0.75+{protected}"]


def test_without_a_bottleneck_tokens_are_selected_on_top_of_int8() -> None:
    steps, asked = walked(dict.fromkeys(FORMS, UNDECIDED) | {"q2c@0.25+int8": UNDECIDED}, bottleneck=False)
    assert asked == ["int8", *FORMS, "diagnosis of group", "q2c@0.75+int8", "q2c@0.5+int8", "q2c@0.25+int8"]
    assert next(s.answer for s in steps if s.question == MIXED.text) == SKIPPED


def test_what_int8_loses_int4_is_not_asked_for() -> None:
    steps, asked = walked({"int8": NO, "q2c@0.75": NO})
    assert asked == ["int8", "q2c@0.75"]
    assert next(s.answer for s in steps if s.question == INT4.text) == SKIPPED
    assert chosen(steps) is None


@pytest.mark.parametrize(
    "smaller, last",
    [(1.5, "int8"), (3.6, BY_TOKEN), (4.0, f"q2c@0.75+{BY_TOKEN}"), (50.0, f"q2c@0.25+{BY_TOKEN}")],
)
def test_the_walk_ends_with_the_first_setting_that_is_small_enough(smaller: float, last: str) -> None:
    _, asked = walked({}, smaller=smaller)
    assert asked[-1] == last


def test_a_task_that_the_model_cannot_do_ends_the_walk() -> None:
    steps, asked = walked({"int8": UNFIT})
    assert asked == ["int8"]
    assert [s.answer for s in steps] == [UNFIT]


def test_the_walk_over_rows_ends_at_the_smallest_setting_that_is_enough(tmp_path: Path) -> None:
    path = losing(tmp_path / "run", {"int8": 0.001, "int4": 0.3, "mixed(protect=3)": 0.004})
    found, _ = procedure.answered([load(path)])
    steps = found["smollm2-135m"]
    assert [s.answer for s in steps] == ["yes", "no", "yes", "not measured"]
    said = CliRunner().invoke(cli, ["guide", str(path)], catch_exceptions=False).stdout
    assert "→ deploy mixed(protect=3)" in said
    assert "--codec q2c@0.5+int8" in said


def test_int4_is_judged_in_every_form_and_the_smallest_that_holds_is_taken(tmp_path: Path) -> None:
    sizes = {"int4(group=0, symmetric=true)": 265, "int4(symmetric=true)": 281, "int4": 312}
    rise = dict(zip(sizes, (0.4, 0.004, 0.001), strict=True))
    path = losing(tmp_path / "run", rise)
    change(path, lambda row: {"payload_bytes": sizes[row["codec"]], "kv_bytes": 1000})
    found, _ = procedure.answered([load(path)])
    step = found["smollm2-135m"][1]
    assert (step.setting, step.answer) == ("int4(symmetric=true)", "yes")
    assert step.smaller == pytest.approx(1000 / 281)
    assert "int4(group=0, symmetric=true): 3.77× smaller, ΔNLL +0.4" in step.figures
    assert "int4: 3.21× smaller, ΔNLL +0.001, yes" in step.figures


def test_too_few_examples_leave_a_step_undecided(tmp_path: Path) -> None:
    path = losing(tmp_path / "run", {"int8": 0.001}, n=20)
    found, _ = procedure.answered([load(path)])
    assert found["smollm2-135m"][0].answer == "undecided"


def guided(model: Path, out: Path, *more: str) -> dict[str, Any]:
    arguments = [
        "guide",
        str(model),
        "--out",
        str(out),
        "--context-tokens",
        "150",
        "--threads",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(cli, [*arguments, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_a_tiny_model_is_measured_step_by_step_and_what_is_there_is_not_repeated(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_answers_count = ("testbed.analysis.claims.pool.LEAST_REFERENCE", -1.0)
    monkeypatch.setattr(*random_answers_count)
    model, out = tiny_model("llama"), tmp_path / "guide"
    found = guided(model, out, "--examples", "2", "--diagnosed", "2")
    (steps,) = found["models"].values()
    assert steps[0]["setting"] == "int8"
    assert steps[1]["setting"] in FORMS
    assert all(form in steps[1]["figures"] for form in FORMS if form != steps[1]["setting"])
    assert {s["answer"] for s in steps} <= {UNDECIDED, SKIPPED, YES, NO}  # two examples decide nothing
    assert steps[0]["smaller"] == pytest.approx(1.8, abs=0.2)
    first = load(out).rows
    assert set(first["emulator"]) == {"none"}
    assert set(first["profile"]) == {"loopback"}
    assert (first["transmit_s"] > 0).all()
    assert (out / "diagnosis.json").is_file()
    diagnosed = (out / "diagnosis.json").stat().st_mtime_ns
    guided(model, out, "--examples", "3", "--diagnosed", "2")
    again = load(out).rows
    assert len(again) == len(first) // 2 * 3
    assert list(again["started_at"])[: len(first)] == list(first["started_at"])
    assert (out / "diagnosis.json").stat().st_mtime_ns == diagnosed
    from_rows = CliRunner().invoke(cli, ["guide", str(out), "--json"], catch_exceptions=False)
    first, second, *_ = json.loads(from_rows.stdout)["models"][str(model)]
    assert first["setting"] == "int8" and second["setting"] in FORMS

    monkeypatch.undo()  # and a model that does not answer the task is said to be unfit
    (steps,) = guided(model, out, "--examples", "3", "--diagnosed", "2")["models"].values()
    assert [s["answer"] for s in steps] == [UNFIT]
    assert "the full cache scores 0.00" in steps[0]["figures"]


def test_a_wrong_request_is_one_line_and_loads_no_torch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"format": 2, "name": "other", "settings": {"name": "5g"}}')
    asked = {
        "unknown model 'no-such-model'": ["no-such-model"],
        "name one model to measure, or the directories of runs": ["smollm2-135m", str(run)],
        "unknown task 'nedle'": ["smollm2-135m", "--task", "nedle"],
        "was measured with name 5g, not guide": ["smollm2-135m", "--out", str(run)],
    }
    program = (
        "import json, sys; from tests.command import command\n"
        "for says, asked in json.loads(sys.argv[1]).items():\n"
        "    done = command('guide', *asked)\n"
        "    assert (done.status, done.errors.count(chr(10))) == (2, 1) and says in done.errors, done\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program, json.dumps(asked)], check=True, cwd=Path(__file__).parents[1]
    )
