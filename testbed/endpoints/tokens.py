"""A text as its tokens' numbers: exact wherever it is cut, which its characters are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from testbed.errors import WireError


def _number(vocabulary: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def token_bytes(vocabulary: int) -> int:
    """Of one token's number."""
    return _number(vocabulary).itemsize


def to_bytes(ids: Sequence[int], vocabulary: int) -> bytes:
    """Token ids of a vocabulary of that size as they cross: two bytes each, four where it is larger than 65,536."""
    return np.asarray(ids, dtype=_number(vocabulary)).tobytes()


def from_bytes(data: memoryview, count: int, vocabulary: int) -> list[int]:
    """The `count` ids of such bytes. Raises WireError where they hold others than the vocabulary has."""
    number = _number(vocabulary)
    if len(data) != count * number.itemsize:
        raise WireError(f"{len(data)} bytes are not the numbers of {count} tokens")
    ids: list[int] = np.frombuffer(data, dtype=number).tolist()
    if any(one >= vocabulary for one in ids):
        raise WireError(f"a token's number lies beyond the vocabulary of {vocabulary}")
    return ids
