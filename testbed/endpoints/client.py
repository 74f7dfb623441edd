"""The cloud's client: sends a request across the link, waits for its answer, and divides its time into stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from testbed.deadline import Deadline
from testbed.delivery.delivery import TEXT
from testbed.endpoints.clocks import Clocks, Here
from testbed.endpoints.feed import Chunk, Source
from testbed.endpoints.protocol import ROUNDING_S, Cost, Link, TrialRequest, TrialResult
from testbed.endpoints.spans import CLOUD, LINK, Span, billed
from testbed.endpoints.verdicts import Verified, verified
from testbed.errors import EndpointError, RefusedError, TestbedError
from testbed.transport import wire
from testbed.transport.clock import DRIFT, Clock, Offset
from testbed.transport.transport import Bytes, Stats, Stream, Transport, parse

#: What the cloud makes of what comes, by placement.
REBUILDS = {"split": "decode", "store": "decode", "cloud": "prefill"}
#: A cloud's answer holds no payload.
_NO_PAYLOAD = 0
_LOOK_S = 0.002  #: between two looks at whether all has been confirmed
_NOTHING = Stats(0, 0, 0, "")


@dataclass(frozen=True)
class Answered:
    """`spans`: from connecting until the answer was whole here, on this side's clock. verified: what was said of it behind it;
    unverified: why nothing was, where something should have been.
    """

    answer: wire.Answer
    spans: list[Span]
    wire_bytes: int
    retransmits: int
    congestion: str
    verified: Verified | None = None
    unverified: str = ""
    clock: Clock | None = None  #: the cloud's, where that is another than this side's

    def result(self, message: TrialRequest, spans: list[Span], reused: list[str]) -> TrialResult:
        """What the trial came to, by all its spans, these and the edge's own; `reused`: stages taken over."""
        answer, known = self.answer, self.verified
        began = min(span.start for span in spans)
        spans = _since(began, spans)
        result = TrialResult(
            stages=billed(spans),
            e2e_s=max(span.end for span in spans),
            spans=tuple(spans),
            reused=tuple(reused),
            replayed=message.replay and bool(reused),
            answer=answer.text,
            answer_tokens=answer.tokens,
            token_s=answer.token_s,
            wire_bytes=self.wire_bytes,
            retransmits=self.retransmits,
            congestion=self.congestion,
            request=answer.id,
            unverified=self.unverified,
            clock_offset_s=self.clock.ahead_s if self.clock else 0.0,
            clock_error_s=self.clock.error_s if self.clock else 0.0,
        )
        if known is None:
            return result
        return structs.replace(
            result,
            changed=known.text.strip() != answer.text.strip(),
            saved_s=known.saved_s,
            verified_s=known.at - began,
            verified_answer=known.text,
            later=tuple(_since(began, known.spans)),
        )


def _since(began: float, spans: list[Span]) -> list[Span]:
    return [span._replace(start=span.start - began, end=span.end - began) for span in spans]


@dataclass
class _Exchange:
    """What is known of a request while it is under way. `sent`: each chunk's transmission, which has no end yet."""

    began: float = 0.0  #: from when on it is billed
    sent_at: float = 0.0
    sent: list[Span] = field(default_factory=list)
    first: wire.FirstToken | None = None
    first_at: float = 0.0
    answer: wire.Answer | None = None
    answered_at: float = 0.0
    verdict: wire.Verdict | None = None
    verdict_at: float = 0.0
    unverified: str = ""
    unmade: Exception | None = None  #: why a chunk could not be made
    clock: Clock | None = None  #: the cloud's, where that is another than this side's


