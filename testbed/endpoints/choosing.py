"""A feed whose chunks' levels are chosen one by one, by what is known of the link and of the cloud when each is due."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from testbed.codecs.layout import expected_bytes
from testbed.delivery.adaptive import Adaptive
from testbed.delivery.delivery import SKIP, TEXT, Part
from testbed.delivery.policies.policy import Arrival, Rung, Sent, Situation
from testbed.delivery.policies.prediction import LEAST_BYTES
from testbed.endpoints.experience import Experience
from testbed.endpoints.feed import Chunk, Context, Feed
from testbed.endpoints.spans import Span
from testbed.endpoints.tokens import token_bytes

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec

#: Of an IP packet's bytes, which rates count, those that carry data: 1448 in 1500, with TCP's timestamps.
_GOODPUT = 1448 / 1500
_ROUNDS = 12  # of slow start: 60 MB a round trip


@dataclass(frozen=True)
class Outlook:
    """What is known before a request. shapes: of the model's layers (`expected_bytes`); prefill_s: of a token here; link: its
    name; rate: of the link, for policies that foresee: (monotonic seconds, bits per second or None without a limit).
    """

    shapes: Sequence[tuple[int, int, int, int | None]]
    prefill_s: float
    experience: Experience
    link: str = ""
    rate: Sequence[tuple[float, float | None]] = ()


def let_out(steps: Sequence[tuple[float, float]], since_s: float, rtt_s: float) -> list[tuple[float, float]]:
    """A rate over time as a connection lets it out that begins then: in slow start ten packets in the first round trip, twice as
    many in each that follows (RFC 6928, RFC 5681), until the link takes no more.
    """
    most = max((rate for _, rate in steps if rate < inf), default=inf)
    rounds = [(since_s + n * rtt_s, LEAST_BYTES * 8 * 2**n / rtt_s) for n in range(_ROUNDS)] if rtt_s else []
    rounds = [(at, rate) for at, rate in rounds if rate < most]
    if not steps or not rounds:
        return list(steps)
    opened = rounds[-1][0] + rtt_s
    ramp = [(-inf, inf), *rounds, (opened, inf)]
    times = sorted({at for at, _ in steps} | {at for at, _ in ramp[1:] if at > steps[0][0]})
    return [(at, min(_at(steps, at), _at(ramp, at))) for at in times]


def _at(steps: Sequence[tuple[float, float]], time_s: float) -> float:
    return steps[bisect_right(steps, time_s, key=lambda step: step[0]) - 1][1]


class AdaptiveFeed(Feed):
    """Asks its delivery's policy for each chunk's level."""

    asks_receipts = True

    def __init__(self, context: Context, delivery: Adaptive, outlook: Outlook) -> None:
        super().__init__(context, delivery, delivery.levels)
        self._delivery, self._outlook = delivery, outlook
        self._margin = outlook.experience.margin(str(delivery), outlook.link)
        self._margin_s = self._margin.seconds()
        self._began = self._delay = 0.0
        self._first_at: float | None = None
        self._shares: dict[tuple[Part, str], float] = {}
        self._handed: list[Sent] = []
        self._arrived: dict[int, float] = {}

    def store(self) -> None:
        """A text is computed behind parts of which a window must hide nothing yet: those are not in what is stored as a whole."""
        ends = [part.stop for part in self.parts]
        windowed = any(window is not None for *_, window in self._outlook.shapes)
        if TEXT in self.levels and windowed and ends[-1] not in self._made.blocks:
            run = self._context.blocks()
            self._made.blocks.update((end, run.run(end)) for end in ends)
        super().store()

    def __iter__(self) -> Iterator[Chunk]:
        """As `Feed` does; what is not prefilled by then is not wanted any more."""
        yield from super().__iter__()
        self.stop()

    def begin(self, at: float, delay_s: float) -> None:
        self._began, self._delay = at, delay_s

    def handed(self, index: int, at: float, size: int) -> None:
        rung = self._rung(self.parts[index], self.sent[index], at, self._length)
        cloud_s = rung.cloud_s + (0.0 if self._after_text(index) else rung.pass_s)
        with self._changed:
            self._handed.append(Sent(size, at - self._began, cloud_s))

    def arrived(self, index: int, at: float) -> None:
        with self._changed:
            self._arrived[index] = at - self._began

    @property
    def deadline_s(self) -> float | None:
        """Of the first token, from when the request begins."""
        return self._delivery.deadline

    def learn(self, spans: Sequence[Span], first_token_s: float) -> None:
        """How the request went, for those to come."""
        experience, made = self._outlook.experience, self._made
        experience.learn(self.parts, self.sent, spans)
        experience.gather_s = max((s for _, s in made.gathered.values()), default=experience.gather_s)
        experience.select_s.update((level, seconds) for level, (_, seconds) in made.kept.items())
        if self._delivery.deadline is not None:
            self._margin.learn(first_token_s, self._delivery.deadline, self._margin_s)

    def _after_text(self, index: int) -> bool:
        return index > 0 and self.sent[index - 1] == TEXT

    def _choose(self, index: int) -> int:
        return self._delivery.policy.choose(self.situation(index))

    def situation(self, index: int) -> Situation:
        """As it is now, with the chunk of that index to be sent next."""
        now = time.monotonic()
        self._first_at = now - self._began if self._first_at is None else self._first_at
        with self._changed:
            there, arrived, handed = self._there, dict(self._arrived), list(self._handed)
        arrivals, cloud_free = [], 0.0
        for number, sent in enumerate(handed):
            if number in arrived:
                at = max(arrived[number], sent.sent_s)
                arrivals.append(Arrival(sent.bytes, sent.sent_s, at))
                cloud_free = max(cloud_free, at) + sent.cloud_s
        chunks = [
            tuple(self._rung(p, level, now, there) for level in self.levels) for p in self.parts[index:]
        ]
        rate = [(at - self._began, inf if bps is None else bps * _GOODPUT) for at, bps in self._outlook.rate]
        rate = let_out(rate, self._first_at, 2 * self._delay)
        return Situation(
            now_s=now - self._began,
            deadline_s=self._delivery.deadline,
            levels=self.levels,
            chunks=tuple(chunks),
            arrivals=tuple(arrivals),
            under_way=tuple(sent for number, sent in enumerate(handed) if number not in arrived),
            delay_s=self._delay,
            cloud_free_s=cloud_free,
            rest_s=self._outlook.experience.rest_s(self._delay),
            margin_s=self._margin_s,
            after_text=self._after_text(index),
            rate=rate or None,
        )

    def _rung(self, part: Part, level: str, now: float, there: int) -> Rung:
        """A part at a level, while so much is prefilled."""
        tokens, experience = part.stop - part.start, self._outlook.experience
        if level == SKIP:
            return Rung(0)
        if level == TEXT:
            size = token_bytes(self._context.vocabulary) * tokens
            pass_s, each_s = experience.passes.line()
            return Rung(size, each_s * tokens, pass_s=pass_s)
        codec = self._context.codecs[level]
        needed = self._length if codec.selects else part.stop
        ready = max(0, needed - there) * self._outlook.prefill_s
        if self._within(codec):
            ready += experience.encode_s.get(level, 0.0) * tokens
            if codec.selects and level not in self._selected:
                ready += experience.select_s.get(level, 0.0)
                ready += 0.0 if codec.needs in self._gathered else experience.gather_s
        return Rung(
            self._size(part, level, codec),
            experience.decode_s.get(level, 0.0) * tokens,
            now - self._began + ready if ready else 0.0,
        )

    def _size(self, part: Part, level: str, codec: Codec) -> int:
        """Known of what is stored, else what the codec makes of so many tokens, an entropy coder's gain aside."""
        stored = self._context.stored is not None and not codec.asks
        if stored and (level, part) in self._made.payloads:
            return sum(map(len, self._made.payloads[level, part][0]))
        tokens = part.stop - part.start
        size = expected_bytes(codec.spec, self._outlook.shapes, tokens)
        if level not in self._selected:
            return size
        expected = max(1 / tokens, getattr(codec.spec.selector, "ratio", 1.0))
        return round(size * self._share(part, level) / expected)

    def _share(self, part: Part, level: str) -> float:
        """Of a part's tokens, that a level has been chosen to keep."""
        if (part, level) not in self._shares:
            kept = self._made.kept[level][0]
            self._shares[part, level] = kept.within(part.start, part.stop) / (part.stop - part.start)
        return self._shares[part, level]
