"""Covering numbers by prefixes: as few as lead each number its way.

What is planned are runs of numbers that leave the same way, not single numbers: in a line or a star of a thousand links a node
has two or three of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

BITS = 16
"""Of a number."""
Run = tuple[int, int, int]
"""First number, last number, way."""

_Node = tuple[
    frozenset[int], "_Node | None", "_Node | None"
]  # ways that suit it best; its halves, where they differ


def runs(leaving: Mapping[int, int]) -> list[Run]:
    """Number -> way, as runs."""
    found: list[Run] = []
    for number, way in sorted(leaving.items()):
        if found and found[-1][1] == number - 1 and found[-1][2] == way:
            found[-1] = (found[-1][0], number, way)
        else:
            found.append((number, number, way))
    return found


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, last) pairs that do not overlap, in order, and those that touch as one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and found[-1][1] == first - 1:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def between(spans: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The numbers from 0 to *count* - 1 that are in none of the spans, which are in order and do not overlap."""
    found, at = [], 0
    for first, last in [*spans, (count, count)]:
        if first > at:
            found.append((at, first - 1))
        at = last + 1
    return found


def aggregate(wanted: Sequence[Run], count: int = 1 << BITS) -> list[tuple[int, int, int]]:
    """The fewest (number, bits, way) such that every number's longest matching prefix leads its way.

    `wanted`: in order, without overlaps; what is in no run may go anywhere, but for numbers from the first power of two on that
    holds *count*, for which there is no prefix. This is Draves et al.,
    "Constructing Optimal IP Routing Tables" (INFOCOM 1999), with the smallest way where several do.
    """
    found: list[tuple[int, int, int]] = []
    first = BITS - max(0, count - 1).bit_length()
    waiting: list[tuple[_Node | None, int, int, int | None]] = [(_tree(wanted, 0, first), 0, first, None)]
    while waiting:
        node, number, bits, inherited = waiting.pop()
        if node is None:
            continue
        ways, low, high = node
        if inherited not in ways:
            inherited = min(ways)
            found.append((number, bits, inherited))
        waiting += [
            (high, number | 1 << (BITS - bits - 1) if bits < BITS else number, bits + 1, inherited),
            (low, number, bits + 1, inherited),
        ]
    return sorted(found)


def _tree(wanted: Sequence[Run], number: int, bits: int) -> _Node | None:
    """The prefix of so many bits that begins at *number*, with all runs that reach into it. None: it may go anywhere."""
    if not wanted:
        return None
    if len({way for _, _, way in wanted}) == 1:
        return frozenset((wanted[0][2],)), None, None
    middle = number | 1 << (BITS - bits - 1)
    low = _tree([run for run in wanted if run[0] < middle], number, bits + 1)
    high = _tree([run for run in wanted if run[1] >= middle], middle, bits + 1)
    if low is None or high is None:  # but not both: some run reaches into one of them
        return (low or high or (frozenset(),))[0], low, high
    return (low[0] & high[0]) or low[0] | high[0], low, high
