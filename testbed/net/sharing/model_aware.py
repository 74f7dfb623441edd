"""A fixed share for everybody, in proportion to what its model has to send: so all that start together end together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from testbed.errors import SpecError, UnitError
from testbed.net.sharing.contract import Fixed
from testbed.units import parse_size


@dataclass(frozen=True)
class ModelAware(Fixed):
    """Everybody has a part of the time reserved in proportion to its *bytes*; what is not used is lost.

    *bytes*: what each has to send, in the order of the cell's links: the payload of its model and codec. Without them it is what
    edges announce, under a load.
    """

    bytes: tuple[str, ...] = ()

    name = "model-aware"
    source = "allocation of one cell's bandwidth to agents by what is to be sent, beside equal reservations"

    def __post_init__(self) -> None:
        self.require("bytes", "of sizes above 0", all(size > 0 for size in self._sizes))

    @property
    def _sizes(self) -> list[int]:
        try:
            return [parse_size(size) for size in self.bytes]
        except UnitError as error:
            raise SpecError(f"{self.name}: bytes: {error}") from None

    def announced(self, sizes: Sequence[float]) -> ModelAware:
        """With what the cell's links have to send, in bytes, where it does not say that itself. Raises SpecError."""
        return self if self.bytes else replace(self, bytes=tuple(f"{round(size)}b" for size in sizes))

    def check(self, members: int) -> None:
        if not self.bytes:
            raise SpecError(
                f"{self.name}: bytes is missing: what each link has to send, such as {self.name}(bytes=[9mb, 3mb]); a load's "
                "`allocate` goes by what edges announce"
            )
        if len(self.bytes) != members:
            raise SpecError(f"{self.name}: bytes has {len(self.bytes)} sizes, and the cell {members} links")

    def alone(self, place: int, members: int) -> float:
        return self._sizes[place] / sum(self._sizes)
