"""What the cloud says of an answer behind it, at the edge: checked, and its times set beside the answer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.endpoints.protocol import ROUNDING_S
from testbed.endpoints.spans import CLOUD, Span
from testbed.errors import EndpointError
from testbed.transport import wire

#: What the cloud does behind an answer.
_STAGES = (("decode", "first_token"), ("decode", "first_token", "generate"))


@dataclass(frozen=True)
class Verified:
    """`text`: the answer from all planes. spans: behind the answer, up to when this was known here, `at`.

    saved_s: how much later the first token would have been here, had all planes been waited for: when the last of them had come,
    and the seconds of decoding all of them and of the pass behind them, less when it was known: its way here is the same.
    """

    text: str
    at: float
    saved_s: float
    spans: list[Span]


def verified(
    first: wire.FirstToken,
    answer: tuple[wire.Answer, float],
    verdict: tuple[wire.Verdict, float],
    sent: Sequence[Span],
) -> Verified:
    """answer, verdict: each with when it was here. sent: every chunk's transmission, without its end.

    Raises EndpointError where it cannot be.
    """
    (given, given_at), (said, at) = answer, verdict
    later = sent[len(given.arrived) :]
    moments = [moment for worked in said.worked for moment in (worked.start, worked.end)]
    stages = tuple(worked.stage for worked in said.worked)
    could_be = (
        len(later) == len(said.arrived)
        and all(span.start <= there for span, there in zip(later, said.arrived, strict=True))
        and max(said.arrived, default=0.0) <= said.sent_at + ROUNDING_S
        and sorted(moments) == moments
        and given.sent_at <= min(moments, default=given.sent_at)
        and max(moments, default=0.0) <= said.sent_at + ROUNDING_S
        and given.sent_at <= said.sent_at <= at
        and given_at <= at
        and (stages in _STAGES or (not stages and not later and said.text == given.text))
        and said.agreed <= min(given.tokens, said.tokens)
    )
    if not could_be:
        raise EndpointError(
            f"the cloud's verdict cannot be: on an answer of {given.tokens} tokens, sent at {given.sent_at:.6f}, it has "
            f"{said.agreed} of {said.tokens} and {len(said.arrived)} chunks of {len(later)} at {said.sent_at:.6f}"
        )
    saved_s = 0.0
    if stages:
        decoding, reading = said.worked[:2]
        read_at = max((*given.arrived, *said.arrived)) + reading.end - decoding.start
        saved_s = read_at - first.sent_at
    spans = [span._replace(end=there) for span, there in zip(later, said.arrived, strict=True)]
    spans += [Span(w.stage, w.start, w.end, w.chunk, CLOUD) for w in said.worked]
    return Verified(said.text, at, saved_s, spans)
