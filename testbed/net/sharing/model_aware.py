"""A fixed share for everybody, in proportion to what its model has to send: so all that start together end together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.errors import SpecError, UnitError
from testbed.net.sharing.contract import Scheduler, Turns, User
from testbed.units import parse_size


@dataclass(frozen=True)
class ModelAware(Scheduler):
    """Everybody has a part of the time reserved in proportion to its *bytes*; what is not used is lost.

    *bytes*: what each has to send, in the order of the cell's links: the payload of its model and codec.
    """

    bytes: tuple[str, ...]

    name = "model-aware"
    source = "allocation of one cell's bandwidth to agents by what is to be sent, beside equal reservations"
    fixed = True

    def __post_init__(self) -> None:
        self.require("bytes", "of sizes above 0", bool(self.bytes) and all(size > 0 for size in self._sizes))

    @property
    def _sizes(self) -> list[int]:
        try:
            return [parse_size(size) for size in self.bytes]
        except UnitError as error:
            raise SpecError(f"{self.name}: bytes: {error}") from None

    def check(self, members: int) -> None:
        if len(self.bytes) != members:
            raise SpecError(f"{self.name}: bytes has {len(self.bytes)} sizes, and the cell {members} links")

    def turns(self, members: Sequence[User]) -> Turns:
        return _Turns([self.alone(place, len(self.bytes)) for place in range(len(self.bytes))])

    def alone(self, place: int, members: int) -> float:
        return self._sizes[place] / sum(self._sizes)


class _Turns(Turns):
    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares

    def share(self, waiting: Sequence[User], now: float) -> None:
        for user in waiting:
            user.share = self._shares[user.place]