class Client:
    """The edge's connections to the cloud, one a link and transport that keeps them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Stream] = {}
        self._clocks = Clocks()
        self._lingering: tuple[Stream, int] | None = None  #: and what was sent again towards this side

    def hang_up(self) -> Cost:
        """Close the connection that lingers. Raises EndpointError where none does."""
        if self._lingering is None:
            raise EndpointError("no connection is open that was to be closed")
        (connection, sent_again), self._lingering = self._lingering, None
        connection.finish()
        cost = connection.stats()
        return Cost(cost.sent + cost.received, cost.sent_again + sent_again)

    def close(self) -> None:
        """Give up the connections that were kept."""
        for stream in self._kept.values():
            stream.close()
        self._kept.clear()

    def ask(
        self,
        request: wire.Request,
        context: Iterable[Bytes],
        link: Link,
        sent: Callable[[], None] | None = None,
    ) -> Answered:
        """Send a request and its context's chunks, and wait for the answer. Raises EndpointError, RefusedError.

        sent: told once all of it is on its way, but for little; the link is then another request's.
        """
        looked = self._prepared(link)

        def converse(connection: Stream, exchange: _Exchange, deadline: Deadline) -> None:
            checked = request.placement == "cloud"  # a codec's bytes have checksums of their own
            connection.hold_back(sent is not None)
            exchange.sent_at = connection.send_request(request, context, checked, deadline)
            if sent is not None:
                sent()
            exchange.sent.append(Span("transmit", exchange.sent_at, exchange.sent_at, 0, LINK))
            # The cloud waits for that before it sends an answer again, which is billed and not measured.
            hurried = bool(request.same_as) and not request.replay and sent is None
            _listen(connection, exchange, request.id, deadline, hurried=hurried)

        return self._asked(link, converse, time.monotonic(), looked)

    def feed(self, request: wire.Request, feed: Source, link: Link) -> Answered:
        """Send a request and the chunks of its context, each as soon as it is made, while this thread prefills; and wait for
        the answer. Raises EndpointError, and what making them raises.
        """
        looked = self._prepared(link)
        started = time.monotonic()

        def converse(connection: Stream, exchange: _Exchange, deadline: Deadline) -> None:
            feed.begin(started, connection.rtt_s / 2)
            connection.hold_back(feed.late)
            exchange.sent_at = connection.send(request, deadline=deadline)
            listening = _Thread(lambda: _listen(connection, exchange, request.id, deadline, feed), feed)
            sending = _Thread(lambda: _send(connection, exchange, request.id, feed, deadline), feed)
            try:
                feed.prefill()
            except BaseException:
                feed.stop()
                connection.abort()
                raise
            finally:
                for thread in (sending, listening):
                    thread.join()
                connection.hold_back(False)
            # What the cloud says tells more than that nothing more could be sent, but not than that nothing more could be made.
            for thread in (sending, listening) if exchange.unmade is not None else (listening, sending):
                if thread.failure is not None and not exchange.unverified:
                    if not (feed.verified and exchange.answer and isinstance(thread.failure, TestbedError)):
                        raise thread.failure
                    exchange.unverified = str(thread.failure)  # the answer stands
            if feed.stopped and not exchange.unverified:
                _drain(connection, deadline)

        return self._asked(link, converse, started, looked)

    def _prepared(self, link: Link) -> Offset | None:
        """All that asking needs is there, and what the cloud's clock says, where it has one of its own."""
        if self._lingering is not None:  # nobody wanted to know what it cost
            self.hang_up()
        parse(link.transport).prepare()
        return self._clocks.look(link) if link.apart else None

    def _asked(
        self,
        link: Link,
        converse: Callable[[Stream, _Exchange, Deadline], None],
        started: float,
        looked: Offset | None,
    ) -> Answered:
        """What an exchange over the link's connection came to. looked: what the cloud's clock said before it began."""
        deadline, transport = Deadline(link.timeout), parse(link.transport).closed(link.secret)
        connection, fresh = self._connect(transport, link)
        before = _NOTHING if fresh else connection.stats()
        exchange, keep, lingers = _Exchange(clock=Clock(looked) if looked else None), False, False
        try:
            converse(connection, exchange, deadline)
            if looked is not None:
                _put_here(exchange, Clock(looked, self._clocks.behind(link, looked)))
            exchange.began = started if fresh else exchange.sent_at  # no instant lies between two stages
            spans = _spans(exchange)
            if deadline.passed(spans[-1].end):  # as it would have been had the cloud computed it again
                raise EndpointError(f"nothing arrived within {deadline}")
            judged = _verified(exchange)
            assert exchange.answer is not None
            keep = transport.connection == "reuse" and not exchange.unverified
            if lingers := link.lingers and fresh and not keep:
                self._lingering = connection, exchange.answer.retransmits
        finally:
            if keep:
                self._kept[link.name, link.transport] = connection
            elif not lingers:
                self._kept.pop((link.name, link.transport), None)
                connection.finish()
        cost = connection.stats()
        return Answered(
            answer=exchange.answer,
            spans=spans,
            wire_bytes=cost.sent + cost.received - before.sent - before.received,
            retransmits=cost.sent_again - before.sent_again + exchange.answer.retransmits,
            congestion=cost.congestion,
            verified=judged,
            unverified=exchange.unverified,
            clock=exchange.clock,
        )

    def _connect(self, transport: Transport, link: Link) -> tuple[Stream, bool]:
        """A connection for this request, and whether it was opened for it."""
        kept = self._kept.get((link.name, link.transport))
        if kept is not None:
            return kept, False
        return transport.connect(link.address, link.port, link.congestion, link.timeout), True


