"""What a link's conditions may be at most and at least."""

from __future__ import annotations

from collections.abc import Callable

from testbed.errors import SpecError

LEAST_MTU, LARGEST_MTU = 576, 9000


def bounded(what: str, value: float, low: float, high: float, show: Callable[[float], str]) -> None:
    """Raises SpecError where *value* lies outside; *what* it is and how *show* writes it are in the message."""
    if not low <= value <= high:  # also false for NaN
        raise SpecError(f"{what} {show(value)} lies outside {show(low)}..{show(high)}")
