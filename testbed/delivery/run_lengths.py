"""The levels of a request's chunks as a row writes them: those that follow each other alike by their number."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from testbed import kinds
from testbed.errors import SpecError

_MOST = 1 << 20  #: chunks; a text that says more is none that a run writes


def run_lengths(levels: Iterable[str]) -> str:
    """`["int8", "int8", "skip"]` -> ``"int8*2,skip"``."""
    runs = [(level, len(list(same))) for level, same in itertools.groupby(levels)]
    return ",".join(level if count == 1 else f"{level}*{count}" for level, count in runs)


def each(text: str) -> list[str]:
    """``"int8*2,skip"`` -> ``["int8", "int8", "skip"]``; a text that cannot be read stays one."""
    levels: list[str] = []
    try:
        parts = kinds.split(text) if text else []
    except SpecError:
        return [text]
    for part in parts:
        level, _, times = part.rpartition("*")
        counted = level and times.isdecimal() and len(times) < len(str(_MOST))
        levels += [level] * int(times) if counted else [part]
    return levels