class _Thread(threading.Thread):
    """Runs a part of an exchange; its failure ends the feed, and is the exchange's."""

    def __init__(self, work: Callable[[], None], feed: Source) -> None:
        super().__init__(daemon=True)
        self._work, self._feed = work, feed
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error
            self._feed.stop()


def _send(connection: Stream, exchange: _Exchange, id: int, feed: Source, deadline: Deadline) -> None:
    """Every chunk, as soon as it is made, and the request's end."""
    count = length = 0
    for chunk in _made(feed, connection, exchange):
        header = wire.Chunk(id, count, False, chunk.crc, chunk.level, chunk.part.start, chunk.part.stop)
        started = connection.send_chunk(header, chunk.payload, deadline, chunk.part.priority)
        sent = Span("transmit", started, started, count, LINK, feed.levels[chunk.level], len(chunk.payload))
        exchange.sent.append(sent)
        feed.handed(count, started, len(chunk.payload))
        count, length = count + 1, length + len(chunk.payload)
    connection.send(wire.End(id, count, length), deadline=deadline)


def _made(feed: Source, connection: Stream, exchange: _Exchange) -> Iterator[Chunk]:
    """The feed's chunks. Where one cannot be made no answer can come, so nobody waits for it any longer."""
    try:
        yield from feed
    except Exception as error:
        exchange.unmade = error
        connection.abort()
        raise


def _drain(connection: Stream, deadline: Deadline) -> None:
    """Wait until what was sent in vain has crossed the link, where the next request would be behind it."""
    while not connection.acknowledged() and not deadline.passed(time.monotonic()):
        time.sleep(_LOOK_S)


def _listen(
    connection: Stream,
    exchange: _Exchange,
    id: int,
    deadline: Deadline,
    feed: Source | None = None,
    hurried: bool = False,
) -> None:
    """What the cloud says of a request, up to its answer, or what it says of that. hurried: the first token is confirmed at
    once. Raises EndpointError."""
    more = feed is not None and feed.verified
    while exchange.answer is None or (more and exchange.verdict is None):
        received = connection.receive(_NO_PAYLOAD, deadline)
        if received is None:
            raise EndpointError("the cloud closed the connection without an answer")
        header: Any = received.header
        if isinstance(header, wire.Failure):
            raise (RefusedError if header.refused else EndpointError)(f"the cloud: {header.message}")
        if header.id == id and isinstance(header, wire.Receipt) and feed is not None:
            at = exchange.clock.here(header.at) if exchange.clock else header.at
            feed.arrived(header.index, min(at, received.at))
        elif header.id == id and isinstance(header, wire.Enough) and feed is not None:
            feed.stop()
        elif header.id == id and isinstance(header, wire.FirstToken) and exchange.first is None:
            exchange.first, exchange.first_at = header, received.at
            if hurried:
                connection.confirm()
        elif (
            header.id == id and isinstance(header, wire.Answer) and exchange.first and exchange.answer is None
        ):
            exchange.answer, exchange.answered_at = header, received.at
        elif header.id == id and isinstance(header, wire.Verdict) and exchange.answer is not None:
            exchange.verdict, exchange.verdict_at = header, received.at
        else:
            raise EndpointError(f"the cloud sent a {type(header).__name__} frame out of turn")


