"""The shortest request first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.serving.job import Job
from testbed.serving.serving import Serving


@dataclass(frozen=True)
class Shortest(Serving):
    """Of those that wait the one that takes least, each up to its last token; it knows how long answers will be."""

    name: ClassVar[str] = "shortest"
    source: ClassVar[str] = "Schrage and Miller, Operations Research 14, 1966 (without preemption)"

    def next(self, waiting: Sequence[Job]) -> Job:
        return min(waiting, key=lambda job: job.work_s)
