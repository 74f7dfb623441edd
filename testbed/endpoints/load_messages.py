"""What the orchestrator says to sides without models, and what they answer: what to send, when to ask, what became of it."""

from __future__ import annotations

from typing import NamedTuple

from testbed.endpoints.protocol import (
    Count,
    Link,
    Message,
    Name,
    Part,
    Replayed,
    Seconds,
    TrialResult,
    Ware,
)
from testbed.speed.times import DeviceTimes


class Stage(Message[None]):
    """An edge without a model: send these wares, whoever asks for them by their numbers, over that link."""

    wares: dict[int, Ware]
    link: Link


class Answers(Message[None]):
    """A cloud without a model: answer requests for wares so, in the order of a discipline (its canonical text). Whoever is still
    being served goes on by the one before. times: of devices, by wares' `model`, where passes over several tokens are waited
    for."""

    serving: Name
    wares: dict[int, Replayed]
    times: dict[str, DeviceTimes]


class Planned(NamedTuple):
    """A request of a load: so many seconds behind its start, for that ware, as that client's."""

    number: Count
    at: Seconds
    client: Name
    ware: Count


class Looping(NamedTuple):
    """A client of a closed loop: when it asks first, seconds behind the start; numbers: of its requests, the first and each next
    one so much more; wares: in turn."""

    client: Name
    at: Seconds
    number: Count
    stride: Count
    wares: tuple[Count, ...]


class Offer(Message[None]):
    """Begin to ask at `origin`, monotonic seconds: these requests, or those of these clients until `until_s` behind it."""

    origin: float
    planned: tuple[Planned, ...] = ()
    looping: tuple[Looping, ...] = ()
    think_s: Seconds = 0.0
    until_s: Seconds = 0.0


class Happened(Part):
    """What became of a request. at, ended: when it came up and was over, seconds behind the start (None: nobody knows); refused:
    the cloud had no room for it."""

    number: Count
    client: Name
    at: Seconds
    ware: Count
    result: TrialResult | None = None
    error: str = ""
    refused: bool = False
    ended: Seconds | None = None


class Collected(Part):
    """What became of requests since that was asked last; open: clients and requests of whom more will come."""

    happened: tuple[Happened, ...]
    open: Count


class Collect(Message[Collected]):
    """Tell what became of requests."""
