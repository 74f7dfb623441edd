"""Where sending a cache begins to pay, before anything runs: the rates of a link at which it takes as long as what else could be
done. A forecast, from the estimate's bytes and seconds (docs/pipeline.md has the formulas).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.stream import Stream
from testbed.delivery.whole import Whole
from testbed.experiment.estimate import ANSWER_TOKENS, QUESTION_TOKENS, Dimensions, Estimator, transfer_s
from testbed.experiment.machines import Machine
from testbed.experiment.scenario import Cell, Plan

#: Rates that are looked at, in bits per second: below the first one a cache "always" pays, above the last one "never".
_LEAST, _MOST = 1e4, 1e12
_STEPS = 60
_SENDING = ("split", "store")
_FP16 = parse_codec("fp16")


@dataclass(frozen=True)
class Border:
    """From which rate on a cache is there sooner, in bits per second: 0: at any; None: at none (or nobody else could)."""

    context_tokens: int
    placement: str
    codec: str
    delivery: str
    rtt_s: float
    beats_text_bps: float | None
    beats_edge_bps: float | None


def borders(estimator: Estimator) -> list[Border]:
    """A line for each context length and cache that the plan sends, at each of the links' delays; none where the model's
    size is unknown.
    """
    plan = estimator.plan
    delays = sorted(
        {round(profile.steady().up.delay_s + profile.steady().down.delay_s, 6) for profile in plan.profiles}
    )
    found: dict[tuple[Any, ...], Border] = {}
    for cell in (cell for batch in plan.batches() for cell in plan.cells(*batch)):
        if cell.placement not in _SENDING or not isinstance(cell.delivery, Whole | Stream):
            continue
        for rtt_s in dict.fromkeys((delays[0], delays[-1])):
            key = (cell.context_tokens, cell.placement, cell.codec_text, str(cell.delivery), rtt_s)
            if key not in found and estimator.model is not None:
                found[key] = _border(estimator, estimator.model, cell, rtt_s)
    return list(found.values())


def _border(estimator: Estimator, model: Dimensions, cell: Cell, rtt_s: float) -> Border:
    plan = estimator.plan
    edge, cloud = (Machine.of(plan, side, model.parameters) for side in ("edge", "cloud"))
    tokens = cell.context_tokens or 512
    cache = partial(_cache_s, estimator, model, cell, edge, cloud, rtt_s)
    text_bytes = estimator.payload_bytes(replace(cell, placement="cloud", codec=None))

    def text(rate: float) -> float:
        return transfer_s(text_bytes, rate, rtt_s) + cloud.pass_s(tokens) + answering_s(plan, cloud, tokens)

    at_home = edge.pass_s(tokens) + answering_s(plan, edge, tokens)
    return Border(
        context_tokens=tokens,
        placement=cell.placement,
        codec=cell.codec_text,
        delivery=str(cell.delivery),
        rtt_s=rtt_s,
        beats_text_bps=_crossing(lambda rate: cache(rate) - text(rate)),
        beats_edge_bps=_crossing(lambda rate: cache(rate) - at_home) if edge.decodes else None,
    )


def answering_s(plan: Plan, machine: Machine, past: int) -> float:
    """The question's pass, and the tokens behind the first."""
    generated = ANSWER_TOKENS if plan.scenario.max_new_tokens is None else plan.scenario.max_new_tokens
    return machine.pass_s(QUESTION_TOKENS, past) + machine.generating_s(generated - 1, past + QUESTION_TOKENS)


def _cache_s(
    estimator: Estimator,
    model: Dimensions,
    cell: Cell,
    edge: Machine,
    cloud: Machine,
    rtt_s: float,
    rate: float,
) -> float:
    """Seconds to the last token of a cache that crosses at that rate; chunk behind chunk where it is streamed."""
    assert cell.codec is not None
    tokens, selector = cell.context_tokens or 512, cell.codec.selector
    kept = getattr(selector, "ratio", 1.0)
    size = kept * estimator.payload_bytes(replace(cell, codec=_FP16))
    asks = selector is not None and selector.needs().question  # type: ignore[attr-defined]
    stored = cell.placement == "store"
    prefill = 0.0 if stored else edge.pass_s(tokens)
    coding = 0.0 if stored and not asks else edge.coding_s(size)
    before = edge.pass_s(QUESTION_TOKENS, tokens) if asks else 0.0
    if selector is not None:  # it chooses when all is there
        before, prefill = before + prefill, 0.0
    parts = len(cell.delivery.parts(tokens, model.layers)) if isinstance(cell.delivery, Stream) else 1
    crossing = transfer_s(estimator.payload_bytes(cell), rate, rtt_s)
    stages = [stage / parts for stage in (prefill + coding, crossing, cloud.coding_s(size))]
    pipeline = sum(stages) + (parts - 1) * max(stages)
    return before + pipeline + answering_s(estimator.plan, cloud, round(kept * tokens))


def _crossing(later: Callable[[float], float]) -> float | None:
    """The rate from which on `later`, which falls with the rate, is not above 0."""
    if later(_MOST) > 0:
        return None
    if later(_LEAST) <= 0:
        return 0.0
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if later(math.exp(middle)) <= 0 else (middle, high)
    return math.exp(high)
