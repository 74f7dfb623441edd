"""The published deployment procedure, step by step, answered by a run's rows: is INT8 enough, is INT4, does protecting
the diagnosed layers save it, and what does selecting tokens with Q2C give on top.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from analysis import claim_rules as rules
from analysis.claim_evidence import collect
from analysis.claim_rules import FAILS, HOLDS
from analysis.run import Run


@dataclass(frozen=True)
class Step:
    """One question, the setting that answers it (empty: the run has none), the answer, and the figures."""

    question: str
    setting: str
    answer: str  #: yes, no, undecided, not measured
    figures: str
    advice: str


_STEPS = (
    ("Is INT8 enough?", r"int8(\([^)]*\))?", "run it: testbed run … --codec int8"),
    ("Is INT4 enough?", r"int4(\([^)]*\))?", "run it: testbed run … --codec int4"),
    (
        "Does protecting the diagnosed layers make INT4 lossless?",
        r"mixed\(.*\)",
        "find the layers with testbed diagnose MODEL, then run --codec 'mixed(low=4, high=8)'",
    ),
    (
        "Does selecting tokens with Q2C keep the answers?",
        r"q2c@[0-9.]+(\([^)]*\))?(\+.*)?",
        "run it: testbed run … --codec q2c@0.5+int8",
    ),
)
_ANSWERS = {HOLDS: "yes", FAILS: "no"}


def walk(runs: list[Run]) -> tuple[dict[str, list[Step]], list[str]]:
    """The steps for each model of these runs, and what was left out. Raises UsageError for runs without rows."""
    evidence, said = collect(runs)
    return {
        model: [_step(model, table, *step) for step in _STEPS] for model, table in evidence.tables.items()
    }, said


def _step(model: str, table: pd.DataFrame, question: str, pattern: str, remedy: str) -> Step:
    known = [str(s) for s in table["setting"].unique() if re.fullmatch(pattern, str(s))]
    if not known:
        return Step(question, "", "not measured", "", remedy)
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
    answer = _ANSWERS.get(verdict.verdict, "undecided")
    few = f", fewer than {rules.LEAST}" if verdict.n < rules.LEAST else ""
    figures = f"{full / size[setting]:.2f}× smaller, {verdict.figures}, n = {verdict.n}{few}"
    advice = "" if answer == "yes" else "more examples decide it" if answer == "undecided" else "go on"
    return Step(question, setting, answer, figures, advice)


def text(found: dict[str, list[Step]], said: list[str]) -> str:
    """The walk for the terminal; the end is the smallest setting that was found to be enough."""
    lines = []
    for model, steps in found.items():
        lines.append(model)
        for number, step in enumerate(steps, 1):
            lines.append(
                f"  {number}. {step.question}  {step.answer}" + (f": {step.setting}" if step.setting else "")
            )
            lines += [f"     {part}" for part in (step.figures, step.advice) if part]
        enough = [s.setting for s in steps if s.answer == "yes"]
        last = f"deploy {enough[-1]}" if enough else "nothing below 16 bits is shown to be enough"
        lines += [f"  → {last}", ""]
    lines.append(
        f"enough: ΔNLL to the full cache at most {rules.ALIKE} nats per token, 95 % interval's upper end"
    )
    return "\n".join([*lines, *said])
