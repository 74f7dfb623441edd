"""Everything is encoded, then sent, and decoded when all of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.delivery import Delivery


@dataclass(frozen=True)
class Whole(Delivery):
    """All at once, as the codec made it."""

    name: ClassVar[str] = "whole"
    source: ClassVar[str] = "a payload in one transfer, which every bytes-over-rate figure means"
