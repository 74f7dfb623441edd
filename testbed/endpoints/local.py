"""An answer that needs nobody else: the question behind an example's full cache, on the machine that prefilled it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.endpoints.at_hand import Prefilled
from testbed.endpoints.protocol import TrialResult
from testbed.endpoints.side import InferenceSide, held, per_token
from testbed.endpoints.spans import billed, in_turn

if TYPE_CHECKING:
    from testbed.models.trail import Trail


def answered_here(side: InferenceSide, prefilled: Prefilled, trail: Trail | None = None) -> TrialResult:
    """The answer, timed by the side's pace, behind the prefill, which takes as long as it took. trail: is told how it was
    decoded."""
    task, choices = prefilled.batch.task, prefilled.batch.task.choice_texts(prefilled.example)
    times: list[float] = []
    started = side.pace.begin()
    past = side.behind(prefilled.prefix, prefilled.prefill.cache)
    question = prefilled.question(side.model)
    before = held(past) + len(question)

    def on_token(index: int, token: int) -> None:
        times.append(
            side.pace.hold("decode", 1, before + index - 1)
            if index
            else side.pace.hold("prefill", len(question), before - len(question))
        )

    limits = (prefilled.batch.max_new_tokens, task.stop, choices)
    ids = side.answer(question, past, *limits, on_token, trail=trail)
    text = side.model.text(ids, task.stop)
    if not times:  # nothing but the end of the text
        on_token(0, 0)
    ended = side.end_of_answer(len(ids), 0 if choices else prefilled.batch.max_new_tokens, before)
    spans = in_turn(prefill=prefilled.prefill_s, first_token=times[0] - started, generate=ended - times[0])
    stages = billed(spans)
    return TrialResult(stages, stages.total(), tuple(spans), (), False, text, len(ids), per_token(times))
