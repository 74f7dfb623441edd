"""A link's conditions: the queue in front of a bottleneck, one direction, and a profile of two. `testbed.net.profile.profile`
reads them from text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from testbed.errors import SpecError
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.jitter import LAWS, JitterTable
from testbed.net.profile.loss import LossModel
from testbed.net.profile.schedule import Schedule
from testbed.net.profile.trace import Trace, Way
from testbed.units import (
    exact,
    exact_percentage,
    exact_rate,
    exact_time,
    format_fraction,
    format_rate,
    format_size,
    format_time,
    parse_size,
)

LEAST_MTU, LARGEST_MTU = 576, 9000


def bounded(what: str, value: float, low: float, high: float, show: Callable[[float], str]) -> None:
    """Raises SpecError where *value* lies outside; *what* it is and how *show* writes it are in the message."""
    if not low <= value <= high:  # also false for NaN
        raise SpecError(f"{what} {show(value)} lies outside {show(low)}..{show(high)}")


MIN_QUEUE_BYTES = 64_000
"""The least a queue in BDPs holds: a short link's product is a few packets, less than a real port has."""

_LIMITS = {"s": 60.0, "bytes": 1e9, "packets": 1e6, "bdp": 100.0}


@dataclass(frozen=True)
class CoDel:
    """Controlled delay, RFC 8289: what has waited longer than `target_s` for all of `interval_s` is dropped (or
    marked), ever more often until the wait is below it again. The queue's size remains its limit."""

    target_s: float = 0.005
    interval_s: float = 0.1

    def __post_init__(self) -> None:
        bounded("queue: CoDel's target", self.target_s, 1e-5, 10.0, format_time)
        bounded("queue: CoDel's interval", self.interval_s, 1e-4, 60.0, format_time)


@dataclass(frozen=True)
class Queue:
    """The bottleneck's buffer beyond the packets in flight. Raises SpecError outside of its bounds."""

    amount: float = 1.0
    unit: Literal["s", "bytes", "packets", "bdp"] = "bdp"
    codel: CoDel | None = None
    """None: drop-tail."""

    def __post_init__(self) -> None:
        least = {"s": 0.0, "bytes": float(LEAST_MTU), "packets": 1.0, "bdp": 0.0}
        if self.unit not in least:
            raise SpecError(f"queue: unknown unit {self.unit!r}")
        bounded("queue", self.amount, least[self.unit], _LIMITS[self.unit], self._show)

    def _show(self, amount: float) -> str:
        if self.unit == "s":
            return exact_time(amount)
        if self.unit == "bytes":
            return exact(amount, format_size, parse_size, "b")
        number = f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)
        return number + ("p" if self.unit == "packets" else "bdp")

    def __str__(self) -> str:
        size = self._show(self.amount)
        if self.codel is None:
            return size
        target, interval = exact_time(self.codel.target_s), exact_time(self.codel.interval_s)
        return f"codel({size},target={target},interval={interval})"


MTU = 1500
"""Bytes of the network layer in the largest packet, unless a profile says otherwise."""
INLINE_SOURCE = "given in place"

_COMMA = re.compile(r",(?![^(]*\))")  # those in parentheses belong to what stands before them


def split_conditions(text: str) -> list[str]:
    """``a=1,b=f(2,3)`` -> ``["a=1", "b=f(2,3)"]``."""
    return _COMMA.split(text)


