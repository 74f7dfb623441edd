"""The levels of a request's chunks, and the ladder from which a sender chooses them."""

from __future__ import annotations

import math

from testbed import kinds
from testbed.delivery.delivery import parse
from testbed.errors import SpecError


def counts(levels: str) -> dict[str, int]:
    """``"int8*3,text,skip*2"`` -> how many chunks had each level; empty where that cannot be read."""
    found: dict[str, int] = {}
    try:
        parts = [part.strip() for part in kinds.split(levels)] if levels else []
        for part in parts:
            level, _, times = part.rpartition("*")
            number = int(times) if level and times.isdecimal() else 1
            name = level if level and times.isdecimal() else part
            found[name] = found.get(name, 0) + number
    except SpecError:
        return {}
    return found


def ladder(delivery: str) -> tuple[str, ...]:
    """The levels from which a delivery's sender chooses, the best first; empty where it does not."""
    try:
        return tuple(getattr(parse(delivery), "levels", ()))
    except SpecError:  # of a version that has other deliveries
        return _written(delivery)


def _written(delivery: str) -> tuple[str, ...]:
    inside = delivery.partition("(")[2].removesuffix(")")
    try:
        items = [item.strip() for item in kinds.split(inside)]
        text = next((item for item in items if item.startswith("levels=[")), "")
        return tuple(level.strip() for level in kinds.split(text[len("levels=[") : -1])) if text else ()
    except SpecError:
        return ()


def mean_rung(delivery: str, levels: str) -> float:
    """The mean place in the ladder of a request's chunks; NaN where nothing was chosen."""
    rungs, found = ladder(delivery), counts(levels)
    known = {level: n for level, n in found.items() if level in rungs}
    total = sum(known.values())
    return sum(rungs.index(level) * n for level, n in known.items()) / total if total else math.nan
