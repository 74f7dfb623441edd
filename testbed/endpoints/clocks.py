"""What the cloud's clock says, asked over the link beside the requests, and the cloud's times as this side's clock has them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from msgspec import structs

from testbed.deadline import Deadline
from testbed.endpoints.protocol import Link
from testbed.errors import EndpointError, TestbedError
from testbed.transport import wire
from testbed.transport.clock import DRIFT, Clock, Offset, offset
from testbed.transport.transport import Stream, parse

#: Exchanges of a set.
EXCHANGES = 8


class Clocks:
    """A connection a link and transport beside those of the requests, on which nothing else is said."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], Stream] = {}

    def look(self, link: Link) -> Offset:
        """A set of exchanges, while nothing else is under way. Raises EndpointError."""
        if (stream := self._streams.pop((link.name, link.transport), None)) is not None:
            with contextlib.suppress(TestbedError):  # else the cloud no longer knows that connection
                return self._ask(link, stream)
        transport = parse(link.transport).closed(link.secret)
        return self._ask(link, transport.connect(link.address, link.port, link.congestion, link.timeout))

    def behind(self, link: Link, before: Offset) -> Offset:
        """What `look` finds; where nobody answers any more, what may have become of what was found before."""
        try:
            return self.look(link)
        except TestbedError:
            now = time.monotonic()
            return Offset(now, before.ahead_s, before.error_s + DRIFT * (now - before.at))

    def _ask(self, link: Link, stream: Stream) -> Offset:
        deadline = Deadline(link.timeout)
        try:
            found = offset([_exchange(stream, number, deadline) for number in range(EXCHANGES)])
        except BaseException:
            stream.close()
            raise
        self._streams[link.name, link.transport] = stream
        return found


def _exchange(stream: Stream, number: int, deadline: Deadline) -> tuple[float, float, float, float]:
    sent = stream.send(wire.Clock(number), deadline=deadline)
    received = stream.receive(0, deadline)
    told = received.header if received is not None else None
    if received is None or not isinstance(told, wire.Clocked) or told.id != number:
        raise EndpointError("the cloud did not say what its clock says")
    if told.answered < told.received or told.answered - told.received > received.at - sent:
        raise EndpointError("the cloud says of its clock what cannot be")
    return sent, told.received, told.answered, received.at


class Here:
    """The cloud's times by this side's clock, as far as that is known: within the clock's error they are moved to where they can
    be, behind what was sent and before what came of it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def _at(self, there: float, least: float, most: float) -> float:
        here, off = self._clock.here(there), self._clock.error_s
        return min(max(here, least), most) if least - off <= here <= most + off else max(0.0, here)

    def first(self, first: wire.FirstToken, sent_at: float, came_at: float) -> wire.FirstToken:
        """The request's first bytes were sent, and this came, at these moments."""
        return structs.replace(first, sent_at=self._at(first.sent_at, sent_at, came_at))

    def answer(self, answer: wire.Answer, sent: list[float], first_at: float, came_at: float) -> wire.Answer:
        """sent: when each chunk was; first_at: when the first token came."""
        began = sent[0] if sent else first_at
        return structs.replace(
            answer,
            received_at=self._at(answer.received_at, began, came_at),
            arrived=self._arrived(answer.arrived, sent, came_at),
            worked=self._worked(answer.worked, began, first_at),
            sent_at=self._at(answer.sent_at, began, came_at),
        )

    def verdict(
        self, verdict: wire.Verdict, sent: list[float], answered: float, came_at: float
    ) -> wire.Verdict:
        """sent: when each chunk behind the answer's was; answered: when the answer was sent there, by this side's clock."""
        return structs.replace(
            verdict,
            arrived=self._arrived(verdict.arrived, sent, came_at),
            worked=self._worked(verdict.worked, answered, came_at),
            sent_at=self._at(verdict.sent_at, answered, came_at),
        )

    def _arrived(self, arrived: tuple[float, ...], sent: list[float], most: float) -> tuple[float, ...]:
        starts: Iterable[float] = sent + [most] * (len(arrived) - len(sent))
        return tuple(self._at(at, start, most) for at, start in zip(arrived, starts, strict=False))

    def _worked(self, worked: tuple[wire.Worked, ...], least: float, most: float) -> tuple[wire.Worked, ...]:
        return tuple(
            structs.replace(w, start=self._at(w.start, least, most), end=self._at(w.end, least, most))
            for w in worked
        )
