"""One level for all chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.policies.policy import Policy, Situation, levels_error


@dataclass(frozen=True)
class Fixed(Policy):
    """Always the same level, whatever the link does: what the others are compared with."""

    name: ClassVar[str] = "fixed"
    source: ClassVar[str] = "a baseline of our own"

    level: int = 0  #: counted from the best, 0

    def __post_init__(self) -> None:
        self.require("level", "0 (the best) or more", self.level >= 0)

    def check(self, levels: tuple[str, ...]) -> None:
        if self.level >= len(levels):
            raise levels_error(self, levels)

    def choose(self, situation: Situation) -> int:
        return self.level
