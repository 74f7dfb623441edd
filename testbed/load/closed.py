"""Clients that think between an answer and their next request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.kinds import Time
from testbed.load.load import Client, Load, random_of

_MOST_CLIENTS = 1024


@dataclass(frozen=True)
class Closed(Load):
    """So many clients, each of which asks again once it has its answer and has thought."""

    name: ClassVar[str] = "closed"
    source: ClassVar[str] = "Schroeder, Wierman, Harchol-Balter, Open Versus Closed, NSDI 2006"

    clients: int = 0  #: spread over the edges in turn; 0: one an edge
    think: Time = 0.0  #: between an answer and the client's next request

    def __post_init__(self) -> None:
        self.require("clients", f"0 to {_MOST_CLIENTS}", 0 <= self.clients <= _MOST_CLIENTS)
        self.require("think", "at most an hour", self.think <= 3600)

    def starting(self, edges: int, seed: str) -> list[Client]:
        """Every client: its edge, and when it asks first: at some moment of its time to think, lest all ask at once."""
        numbers = random_of(f"closed/{seed}")
        count = self.clients or edges
        return [Client(client % edges, numbers.uniform(0.0, self.think)) for client in range(count)]
