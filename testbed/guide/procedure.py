"""Which measurement comes next: INT8, INT4; where that is not enough, the layers that cannot stand it; then fewer tokens.

After the deployment procedure of "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM Inference": quantize
as far as nothing is lost, protect a diagnosed bottleneck if there is one, and select tokens with Q2C for what is still too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from testbed.analysis.guide import DIAGNOSIS, INT4, INT8, MIXED, NO, SELECTION, SKIPPED, UNFIT, YES, Step

#: The forms of INT4 by their scales (see `mixed`), the smallest first: which loses least is a model's own.
FORMS = {"token": "int4(group=0, symmetric=true)", "symmetric": "int4(symmetric=true)", "group": "int4"}
#: Fractions of the tokens that are tried, until one is not shown to be enough.
RATIOS = (0.75, 0.5, 0.25)
HIGH = 16  #: bits of what is protected


@dataclass(frozen=True)
class Diagnosed:
    """protect: the word that `mixed` takes; bottleneck: few layers are to blame; verdict: a sentence; n: examples."""

    protect: str
    bottleneck: bool
    verdict: str
    n: int


def walk(
    measure: Callable[[str, Sequence[str]], Step],
    diagnose: Callable[[str], Diagnosed],
    smaller: float | None = None,
) -> Iterator[Step]:
    """The steps, each as soon as it is answered.

    `measure` takes a question and codecs, the smallest first, and says whether one of them is enough; `diagnose` takes the scales
    of INT4 and is called at most once. `smaller`: how many times smaller than 16 bits is small enough; the walk ends with the
    first setting that is (None: at its natural end).
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
            yield Step(question, "", SKIPPED, advice="INT8 loses too much already")
    else:
        for step in _below_int8(measure, diagnose):
            yield step
            taken = step.setting if step.answer == YES else taken
            if done(step):
                return
    for ratio in RATIOS:
        step = measure(SELECTION.format(f"{ratio:.0%}"), ["+".join(filter(None, [f"q2c@{ratio:g}", taken]))])
        yield step
        if step.answer != YES or done(step):
            return


def _below_int8(
    measure: Callable[[str, Sequence[str]], Step], diagnose: Callable[[str], Diagnosed]
) -> Iterator[Step]:
    four = measure(INT4, list(FORMS.values()))
    yield four
    if four.answer == YES:
        for question in (DIAGNOSIS, MIXED):
            yield Step(question, "", SKIPPED, advice="INT4 is enough as it is")
        return
    scale = next((scale for scale, codec in FORMS.items() if codec == four.setting), "group")
    found = diagnose(scale)
    answer = YES if found.bottleneck else NO
    yield Step(DIAGNOSIS, "", answer, f"{found.verdict} (n = {found.n} to rank, {found.n} to choose)")
    if found.bottleneck:
        more = "" if scale == "group" else f", scale={scale}"
        yield measure(MIXED, [f"mixed(high={HIGH}, protect={found.protect}{more})"])
    else:
        yield Step(MIXED, "", SKIPPED, advice="there is no bottleneck to protect")
