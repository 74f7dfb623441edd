"""Continuous batching: tokens of several requests in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.serving.job import Job
from testbed.serving.serving import Serving


@dataclass(frozen=True)
class Batch(Serving):
    """First come, first served, up to `max` at a time: who comes in is rebuilt and read at once, then all are decoded in one pass
    a token, or one for each model.
    """

    name: ClassVar[str] = "batch"
    source: ClassVar[str] = "Yu et al., Orca, OSDI 2022; prefills first, as Kwon et al., vLLM, SOSP 2023"

    max: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("max", "1 to 1024", 1 <= self.max <= 1024)

    @property
    def most(self) -> int:
        return self.max

    def next(self, waiting: Sequence[Job]) -> Job:
        return waiting[0]
