"""A request's times as spans on one clock, and its stages, which follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from msgspec import structs

from testbed.endpoints.protocol import CLOUD, EDGE, LINK, Span, Stages

#: The pipeline: a stage is named as its column, without the unit.
PIPELINE = tuple(column.removesuffix("_s") for column in Stages.__struct_fields__)
#: Those in which nothing is done.
QUEUES = ("edge_queue", "link_queue", "queue")


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
        if span.start <= span.end
        for moment, change in ((span.start, 1), (span.end, -1))
    )
    working, seconds = [0] * len(PIPELINE), [0.0] * len(PIPELINE)
    for (since, stage, change), (until, upcoming, _) in pairwise(events):
        working[stage] += change
        latest = max((s for s, count in enumerate(working) if count), default=upcoming)
        seconds[latest] += until - since
    return Stages(*seconds)


def busy(spans: Iterable[Span]) -> Stages:
    """How long each stage was at work, whatever else was at the same time."""
    seconds = [0.0] * len(PIPELINE)
    reached = [float("-inf")] * len(PIPELINE)
    for span in sorted(spans, key=lambda span: span.start):
        stage = PIPELINE.index(span.stage)
        seconds[stage] += max(0.0, span.end - max(span.start, reached[stage]))
        reached[stage] = max(reached[stage], span.end)
    return Stages(*seconds)


def hidden(spans: Sequence[Span]) -> float:
    """What of the stages' work the pipeline hid behind later ones; waiting in a queue is none."""
    worked, exposed = (structs.asdict(stages) for stages in (busy(spans), billed(spans)))
    return sum(
        max(0.0, worked[stage] - exposed[stage]) for stage in worked if stage.removesuffix("_s") not in QUEUES
    )


def bound(spans: Iterable[Span], delay_s: float = 0.0) -> float:
    """The makespan, in seconds, of the same work in an ideal pipeline: edge, link and cloud each do one thing after another, in
    the order in which they did, each as soon as they are free and what it needs of its chunk is there: what was done with that
    before it began (a chunk that crosses as text needs none of its cache). Nothing queues, and nothing ends later than it did.

    Of a chunk the link takes the time from when it could cross (it was handed over, the one before it had arrived) until it had.
    delay_s: what of that is the way, one-way, on which chunks follow each other.
    """
    free = dict.fromkeys((EDGE, LINK, CLOUD), 0.0)
    done: dict[int, list[tuple[float, float]]] = {}  # with each chunk: when, and when at best
    arrived = end = float("-inf")
    began = None
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if span.stage in QUEUES:
            continue
        began = span.start if began is None else began
        takes, behind = span.end - span.start, 0.0
        if span.stage == "transmit":
            takes, behind = max(0.0, span.end - max(arrived, span.start + delay_s)), delay_s
            arrived = max(arrived, span.end)
        before = done.setdefault(span.chunk, [])
        needed = max((at_best for at, at_best in before if at <= span.start), default=0.0)
        finished = max(free[span.side], needed) + takes
        at_best = min(finished + behind, span.end - began)
        before.append((span.end, at_best))
        free[span.side], end = max(free[span.side], at_best - behind), max(end, at_best)
    return end if began is not None else 0.0