def _put_here(exchange: _Exchange, clock: Clock) -> None:
    """Has what the cloud said in times of this side's clock. Raises EndpointError where its own jumped."""
    if jumped_s := clock.jumped_s:
        raise EndpointError(
            f"the cloud's clock jumped by {jumped_s:+.3f} s within the request (it was set, or its machine stood still): "
            "none of its times can be told"
        )
    here, sent = Here(clock), [span.start for span in exchange.sent]
    first, answer, verdict = exchange.first, exchange.answer, exchange.verdict
    assert first is not None and answer is not None
    exchange.clock = clock
    exchange.first = here.first(first, exchange.sent_at, exchange.first_at)
    exchange.answer = here.answer(answer, sent, exchange.first_at, exchange.answered_at)
    if verdict is not None:
        later = sent[len(answer.arrived) :]
        exchange.verdict = here.verdict(verdict, later, exchange.answer.sent_at, exchange.verdict_at)


def _spans(exchange: _Exchange) -> list[Span]:
    """The exchange's spans. Raises EndpointError where the cloud's times cannot be."""
    first, answer = exchange.first, exchange.answer
    assert first is not None and answer is not None
    arrived = answer.arrived or (answer.received_at,)
    _check_times(exchange, first, answer, arrived)
    ended = exchange.answered_at + answer.skipped_s
    worked = [
        Span(w.stage, w.start, w.end, w.chunk, CLOUD, TEXT if w.tokens else "", w.tokens)
        for w in answer.worked
    ]
    worked[-1] = worked[-1]._replace(end=exchange.first_at)  # it ends with its way to this side
    return [
        Span("connect", exchange.began, exchange.sent_at, 0, LINK),
        *(sent._replace(end=at) for sent, at in zip(exchange.sent, arrived, strict=False)),
        *worked,
        Span("generate", exchange.first_at, ended, 0, CLOUD),
    ]


def _verified(exchange: _Exchange) -> Verified | None:
    """What was said of the answer. Raises EndpointError where it cannot be."""
    first, answer, verdict = exchange.first, exchange.answer, exchange.verdict
    if first is None or answer is None or verdict is None:
        return None
    return verified(first, (answer, exchange.answered_at), (verdict, exchange.verdict_at), exchange.sent)


def _check_times(
    exchange: _Exchange, first: wire.FirstToken, answer: wire.Answer, arrived: tuple[float, ...]
) -> None:
    """Raises EndpointError where the cloud's times do not lie between the request and its answer, in their order."""
    worked, done = answer.worked, answer.sent_at
    sent = [span.start for span in exchange.sent]
    in_order = (
        len(arrived) <= len(sent)
        and all(start <= at for start, at in zip(sent, arrived, strict=False))
        and all(exchange.sent_at <= w.start <= w.end <= first.sent_at + ROUNDING_S for w in worked)
        and bool(worked)
        and worked[-1].stage == "first_token"
        and exchange.sent_at <= answer.received_at <= done
        and first.sent_at <= exchange.first_at <= exchange.answered_at
        and first.sent_at <= done <= exchange.answered_at
    )
    generated = answer.generate_s - answer.skipped_s
    off = 2 * exchange.clock.error_s + DRIFT * generated if exchange.clock else 0.0
    if not in_order or generated > done - first.sent_at + ROUNDING_S + off:
        raise EndpointError(
            f"the cloud's answer has times that cannot be: of a request of {exchange.sent_at:.6f} to "
            f"{exchange.answered_at:.6f} s it says received at {answer.received_at:.6f}, first token at "
            f"{first.sent_at:.6f}, sent at {done:.6f}, generated for {answer.generate_s:.6f} s"
        )
