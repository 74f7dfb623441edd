"""First come, first served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.serving.job import Job
from testbed.serving.serving import Serving


@dataclass(frozen=True)
class Fifo(Serving):
    """In the order in which requests have come, each up to its last token."""

    name: ClassVar[str] = "fifo"
    source: ClassVar[str] = "Kleinrock, Queueing Systems 1, 1975"

    def next(self, waiting: Sequence[Job]) -> Job:
        return waiting[0]
