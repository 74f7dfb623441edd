"""Questions answered freely, from a file of JSON lines (see `jsonl`) or a hub data set (see `hub`).

Choices are not shown: the answer's words are compared with the right choice's text. The task `choice` uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.tasks.padding import Depth, check_depth
from testbed.tasks.rows import RowTask, check_path
from testbed.tasks.shown import BAKING, MILL
from testbed.tasks.task import Example


@dataclass(frozen=True)
class QA(RowTask):
    """Questions and contexts from a file of JSON lines (`path`), such as SQuAD's, answered freely.

    The own context stands at `depth` among other rows' contexts: 0 first … 1 last, ``random``, or a list taken in turn. See
    `RowTask` for contexts of an asked length.
    """

    path: str
    depth: Depth = "random"

    name: ClassVar[str] = "qa"
    demonstrations: ClassVar[tuple[Example, ...]] = (MILL, BAKING)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", check_path(self.name, self.path))
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))
