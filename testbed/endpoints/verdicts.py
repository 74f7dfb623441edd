"""What the cloud says of an answer behind it, at the edge: checked, and its times set beside the answer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.endpoints.protocol import ROUNDING_S
from testbed.endpoints.spans import CLOUD, Span
from testbed.errors import EndpointError
from testbed.transport import wire


@dataclass(frozen=True)
class Verified:
    """`text`: the answer from all planes. spans: behind the answer, up to when this was known here, `at`.

    saved_s: how much later the question would have been read, had all planes been waited for: when the last of them had come,
    and the seconds that decoding all of them took, less when it was read.
    """

    text: str
    at: float
    saved_s: float
    spans: list[Span]


def verified(
    answer: wire.Answer, verdict: wire.Verdict, at: float, sent: Sequence[Span], known_at: float
) -> Verified:
    """at: when the verdict was here; sent: every chunk's transmission, without its end; known_at: when the answer was here.

    Raises EndpointError where it cannot be.
    """
    later = sent[len(answer.arrived) :]
    moments = [moment for worked in verdict.worked for moment in (worked.start, worked.end)]
    decoding = verdict.worked[0] if verdict.worked else None
    could_be = (
        len(later) == len(verdict.arrived)
        and all(span.start <= there for span, there in zip(later, verdict.arrived, strict=True))
        and max(verdict.arrived, default=0.0) <= verdict.sent_at + ROUNDING_S
        and sorted(moments) == moments
        and answer.sent_at <= min(moments, default=answer.sent_at)
        and max(moments, default=0.0) <= verdict.sent_at + ROUNDING_S
        and answer.sent_at <= verdict.sent_at <= at
        and known_at <= at
        and (decoding is None or decoding.stage == "decode")
        and (decoding is not None or (not later and verdict.text == answer.text))
        and verdict.agreed <= min(answer.tokens, verdict.tokens)
    )
    if not could_be:
        raise EndpointError(
            f"the cloud's verdict cannot be: on an answer of {answer.tokens} tokens, sent at {answer.sent_at:.6f}, it has "
            f"{verdict.agreed} of {verdict.tokens} and {len(verdict.arrived)} chunks of {len(later)} at {verdict.sent_at:.6f}"
        )
    saved_s = 0.0
    if decoding is not None:
        there = max((*answer.arrived, *verdict.arrived))
        saved_s = there + decoding.end - decoding.start - answer.worked[-1].start
    spans = [span._replace(end=there) for span, there in zip(later, verdict.arrived, strict=True)]
    spans += [Span(w.stage, w.start, w.end, w.chunk, CLOUD) for w in verdict.worked]
    return Verified(verdict.text, at, saved_s, spans)
