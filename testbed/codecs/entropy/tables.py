"""Frequency tables that both sides have beforehand: counted offline, kept in a file, named by a hash of what they say.

    file   msgpack: format, what they were counted of, and for each layer's keys and values the bits of a symbol, KV heads,
           channels of a head, and for each channel 2^bits frequencies of a byte, at most 255 and at least 1

Whoever decodes looks for them among those that the machine has (`KEPT`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from testbed.codecs.kept import LARGEST_FILE, Kept
from testbed.codecs.steps import Part, Piece

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Frequencies = npt.NDArray[np.uint8]

FORMAT: Literal["testbed-tables-1"] = "testbed-tables-1"


class Counted(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Tables of the keys or values of one layer: `data` is [kv_heads · channels, 2^bits] frequencies."""

    bits: Annotated[int, Meta(ge=1, le=8)]
    kv_heads: Annotated[int, Meta(ge=1, le=1024)]
    channels: Annotated[int, Meta(ge=1, le=1 << 14)]
    data: Annotated[bytes, Meta(max_length=LARGEST_FILE)]

    def frequencies(self) -> _Frequencies:
        """A row a channel."""
        import numpy as np

        return np.frombuffer(self.data, dtype=np.uint8).reshape(-1, 1 << self.bits)


class Tables(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """All of a file. `of`: what they were counted of, for people. `parts`: keys and values of layer 0, of layer 1, …"""

    format: Literal["testbed-tables-1"]
    of: Annotated[str, Meta(max_length=400)]
    parts: Annotated[list[Counted], Meta(min_length=1, max_length=1024)]

    def rows(self, piece: Piece) -> _Frequencies | None:
        """A row a channel of a part's KV heads; None where these tables are not of such parts."""
        part = piece.part
        at = 2 * part.layer + (part.kind == "values")
        if at >= len(self.parts):
            return None
        own = self.parts[at]
        alike = (own.bits, own.kv_heads, own.channels) == (piece.bits, part.kv_heads, part.head_dim)
        return own.frequencies() if alike else None


def count(of: str, counts: Sequence[tuple[int, Part, npt.NDArray[np.int64]]]) -> Tables:
    """Tables from how often each channel had each symbol: bits, part and [kv_heads · channels, 2^bits], layer by layer.

    Half an occurrence is added to each, so that a symbol that never occurred can be coded.
    """
    import numpy as np

    parts = []
    for bits, part, occurred in counts:
        smooth = occurred + 0.5
        scaled = np.rint(smooth * (255 / smooth.max(1, keepdims=True)))
        data = np.maximum(scaled, 1).astype(np.uint8).tobytes()
        parts.append(Counted(bits, part.kv_heads, part.head_dim, data))
    return Tables(FORMAT, of[:400], parts)


def _wrong(tables: Tables) -> str:
    for i, part in enumerate(tables.parts):
        if len(part.data) != part.kv_heads * part.channels << part.bits:
            return f"part {i} has another number of frequencies than its shape"
        rows = part.frequencies()
        if not ((rows.max(1) == 255).all() and rows.min() >= 1):
            return f"part {i} has frequencies that nobody counts"
    return ""


KEPT = Kept("tables", Tables, _wrong)
