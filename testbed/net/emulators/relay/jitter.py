"""Jitter: by how much the next packet's delay deviates, drawn from a table of quantiles."""

from __future__ import annotations

from array import array
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from random import Random

SCALE = 8192  # the entry that stands for one jitter


class Jitter:
    """Deviations of *spread_s* seconds times a table entry."""

    def __init__(self, spread_s: float, table: Sequence[int], chance: Random) -> None:
        self._step = spread_s / SCALE
        self._table = table
        self._count = len(table)
        self._random = chance.random

    def deviation(self) -> float:
        """Seconds."""
        return self._table[int(self._random() * self._count)] * self._step


def pack(table: Sequence[int]) -> str:
    """A table as text, for JSON."""
    return b2a_base64(array("h", table).tobytes(), newline=False).decode()


def unpack(text: str) -> array[int]:
    """What `pack` packed."""
    table: array[int] = array("h")
    table.frombytes(a2b_base64(text))
    return table
