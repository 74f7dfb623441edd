"""Requests as they came somewhere else: a file of times.

    # seconds behind the start, and at which edge; without one, the edges take turns
    0.000
    0.350 n2
    1.275 n1

Times ascend. What comes behind the episode's end is left out.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from testbed import files, lookup
from testbed.errors import SpecError, StorageError
from testbed.load.load import MOST, Arrival, Open

_MOST_BYTES = 16 << 20
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Arrivals(Open):
    """Requests at the times that a file has."""

    name: ClassVar[str] = "arrivals"
    source: ClassVar[str] = "a recording of one's own"

    file: str  #: a line a request: its time in seconds, and perhaps its edge

    def __str__(self) -> str:
        return f"arrivals:{self.file}"

    def __post_init__(self) -> None:
        if not self.file:
            raise SpecError("arrivals: which file is missing; write arrivals:FILE")

    def bound(self) -> Arrivals:
        found = replace(self, file=lookup.find(self.file) or self.file)
        found._lines()
        return found

    @property
    def identity(self) -> str:
        return f"arrivals/{hashlib.blake2b(self._text().encode(), digest_size=6).hexdigest()}"

    def arrivals(self, edges: Sequence[str], until_s: float, seed: str) -> list[Arrival]:
        number = {name: place for place, name in enumerate(edges)}
        found = []
        for place, (line, at, edge) in enumerate(self._lines()):
            if edge and edge not in number:
                raise SpecError(
                    f"{self.file}: line {line}: there is no edge {edge[:40]!r}; there is {', '.join(edges)[:200]}"
                )
            if at < until_s:
                found.append(Arrival(at, number[edge] if edge else place % len(edges)))
        return found

    def _text(self) -> str:
        path = Path(self.file)
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise SpecError(f"{self.file}: has more than {_MOST_BYTES >> 20} MiB, which are no arrivals")
            return files.read(path).decode("utf-8-sig")  # what some programs put in front is no text
        except (OSError, StorageError) as error:
            why = getattr(error, "strerror", None) or error
            raise SpecError(f"{self.file}: cannot be read: {why}") from None
        except UnicodeDecodeError:
            raise SpecError(f"{self.file}: is no text") from None

    def _lines(self) -> list[tuple[int, float, str]]:
        """(line, seconds, edge) of each request. Raises SpecError with the place of what is none."""
        found: list[tuple[int, float, str]] = []
        for number, line in enumerate(self._text().splitlines(), 1):
            words = line.partition("#")[0].replace(",", " ").split()
            if not words:
                continue
            here = f"{self.file}: line {number}"
            at = float(words[0]) if _NUMBER.fullmatch(words[0]) else math.nan
            if len(words) > 2 or not 0 <= at <= 1e6:
                raise SpecError(f"{here}: write seconds, and perhaps an edge, such as: 0.35 n2")
            if found and at < found[-1][1]:
                raise SpecError(f"{here}: {at:g} s behind {found[-1][1]:g} s; times must ascend")
            found.append((number, at, words[1] if len(words) == 2 else ""))
            if len(found) > MOST:
                raise SpecError(f"{here}: an episode has at most {MOST:,} requests")
        if not found:
            raise SpecError(f"{self.file}: has no arrivals; write a line for each: its time in seconds")
        return found
