"""A request's times as spans on one clock, and its stages, which follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import NamedTuple

from testbed.endpoints.protocol import Stages

#: The pipeline: a stage is named as its column, without the unit.
PIPELINE = tuple(column.removesuffix("_s") for column in Stages.__struct_fields__)


class Span(NamedTuple):
    """A stage at work on a chunk, from one moment to another."""

    stage: str
    start: float
    end: float
    chunk: int = 0


def in_turn(**seconds: float) -> list[Span]:
    """One stage behind the other, from 0 on."""
    moments = pairwise(accumulate(seconds.values(), initial=0.0))
    return [Span(stage, *ends) for stage, ends in zip(seconds, moments, strict=True)]


def behind(first: list[Span], then: list[Span]) -> list[Span]:
    """Both, the second moved to where the first one ends."""
    by = (first[-1].end if first else 0.0) - then[0].start
    return [*first, *(span._replace(start=span.start + by, end=span.end + by) for span in then)]


def billed(spans: Iterable[Span]) -> Stages:
    """What each stage takes of the time from the first start to the last end, which is their sum.

    Each instant is billed to one stage: of those at work the latest in the pipeline, so that a transmission costs what of it
    nothing behind it hides; where none is at work, to the one that begins next, which was waited for.
    """
    events = sorted(
        (moment, PIPELINE.index(span.stage), change)
        for span in spans
        if span.start < span.end
        for moment, change in ((span.start, 1), (span.end, -1))
    )
    working, seconds = [0] * len(PIPELINE), [0.0] * len(PIPELINE)
    for (since, stage, change), (until, upcoming, _) in pairwise(events):
        working[stage] += change
        latest = max((s for s, count in enumerate(working) if count), default=upcoming)
        seconds[latest] += until - since
    return Stages(*seconds)
