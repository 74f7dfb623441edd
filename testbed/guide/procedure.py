"""The published deployment procedure: its questions, which measurement comes next, and what a run's rows answer.

After "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM Inference": quantize as far as nothing is
lost, protect a diagnosed bottleneck if there is one, and select tokens with Q2C for what is still too large.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from testbed.analysis.claims import judges
from testbed.analysis.claims import rules
from testbed.analysis.claims.pool import collect
from testbed.analysis.claims.rules import FAILS, HOLDS
from testbed.analysis.run import Run
from testbed.codecs.spec import CodecSpec

YES, NO, UNDECIDED, SKIPPED, UNKNOWN = "yes", "no", "undecided", "skipped", "not measured"
UNFIT = "the task does not tell"
_ANSWERS = {HOLDS: YES, FAILS: NO}

#: The forms of INT4 by their scales (see `mixed`), the smallest first: which loses least is a model's own.
FORMS = {"token": "int4(group=0, symmetric=true)", "symmetric": "int4(symmetric=true)", "group": "int4"}
#: Fractions of the tokens that are tried, until one is not shown to be enough.
RATIOS = (0.75, 0.5, 0.25)
HIGH = 16  #: bits of what is protected


def _is_alone(name: str) -> Callable[[CodecSpec], bool]:
    """Whether a codec is this quantizer and nothing else."""
    return lambda spec: spec.methods == (spec.quantizer,) and spec.quantizer.name == name


@dataclass(frozen=True)
class Question:
    """One step of the procedure. `about`: whether a codec answers it; `remedy`: how a run is made whose rows do."""

    text: str
    about: Callable[[CodecSpec], bool]
    remedy: str


_FORMS = " ".join(f"--codec '{codec}'" if "(" in codec else f"--codec {codec}" for codec in FORMS.values())
INT8 = Question("Is INT8 enough?", _is_alone("int8"), "run it: testbed run … --codec int8")
INT4 = Question("Is INT4 enough?", _is_alone("int4"), f"run its forms: testbed run … {_FORMS}")
DIAGNOSIS = Question("Are a few layers to blame?", lambda _: False, "testbed diagnose MODEL")
MIXED = Question(
    "Does protecting the diagnosed layers make INT4 lossless?",
    _is_alone("mixed"),
    f"find the layers with testbed diagnose MODEL, then run --codec 'mixed(high={HIGH})'",
)


def selection(part: str) -> Question:
    """Whether this part of the tokens is enough."""
    return Question(
        f"Does selecting {part} of the tokens with Q2C keep the answers?",
        lambda spec: spec.selector is not None and spec.selector.name == "q2c",
        "run it: testbed run … --codec q2c@0.5+int8",
    )


#: What a run's rows can answer; a diagnosis has a file of its own.
_FROM_ROWS = (INT8, INT4, MIXED, selection("a part"))


@dataclass(frozen=True)
class Step:
    """One question, the setting that answers it (empty: none), the answer, and the figures. `smaller`: how many times fewer
    bytes than the full cache in 16 bits; NaN: unknown.
    """

    question: str
    setting: str
    answer: str  #: yes, no, undecided, skipped, not measured
    figures: str = ""
    advice: str = ""
    smaller: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is unknown is None."""
        return asdict(self) | {"smaller": self.smaller if math.isfinite(self.smaller) else None}


@dataclass(frozen=True)
class Diagnosed:
    """protect: the word that `mixed` takes; bottleneck: few layers are to blame; verdict: a sentence; n: examples."""

    protect: str
    bottleneck: bool
    verdict: str
    n: int


def steps(
    measure: Callable[[Question, Sequence[str]], Step],
    diagnose: Callable[[str], Diagnosed],
    smaller: float | None = None,
) -> Iterator[Step]:
    """The steps, each as soon as it is answered.

    `measure` takes a question and codecs, the smallest first, and answers whether one of them is enough; `diagnose` takes the
    scales of INT4 and is called at most once. `smaller`: how many times smaller than 16 bits is small enough; the first setting
    that is ends the procedure (None: its natural end does).
    """

    def done(step: Step) -> bool:
        return smaller is not None and step.answer == YES and step.smaller >= smaller

    first = measure(INT8, ["int8"])
    yield first
    if done(first) or first.answer == UNFIT:
        return
    taken = "int8" if first.answer == YES else ""  # the smallest quantizer that is enough; empty: 16 bits
    if first.answer == NO:
        for question in (INT4, DIAGNOSIS, MIXED):
            yield Step(question.text, "", SKIPPED, advice="INT8 loses too much already")
    else:
        for step in _below_int8(measure, diagnose):
            yield step
            taken = step.setting if step.answer == YES else taken
            if done(step):
                return
    for ratio in RATIOS:
        step = measure(selection(f"{ratio:.0%}"), ["+".join(filter(None, [f"q2c@{ratio:g}", taken]))])
        yield step
        if step.answer != YES or done(step):
            return


