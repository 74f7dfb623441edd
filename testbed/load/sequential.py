"""One request at a time, each behind the answer to the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.load.load import Load


@dataclass(frozen=True)
class Sequential(Load):
    """One request at a time: every trial by itself."""

    name: ClassVar[str] = "sequential"
    source: ClassVar[str] = "what a testbed without contention measures"
    timed: ClassVar[bool] = False