@dataclass(frozen=True)
class Direction:
    """One way of a link. Raises SpecError where a value is out of bounds.

    What happens to a packet, in this order: it is duplicated, lost (or marked, see `ecn`) and corrupted with
    the probabilities given; it travels for `delay_s` plus a random deviation, never below zero in all; it waits
    in the queue, or finds it full and is dropped; and it is serialised at `rate_bps`. A duplicate is a packet of
    its own from there on. Packets keep their order, unless `jitter_reorders` or `reorder` say otherwise: one that
    would overtake its predecessor arrives right behind it, as on a radio link with in-order delivery.
    """

    rate_bps: float | None = None
    """Bits per second of the network layer (IP header and up); None: as fast as the host."""
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """The unit of `jitter_law`: a normal one's standard deviation."""
    loss: float = 0.0
    """The fraction lost in the long run; each packet on its own, unless `loss_model` says otherwise."""
    queue: Queue = field(default_factory=Queue)
    loss_model: LossModel | None = None
    """Bursts: a chain, whose mean `loss` then is (and need not be given)."""
    jitter_law: str | JitterTable = "normal"
    """One of `testbed.net.profile.jitter.LAWS`, or a table of one's own."""
    jitter_reorders: bool = False
    """Whether packets that are delayed less overtake."""
    duplicate: float = 0.0
    """The probability that a packet comes twice."""
    corrupt: float = 0.0
    """The probability that one bit of a packet is flipped; its checksums are those of before."""
    reorder: float = 0.0
    """The probability that a packet skips the delay, and so overtakes those that are under way."""
    ecn: bool = False
    """Packets whose sender understands ECN are marked (congestion experienced) where `loss` or CoDel would lose
    them. RFC 3168. A full queue drops all the same."""
    overhead_bytes: int = 0
    """Bytes of lower layers that each packet costs at the rate, besides its own."""
    mtu: int = MTU
    """Bytes of the network layer in the largest packet; what a queue in packets is counted with."""
    seed: int | None = None
    """Of this direction's random numbers; None: the run's."""
    trace: Trace | None = None
    """What changes over time: the rate, which is then not given here (outages stop the one that is), delay or loss."""

    def __post_init__(self) -> None:
        if self.rate_bps is not None:
            bounded("rate", self.rate_bps, 1e3, 100e9, format_rate)
        bounded("delay", self.delay_s, 0.0, 60.0, format_time)
        for name in ("loss", "duplicate", "corrupt", "reorder"):
            bounded(name, getattr(self, name), 0.0, 1.0, format_fraction)
        bounded("overhead", self.overhead_bytes, 0, 1000, format_size)
        bounded("mtu", self.mtu, LEAST_MTU, LARGEST_MTU, lambda size: f"{size:g}")
        if self.seed is not None:
            bounded("seed", self.seed, 0, 2**63 - 1, str)
        if self.loss_model is not None:
            if self.loss not in (0.0, self.loss_model.mean):
                raise SpecError("loss: the model has a mean of its own")
            object.__setattr__(self, "loss", self.loss_model.mean)
        if isinstance(self.jitter_law, str) and self.jitter_law not in LAWS:
            raise SpecError(f"jitter: unknown law {self.jitter_law!r}; use one of {', '.join(LAWS)}")
        if not 0 <= self.jitter_s <= self.delay_s:
            raise SpecError(
                f"jitter {format_time(self.jitter_s)} exceeds the delay {format_time(self.delay_s)}: "
                "packets would have to arrive before they were sent"
            )
        if self.trace is not None and self.trace.sets_rate and self.rate_bps is not None:
            raise SpecError(f"{self.trace} gives the rate; leave rate= away")
        if self.reorder and not self.delay_s:
            raise SpecError("reorder needs a delay that a packet can skip")

    def __str__(self) -> str:
        conditions = [f"{key}={value}" for key, value in self._written().items()]
        return ",".join(conditions + ([str(self.trace)] if self.trace is not None else []))

    def _written(self) -> dict[str, str]:
        """Key -> value, of all that is not as usual; without the trace."""
        jitter = self.jitter_s or self.jitter_law != "normal" or self.jitter_reorders
        texts = {
            "rate": "" if self.rate_bps is None else exact_rate(self.rate_bps),
            "delay": exact_time(self.delay_s) if self.delay_s or self.trace is None else "",
            "jitter": self._jitter_text() if jitter else "",
            "loss": exact_percentage(self.loss) if self.loss else "",
            "queue": str(self.queue) if self.queue != Queue() else "",
            "duplicate": exact_percentage(self.duplicate) if self.duplicate else "",
            "corrupt": exact_percentage(self.corrupt) if self.corrupt else "",
            "reorder": exact_percentage(self.reorder) if self.reorder else "",
            "ecn": "yes" if self.ecn else "",
            "overhead": f"{self.overhead_bytes}b" if self.overhead_bytes else "",
            "mtu": str(self.mtu) if self.mtu != MTU else "",
            "seed": "" if self.seed is None else str(self.seed),
        }
        texts |= {"loss": str(self.loss_model)} if self.loss_model is not None else {}
        return {key: text for key, text in texts.items() if text}

    def _jitter_text(self) -> str:
        spread, options = exact_time(self.jitter_s), ["reorder"] if self.jitter_reorders else []
        if isinstance(self.jitter_law, JitterTable):
            return f"table({','.join([spread, f'file={self.jitter_law.path}', *options])})"
        if self.jitter_law == "normal" and not options:
            return spread
        return f"{self.jitter_law}({','.join([spread, *options])})"

    def beyond_the_basics(self) -> dict[str, str]:
        """What this asks for besides rate, delay, normal jitter, independent loss and a drop-tail queue: name ->
        how it is written. An emulator has to know of each, or refuse it."""
        written = self._written()
        keys = {
            "jitter law": "jitter" if self.jitter_s and self.jitter_law != "normal" else "",
            "jitter reorder": "jitter" if self.jitter_s and self.jitter_reorders else "",
            "loss model": "loss" if self.loss_model is not None else "",
            "codel": "queue" if self.queue.codel is not None else "",
        }
        keys |= {name: name for name in ("duplicate", "corrupt", "reorder", "ecn", "overhead", "mtu", "seed")}
        beyond = {name: f"{key}={written[key]}" for name, key in keys.items() if key in written}
        return beyond | ({"trace": str(self.trace)} if self.trace is not None else {})

    @property
    def limited(self) -> bool:
        """Whether it has a rate, as far as is known without reading a trace's file."""
        return self.rate_bps is not None or (self.trace is not None and self.trace.may_set_rate)

    def schedule(self, way: Way, origin_s: float) -> Schedule | Deliveries | None:
        """What changes over time, beginning at `origin_s`; None: nothing does. Raises SpecError where the trace's file is
        missing or wrong, or says what is said here, too."""
        if self.trace is None:
            return None
        schedule = self.trace.schedule(way, self.rate_bps, origin_s)
        for name, there, here in (
            ("delay", schedule.delays, self.delay_s),
            ("loss", schedule.losses, self.loss),
        ):
            if there is not None and here:
                raise SpecError(f"{self.trace}: it gives the {name}; leave {name}= away")
        return schedule

    def steady(self, way: Way, *, peak: bool = False) -> Direction:
        """The same without what changes: its mean in its place, or with `peak` the largest rate. Raises as
        `schedule` does."""
        if self.trace is None:
            return self
        rate = self.trace.rates_bps(way, self.rate_bps)[peak]
        means = self.trace.means(way, self.rate_bps)
        return replace(
            self,
            trace=None,
            rate_bps=None if rate is None else min(100e9, max(1e3, rate)),
            delay_s=self.delay_s or means.get("delays", 0.0),
            loss=self.loss or means.get("losses", 0.0),
        )

    def mean_rate_bps(self, way: Way) -> float | None:
        """Bits per second over time, also below the least that a steady link can have; None: not limited."""
        return self.rate_bps if self.trace is None else self.trace.rates_bps(way, self.rate_bps)[0]

    def queue_bytes(self, round_trip_s: float) -> int | None:
        """Bytes the queue holds, at least one packet; `round_trip_s` is the sum of both ways' delays.

        None where that has no meaning: nothing waits for an unlimited rate, so its time and BDPs are no size.
        """
        if self.queue.unit == "bytes":
            return max(self.mtu, round(self.queue.amount))
        if self.queue.unit == "packets":
            return max(1, round(self.queue.amount)) * self.mtu
        if self.rate_bps is None:
            return None
        if self.queue.unit == "s":
            return max(self.mtu, round(self.queue.amount * self.rate_bps / 8))
        return max(MIN_QUEUE_BYTES, round(self.queue.amount * self.rate_bps / 8 * round_trip_s))


