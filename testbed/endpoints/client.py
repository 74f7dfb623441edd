"""The cloud's client: sends a request across the link, waits for its answer, and divides its time into stages."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from testbed.deadline import Deadline
from testbed.endpoints.protocol import ROUNDING_S, Link
from testbed.endpoints.spans import Span
from testbed.errors import EndpointError
from testbed.transport import wire
from testbed.transport.transport import Bytes, Stats, Stream, Transport, parse

#: What the cloud makes of what comes, by placement.
REBUILDS = {"split": "decode", "cloud": "prefill"}
#: A cloud's answer holds no payload.
_NO_PAYLOAD = 0
_NOTHING = Stats(0, 0, 0, "")


@dataclass(frozen=True)
class Answered:
    """`spans`: from connecting until the answer was whole here, on this side's clock."""

    answer: wire.Answer
    spans: list[Span]
    wire_bytes: int
    retransmits: int
    congestion: str


class Client:
    """The edge's connections to the cloud, one a link and transport that keeps them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Stream] = {}

    def ask(self, request: wire.Request, context: Iterable[Bytes], link: Link) -> Answered:
        """Send a request and its context's chunks, and wait for the answer. Raises EndpointError."""
        deadline = Deadline(link.timeout)
        transport = parse(link.transport)
        started = time.monotonic()
        connection, fresh = self._connect(transport, link)
        before = _NOTHING if fresh else connection.stats()
        keep = False
        try:
            checked = request.placement == "cloud"  # a codec's bytes have checksums of their own
            sent_at = connection.send_request(request, context, checked, deadline)
            began = started if fresh else sent_at  # no instant lies between two stages: they sum to the whole
            first, first_at = _expect(connection, wire.FirstToken, request.id, deadline)
            answer, answered_at = _expect(connection, wire.Answer, request.id, deadline)
            _check_times(sent_at, first, first_at, answer, answered_at)
            answered_at += answer.skipped_s
            if deadline.passed(answered_at):  # as it would have been had the cloud computed it again
                raise EndpointError(f"nothing arrived within {deadline}")
            keep = transport.connection == "reuse"
        finally:
            if keep:
                self._kept[link.name, link.transport] = connection
            else:
                self._kept.pop((link.name, link.transport), None)
                connection.finish()
        cost = connection.stats()
        turn_at = answer.received_at + answer.queue_s
        rebuilt_at = turn_at + answer.prefill_s + answer.decode_s
        spans = [
            Span("connect", began, sent_at),
            Span("transmit", sent_at, answer.received_at),
            Span("queue", answer.received_at, turn_at),
            Span(REBUILDS[request.placement], turn_at, rebuilt_at),
            Span("first_token", rebuilt_at, first_at),
            Span("generate", first_at, answered_at),
        ]
        return Answered(
            answer=answer,
            spans=spans,
            wire_bytes=cost.sent + cost.received - before.sent - before.received,
            retransmits=cost.sent_again - before.sent_again + answer.retransmits,
            congestion=cost.congestion,
        )

    def _connect(self, transport: Transport, link: Link) -> tuple[Stream, bool]:
        """A connection for this request, and whether it was opened for it."""
        kept = self._kept.get((link.name, link.transport))
        if kept is not None:
            return kept, False
        return transport.connect(link.address, link.port, link.congestion, link.timeout), True


def _expect(connection: Stream, kind: type[Any], id: int, deadline: Deadline) -> tuple[Any, float]:
    received = connection.receive(_NO_PAYLOAD, deadline)
    if received is None:
        raise EndpointError("the cloud closed the connection without an answer")
    if isinstance(received.header, wire.Failure):
        raise EndpointError(f"the cloud: {received.header.message}")
    if not isinstance(received.header, kind) or received.header.id != id:
        raise EndpointError(f"the cloud sent a {type(received.header).__name__} frame out of turn")
    return received.header, received.at


def _check_times(
    sent_at: float, first: wire.FirstToken, first_at: float, answer: wire.Answer, answered_at: float
) -> None:
    """Raises EndpointError where the cloud's times do not lie between the request and its answer, in their order."""
    arrived, done = answer.received_at, answer.sent_at
    took = answer.queue_s + answer.prefill_s + answer.decode_s + answer.first_token_s + answer.generate_s
    took -= answer.skipped_s
    in_order = (
        sent_at <= arrived <= first.sent_at <= first_at <= answered_at
        and first.sent_at <= done <= answered_at
    )
    if not in_order or took > done - arrived + ROUNDING_S:
        raise EndpointError(
            f"the cloud's answer has times that cannot be: of a request of {sent_at:.6f} to {answered_at:.6f} s it says "
            f"received at {arrived:.6f}, first token at {first.sent_at:.6f}, sent at {done:.6f}, took {took:.6f} s"
        )
