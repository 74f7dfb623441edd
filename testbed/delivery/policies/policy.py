"""What a policy is: of a request as it stands, the level of the next chunk. No clock, no socket: all that it knows it is told.

Adding one is a file with a class, and a line in `POLICIES`. All times are seconds since the request began.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from testbed.errors import SpecError
from testbed.kinds import Kind

#: By the name that scenarios have.
POLICIES = {
    "fixed": "testbed.delivery.policies.fixed:Fixed",
    "throughput": "testbed.delivery.policies.throughput:Throughput",
    "ewma": "testbed.delivery.policies.ewma:EWMA",
    "mpc": "testbed.delivery.policies.mpc:MPC",
    "oracle": "testbed.delivery.policies.oracle:Oracle",
}


class Rung(NamedTuple):
    """A chunk at one level: what it costs."""

    bytes: int
    cloud_s: float = (
        0.0  #: what the cloud computes for it once it is there: a text's prefill, a codec's decoding
    )
    ready_s: float = 0.0  #: when it can be handed over at the earliest
    pass_s: float = (
        0.0  #: of a text, what the cloud takes more where the chunk before is none: they share a pass
    )


class Sent(NamedTuple):
    """A chunk that was handed over and is not known to have arrived."""

    bytes: int
    sent_s: float
    cloud_s: float = 0.0


class Arrival(NamedTuple):
    """A chunk that arrived at the cloud. Of an earlier request on this connection: times below zero."""

    bytes: int
    sent_s: float
    arrived_s: float


@dataclass(frozen=True)
class Situation:
    """A request at the moment in which the next chunk's level is chosen.

    levels: the best first. chunks: those still to be sent, in their order, the next one first; each with a rung for each level.
    arrivals, under_way: in the order in which they were sent. delay_s: one way. cloud_free_s: when the cloud has done what
    arrived. rest_s: from when the cloud has done the last chunk to the first token at the edge: the question and the way back.
    margin_s: how long before the deadline a plan has to end. after_text: the chunk before the next one went as text.
    rate: the link's rate over time, (seconds, bits per second) from each step on, for who may know it.
    """

    now_s: float
    deadline_s: float | None
    levels: tuple[str, ...]
    chunks: tuple[tuple[Rung, ...], ...]
    arrivals: tuple[Arrival, ...] = ()
    under_way: tuple[Sent, ...] = ()
    delay_s: float = 0.0
    cloud_free_s: float = 0.0
    rest_s: float = 0.0
    margin_s: float = 0.0
    after_text: bool = False
    rate: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Policy(Kind, ABC):
    """Base of all policies. `foresees`: it has to be told the link's rate over time."""

    family: ClassVar = POLICIES
    foresees: ClassVar[bool] = False

    @abstractmethod
    def choose(self, situation: Situation) -> int:
        """The index of the next chunk's level."""

    def check(self, levels: tuple[str, ...]) -> None:
        """Raises SpecError where it cannot choose among these levels."""


def levels_error(policy: Policy, levels: tuple[str, ...]) -> SpecError:
    """That a policy wants a level which is not among these."""
    return SpecError(f"policy {policy}: the levels are 0 to {len(levels) - 1}: {', '.join(levels)}")