def _below_int8(
    measure: Callable[[Question, Sequence[str]], Step], diagnose: Callable[[str], Diagnosed]
) -> Iterator[Step]:
    four = measure(INT4, list(FORMS.values()))
    yield four
    if four.answer == YES:
        for question in (DIAGNOSIS, MIXED):
            yield Step(question.text, "", SKIPPED, advice="INT4 is enough as it is")
        return
    scale = next((scale for scale, codec in FORMS.items() if codec == four.setting), "group")
    found = diagnose(scale)
    answer = YES if found.bottleneck else NO
    yield Step(DIAGNOSIS.text, "", answer, f"{found.verdict} (n = {found.n} to rank, {found.n} to choose)")
    if found.bottleneck:
        more = "" if scale == "group" else f", scale={scale}"
        yield measure(MIXED, [f"mixed(high={HIGH}, protect={found.protect}{more})"])
    else:
        yield Step(MIXED.text, "", SKIPPED, advice="there is no bottleneck to protect")


def answered(runs: list[Run]) -> tuple[dict[str, list[Step]], list[str]]:
    """The steps for each model of these runs, and what was left out. Raises UsageError for runs without rows."""
    evidence, said = collect(runs)
    found = {
        model: [_step(model, table, question) for question in _FROM_ROWS]
        for model, table in evidence.tables.items()
    }
    for model, verdict in (pair for run in runs for pair in _diagnosis(run)):
        if model in found and not any(step.question == DIAGNOSIS.text for step in found[model]):
            answer = YES if verdict.startswith("bottleneck") else NO
            found[model].insert(2, Step(DIAGNOSIS.text, "", answer, verdict))
    return found, said


def judge(run: Run, question: Question, settings: Sequence[str]) -> Step:
    """Whether one of these settings of a run of one model is enough. `UNFIT` where the full cache does not answer the task."""
    evidence, said = collect([run])
    if not evidence.tables:
        return Step(
            question.text,
            settings[0],
            UNFIT,
            "; ".join(said),
            "choose another task, or longer demonstrations",
        )
    ((model, table),) = evidence.tables.items()
    return _judged(model, table, question, list(settings))


def _step(model: str, table: pd.DataFrame, question: Question) -> Step:
    known = [setting for spec, setting in judges.codecs(table).items() if question.about(spec)]
    if not known:
        return Step(question.text, "", UNKNOWN, advice=question.remedy)
    return _judged(model, table, question, known)


def _judged(model: str, table: pd.DataFrame, question: Question, known: list[str]) -> Step:
    judged = [(s, rules.lossless("guide", table, model, "", s)) for s in known]
    size = {s: float(table.loc[table["setting"] == s, "payload_bytes"].mean()) for s in known}
    full = float(table["kv_bytes"].mean())
    # The smallest that is enough; else the one that loses least.
    enough = [(s, v) for s, v in judged if v.verdict == HOLDS]
    setting, verdict = (
        min(enough, key=lambda one: size[one[0]])
        if enough
        else min(judged, key=lambda one: one[1].values["nll_diff"])
    )
    answer = _answer(verdict)
    few = f", fewer than {rules.LEAST}" if verdict.n < rules.LEAST else ""
    smaller = full / size[setting]
    figures = f"{smaller:.2f}× smaller, {verdict.figures}, n = {verdict.n}{few}"
    figures += "".join(
        f"; {other}: {full / size[other]:.2f}× smaller, ΔNLL {found.values['nll_diff']:+.3f}, {_answer(found)}"
        for other, found in judged
        if other != setting
    )
    advice = "more examples decide it" if answer == UNDECIDED else ""
    return Step(question.text, setting, answer, figures, advice, smaller)


def _answer(verdict: rules.Verdict) -> str:
    return _ANSWERS.get(verdict.verdict, UNDECIDED)


def _diagnosis(run: Run) -> list[tuple[str, str]]:
    """The model and verdict of a diagnosis in the run's directory, if there is one."""
    try:
        found = json.loads((run.path / "diagnosis.json").read_text(encoding="utf-8"))
        return [(str(found["model"]), str(found["verdict"]))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def chosen(steps: list[Step]) -> Step | None:
    """The smallest setting that was found to be enough, the last of equals; None where none was."""
    enough = [s for s in steps if s.answer == YES and s.setting]
    return max(reversed(enough), key=lambda s: s.smaller, default=None)


def text(found: dict[str, list[Step]], said: list[str]) -> str:
    """The steps for the terminal; the end is the smallest setting that was found to be enough."""
    lines = []
    for model, steps in found.items():
        lines.append(model)
        for number, step in enumerate(steps, 1):
            lines += told(number, step)
        best = chosen(steps)
        last = (
            f"deploy {best.setting}, {best.smaller:.2f}× smaller than 16 bits"
            if best
            else "nothing below 16 bits is shown to be enough"
        )
        lines += [f"  → {last}", ""]
    lines.append(
        f"enough: ΔNLL to the full cache at most {rules.ALIKE} nats per token, and at most {rules.MOST_LOST:.0%} of examples "
        f"lose more than {rules.LOST}, by their 95 % intervals' upper ends, over at least {rules.LEAST} examples"
    )
    return "\n".join([*lines, *said])


def told(number: int, step: Step) -> list[str]:
    """A step's lines."""
    answer = step.answer + (f": {step.setting}" if step.setting else "")
    more = [part for part in (step.figures, step.advice) if part]
    return [f"  {number}. {step.question}  {answer}", *(f"     {part}" for part in more)]
