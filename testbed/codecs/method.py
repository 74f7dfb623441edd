"""What every codec method is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from testbed.kinds import Kind


@dataclass(frozen=True)
class Method(Kind):
    """Base of all methods: a kind whose parameters are hyper-parameters, and whose `ratio`, where it has one, has no default."""

    stage: ClassVar[Literal["selector", "transform", "quantizer", "coder"]]

    @property
    def refers(self) -> bool:
        """Whether the text refers to something outside of it (a file), so that it must be `bound` before it codes."""
        return False

    def bound(self, model: str | None) -> Method:
        """The method with what its text refers to written out. model: whose caches it will code. Raises SpecError."""
        return self

    @property
    def shared_bytes(self) -> int:
        """Bytes that both sides must have before anything crosses, and that no payload holds: of a method that is `bound`."""
        return 0
