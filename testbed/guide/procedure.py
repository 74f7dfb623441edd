"""The published deployment procedure: its questions, which measurement comes next, and what a run's rows answer.

After "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM Inference": quantize as far as nothing is
lost, protect a diagnosed bottleneck if there is one, and select tokens with Q2C for what is still too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from testbed.analysis.claims import judges, rules
from testbed.analysis.claims.judges import is_alone
from testbed.analysis.claims.pool import Sample, collect
from testbed.analysis.claims.rules import FAILS, HOLDS
from testbed.analysis.run import Run
from testbed.codecs.spec import CodecSpec

YES, NO, UNDECIDED, SKIPPED, UNKNOWN = "yes", "no", "undecided", "skipped", "not measured"
UNFIT = "the task does not tell"

#: The forms of INT4 by their scales (see `mixed`), the smallest first: which loses least is a model's own.
FORMS = {"token": "int4(group=0, symmetric=true)", "symmetric": "int4(symmetric=true)", "group": "int4"}
#: Fractions of the tokens that are tried, until one is not shown to be enough.
RATIOS = (0.75, 0.5, 0.25)
HIGH = 16  #: bits of what is protected


@dataclass(frozen=True)
class Question:
    """One step of the procedure. `about`: whether a codec answers it; `remedy`: how a run is made whose rows do."""

    text: str
    about: Callable[[CodecSpec], bool]
    remedy: str


_FORMS = " ".join(f"--codec '{codec}'" if "(" in codec else f"--codec {codec}" for codec in FORMS.values())
INT8 = Question("Is INT8 enough?", lambda spec: is_alone(spec, "int8"), "run it: testbed run … --codec int8")
INT4 = Question(
    "Is INT4 enough?", lambda spec: is_alone(spec, "int4"), f"run its forms: testbed run … {_FORMS}"
)
DIAGNOSIS = Question("Are a few layers to blame?", lambda _: False, "testbed diagnose MODEL")
MIXED = Question(
    "Does protecting the diagnosed layers make INT4 lossless?",
    lambda spec: is_alone(spec, "mixed"),
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
    diagnosed = diagnose(scale)
    answer = YES if diagnosed.bottleneck else NO
    yield Step(
        DIAGNOSIS.text,
        "",
        answer,
        f"{diagnosed.verdict} (n = {diagnosed.n} to rank, {diagnosed.n} to choose)",
    )
    if diagnosed.bottleneck:
        more = "" if scale == "group" else f", scale={scale}"
        yield measure(MIXED, [f"mixed(high={HIGH}, protect={diagnosed.protect}{more})"])
    else:
        yield Step(MIXED.text, "", SKIPPED, advice="there is no bottleneck to protect")


def answered(runs: list[Run]) -> tuple[dict[str, list[Step]], list[str]]:
    """The steps for each model of these runs, and what was left out. Raises UsageError for runs without rows."""
    pool, left_out = collect(runs)
    answers = {sample.model: [_step(sample, question) for question in _FROM_ROWS] for sample in pool.models()}
    for diagnosis in (run.diagnosis for run in runs):
        own, verdict = answers.get(str(diagnosis.get("model")), []), str(diagnosis.get("verdict", ""))
        if own and verdict and not any(step.question == DIAGNOSIS.text for step in own):
            answer = YES if verdict.startswith("bottleneck") else NO
            own.insert(2, Step(DIAGNOSIS.text, "", answer, verdict))
    return answers, left_out


def judge(run: Run, question: Question, settings: Sequence[str]) -> Step:
    """Whether one of these settings of a run of one model is enough. `UNFIT` where the full cache does not answer the task."""
    pool, left_out = collect([run])
    for sample in pool.models():
        return _judged(sample, question, list(settings))
    advice = "choose another task, or longer demonstrations"
    return Step(question.text, settings[0], UNFIT, "; ".join(left_out), advice)


def _step(sample: Sample, question: Question) -> Step:
    known = [setting for spec, setting in judges.codecs(sample.table).items() if question.about(spec)]
    if not known:
        return Step(question.text, "", UNKNOWN, advice=question.remedy)
    return _judged(sample, question, known)


def _judged(sample: Sample, question: Question, known: list[str]) -> Step:
    table = sample.table
    verdicts = {setting: rules.lossless(sample, setting) for setting in known}
    size = {s: float(table.loc[table["setting"] == s, "payload_bytes"].mean()) for s in known}
    full = float(table["kv_bytes"].mean())
    # The smallest that is enough; else the one that loses least.
    enough = [setting for setting, verdict in verdicts.items() if verdict.verdict == HOLDS]
    setting = min(enough, key=size.__getitem__) if enough else min(known, key=lambda s: _lost(verdicts[s]))
    verdict = verdicts[setting]
    answer = _answer(verdict)
    few = f", fewer than {rules.LEAST}" if verdict.n < rules.LEAST else ""
    smaller = full / size[setting]
    figures = f"{smaller:.2f}× smaller, {verdict.figures}, n = {verdict.n}{few}"
    figures += "".join(
        f"; {other}: {full / size[other]:.2f}× smaller, ΔNLL {_lost(theirs):+.3f}, {_answer(theirs)}"
        for other, theirs in verdicts.items()
        if other != setting
    )
    advice = "more examples decide it" if answer == UNDECIDED else ""
    return Step(question.text, setting, answer, figures, advice, smaller)


def _lost(verdict: rules.Verdict) -> float:
    return float(verdict.values["nll_diff"])


def _answer(verdict: rules.Verdict) -> str:
    return {HOLDS: YES, FAILS: NO}.get(verdict.verdict, UNDECIDED)


def chosen(steps: list[Step]) -> Step | None:
    """The smallest setting that was found to be enough, the last of equals; None where none was."""
    enough = [s for s in steps if s.answer == YES and s.setting]
    return max(reversed(enough), key=lambda s: s.smaller, default=None)


def text(answers: dict[str, list[Step]], left_out: list[str]) -> str:
    """The steps for the terminal; the end is the smallest setting that was found to be enough."""
    lines = []
    for model, steps in answers.items():
        lines.append(model)
        for number, step in enumerate(steps, 1):
            lines += described(number, step)
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
    return "\n".join([*lines, *left_out])


def described(number: int, step: Step) -> list[str]:
    """A step's lines."""
    answer = step.answer + (f": {step.setting}" if step.setting else "")
    more = [part for part in (step.figures, step.advice) if part]
    return [f"  {number}. {step.question}  {answer}", *(f"     {part}" for part in more)]
