"""Columns of numbers as schedules hold them, and how they get into a file that another process maps.

Standard library alone: the relay imports it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO


class Milliseconds(Sequence[float]):
    """Times in seconds that are held as whole milliseconds, in half the space: *ms* are unsigned numbers of four bytes."""

    __slots__ = ("ms",)

    def __init__(self, ms: Sequence[int]) -> None:
        self.ms = ms

    def __len__(self) -> int:
        return len(self.ms)

    def __getitem__(self, index: Any) -> Any:
        """Seconds; of a slice, a list of them."""
        found = self.ms[index]
        return found / 1000 if isinstance(found, int) else [ms / 1000 for ms in found]


def write(file: BinaryIO, code: str, numbers: Sequence[float]) -> None:
    """Appends *numbers* as the machine holds them, of the type *code* (see `array`)."""
    if isinstance(numbers, array) and numbers.typecode == code:
        numbers.tofile(file)
    elif isinstance(numbers, memoryview) and numbers.format == code:
        file.write(numbers)
    else:
        array(code, numbers).tofile(file)


assert array("I").itemsize == 4 and array("d").itemsize == 8, sys.platform