@dataclass(frozen=True)
class Profile:
    """The conditions of one link, each way.

    `name` is a preset's name or the canonical form of the text the profile was read from, so `str` reads
    back; `source` says where the numbers come from.
    """

    name: str
    up: Direction
    down: Direction
    source: str = INLINE_SOURCE
    measured: bool = False
    """Of a link between real hosts: its conditions are what they are, and what calibration finds is recorded, never judged."""

    def __post_init__(self) -> None:
        if self.up.mtu != self.down.mtu:
            raise SpecError(f"a link has one mtu, not {self.up.mtu} up and {self.down.mtu} down")

    @classmethod
    def parse(cls, text: str) -> Profile:
        """The profile that a text stands for: a preset's name, ``rate=…,delay=…`` or ``up:…;down:…``. Raises SpecError."""
        from testbed.net.profile.profile import parse_profile

        return parse_profile(text)

    def __str__(self) -> str:
        return self.name

    def text(self) -> str:
        """The numbers themselves, a preset's too."""
        if self.measured:
            return self.name
        return str(self.up) if self.up == self.down else f"up:{self.up};down:{self.down}"

    @property
    def ways(self) -> dict[Way, Direction]:
        """Each way's conditions."""
        return {"up": self.up, "down": self.down}

    @property
    def round_trip_s(self) -> float:
        """Both ways' one-way delays, seconds."""
        return self.up.delay_s + self.down.delay_s

    @property
    def changes(self) -> bool:
        """Whether a trace is in force on one of the ways."""
        return self.up.trace is not None or self.down.trace is not None

    @property
    def length_s(self) -> float:
        """How long the longest of its traces is; 0: nothing changes. Raises SpecError where one is missing or wrong."""
        schedules = [direction.schedule(way, 0.0) for way, direction in self.ways.items()]
        return max((schedule.length_s for schedule in schedules if schedule is not None), default=0.0)

    def remarks(self) -> list[str]:
        """What is to be seen of its traces before they are used (`Trace.remarks`), once where both ways have the same."""
        remarks = []
        for way, direction in self.ways.items():
            if direction.trace is not None:
                remarks += direction.trace.remarks(way, direction.rate_bps)
        return list(dict.fromkeys(remarks))

    def steady(self, *, peak: bool = False) -> Profile:
        """The profile with means, or peak rates, in the place of what changes over time; see `Direction.steady`."""
        if not self.changes:
            return self
        return replace(self, up=self.up.steady("up", peak=peak), down=self.down.steady("down", peak=peak))

    def scaled(self, share: float) -> Profile:
        """The same with that share of its rates, steady or not; queues hold what they held."""
        if share == 1:
            return self
        ways = {}
        for way, direction in self.ways.items():
            held, trace = self.queue_bytes(way), direction.trace
            if trace is not None and direction.rate_bps is None:
                trace = replace(trace, scale=trace.scale * share)
            ways[way] = replace(
                direction,
                rate_bps=None if direction.rate_bps is None else direction.rate_bps * share,
                trace=trace,
                queue=direction.queue
                if held is None
                else replace(direction.queue, amount=held, unit="bytes"),
            )
        return replace(self, up=ways["up"], down=ways["down"])

    def queue_bytes(self, way: Way) -> int | None:
        """See `Direction.queue_bytes`; BDPs and times of a rate that changes are those of its mean."""
        steady = self.steady()
        return steady.ways[way].queue_bytes(steady.round_trip_s)

    def bdp_bytes(self) -> float:
        """Bandwidth-delay product of the faster way at its fastest, bytes; 0 where the rate is not limited."""
        most = self.steady(peak=True)
        return max(most.up.rate_bps or 0.0, most.down.rate_bps or 0.0) / 8 * most.round_trip_s


#: What a link between hosts is, whatever that may be.
MEASURED = Profile(
    "measured", Direction(), Direction(), "the link as it is, calibrated before the first trial", True
)
