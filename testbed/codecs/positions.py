"""Kept positions as bytes: a contiguous range is free, others take a bit for each token of their span or a number a gap."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from testbed.errors import PayloadError

Positions = npt.NDArray[np.int64]

CONTIGUOUS, BITMAP = 0, 1
_GAPS: dict[int, np.dtype[np.unsignedinteger]] = {2: np.dtype("<u1"), 3: np.dtype("<u2"), 4: np.dtype("<u4")}
_LARGEST = 1 << 31


class PositionList(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """How an ascending list of positions is coded: from `start` on, in `size` bytes. How many it holds is known."""

    coding: Annotated[int, msgspec.Meta(ge=0, le=4)]
    start: Annotated[int, msgspec.Meta(ge=0, lt=_LARGEST)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=_LARGEST)]


def encode(positions: Positions) -> tuple[PositionList, bytes]:
    """Strictly ascending positions -> their coding and bytes, whichever coding is the shortest."""
    start = int(positions[0]) if len(positions) else 0
    gaps = np.diff(positions) - 1
    widest = int(gaps.max(initial=0))
    if widest == 0:
        return PositionList(CONTIGUOUS, start, 0), b""
    coding, width = next((code, kind) for code, kind in _GAPS.items() if widest <= np.iinfo(kind).max)
    span = int(positions[-1]) - start  # the first position's own bit is left out
    if span <= 8 * width.itemsize * len(gaps):
        bits = np.zeros(span, dtype=bool)
        bits[positions[1:] - start - 1] = True
        data = np.packbits(bits, bitorder="little").tobytes()
        return PositionList(BITMAP, start, len(data)), data
    data = gaps.astype(width).tobytes()
    return PositionList(coding, start, len(data)), data


def decode(code: PositionList, count: int, data: memoryview) -> Positions:
    """The `count` positions, strictly ascending. Raises PayloadError where the bytes do not hold so many."""
    if len(data) != code.size:
        raise PayloadError("kept positions are cut off")
    if code.coding == CONTIGUOUS or count == 0:
        if code.size:
            raise PayloadError("a contiguous range of positions has no bytes of its own")
        return np.arange(code.start, code.start + count, dtype=np.int64)
    if code.coding == BITMAP:
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        held = int(np.count_nonzero(bits))
        if held != count - 1:
            raise PayloadError(f"the bitmap of kept positions holds {held + 1} tokens instead of {count}")
        rest = np.flatnonzero(bits).astype(np.int64) + (code.start + 1)
    else:
        kind = _GAPS[code.coding]
        if code.size != (count - 1) * kind.itemsize:
            raise PayloadError(f"the gaps of {count} kept positions take another size than {code.size} bytes")
        rest = code.start + np.cumsum(np.frombuffer(data, dtype=kind).astype(np.int64) + 1)
    return np.concatenate((np.array([code.start], dtype=np.int64), rest))
