"""The published deployment procedure, step by step, answered by a run's rows: is INT8 enough, is INT4, does protecting
the diagnosed layers save it, and what does selecting tokens with Q2C give on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from testbed.analysis import claim_judges
from testbed.analysis import claim_rules as rules
from testbed.analysis.claim_evidence import collect
from testbed.analysis.claim_rules import FAILS, HOLDS
from testbed.analysis.run import Run
from testbed.codecs.spec import CodecSpec

INT8 = "Is INT8 enough?"
INT4 = "Is INT4 enough?"
DIAGNOSIS = "Are a few layers to blame?"
MIXED = "Does protecting the diagnosed layers make INT4 lossless?"
SELECTION = "Does selecting {} of the tokens with Q2C keep the answers?"

YES, NO, UNDECIDED, SKIPPED, UNKNOWN = "yes", "no", "undecided", "skipped", "not measured"
UNFIT = "the task does not tell"
_ANSWERS = {HOLDS: YES, FAILS: NO}


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


def _is_alone(name: str) -> Callable[[CodecSpec], bool]:
    """Whether a codec is this quantizer and nothing else."""
    return lambda spec: spec.methods == (spec.quantizer,) and spec.quantizer.name == name


_STEPS: tuple[tuple[str, Callable[[CodecSpec], bool], str], ...] = (
    (INT8, _is_alone("int8"), "run it: testbed run … --codec int8"),
    (
        INT4,
        _is_alone("int4"),
        "run its forms: testbed run … --codec 'int4(group=0, symmetric=true)' --codec 'int4(symmetric=true)' --codec int4",
    ),
    (
        MIXED,
        _is_alone("mixed"),
        "find the layers with testbed diagnose MODEL, then run --codec 'mixed(high=16)'",
    ),
    (
        SELECTION.format("a part"),
        lambda spec: spec.selector is not None and spec.selector.name == "q2c",
        "run it: testbed run … --codec q2c@0.5+int8",
    ),
)


def walk(runs: list[Run]) -> tuple[dict[str, list[Step]], list[str]]:
    """The steps for each model of these runs, and what was left out. Raises UsageError for runs without rows."""
    evidence, said = collect(runs)
    found = {
        model: [_step(model, table, *step) for step in _STEPS] for model, table in evidence.tables.items()
    }
    for model, verdict in (pair for run in runs for pair in _diagnosis(run)):
        if model in found and not any(step.question == DIAGNOSIS for step in found[model]):
            answer = YES if verdict.startswith("bottleneck") else NO
            found[model].insert(2, Step(DIAGNOSIS, "", answer, verdict))
    return found, said


def judge(run: Run, question: str, settings: Sequence[str]) -> Step:
    """Whether one of these settings of a run of one model is enough. `UNFIT` where the full cache does not answer the task."""
    evidence, said = collect([run])
    if not evidence.tables:
        return Step(
            question, settings[0], UNFIT, "; ".join(said), "choose another task, or longer demonstrations"
        )
    ((model, table),) = evidence.tables.items()
    return _judged(model, table, question, list(settings))


def _step(
    model: str, table: pd.DataFrame, question: str, asked: Callable[[CodecSpec], bool], remedy: str
) -> Step:
    known = [setting for spec, setting in claim_judges.codecs(table).items() if asked(spec)]
    return _judged(model, table, question, known) if known else Step(question, "", UNKNOWN, advice=remedy)


def _judged(model: str, table: pd.DataFrame, question: str, known: list[str]) -> Step:
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
    return Step(question, setting, answer, figures, advice, smaller)


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
    """The walk for the terminal; the end is the smallest setting that was found to be enough."""
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
