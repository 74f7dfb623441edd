"""Frequency tables that both sides have beforehand: counted offline, kept in a file, named by a hash of what they say.

    file   msgpack: format, what they were counted of, and for each layer's keys and values the bits of a symbol, KV heads,
           channels of a head, and for each channel 2^bits frequencies of a byte, at most 255 and at least 1

A payload names the hash, never a file. Whoever decodes looks for it among the tables that the machine has (`directory`), and
checks that a file says what its name promises.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from testbed import files
from testbed.codecs.steps import Part, Piece
from testbed.errors import SpecError
from testbed.files import read_at_most

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Frequencies = npt.NDArray[np.uint8]

FORMAT: Literal["testbed-tables-1"] = "testbed-tables-1"
_LARGEST_FILE = 64 << 20
_NAME = re.compile(r"[0-9a-f]{32}")


class Counted(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Tables of the keys or values of one layer: `data` is [kv_heads · channels, 2^bits] frequencies."""

    bits: Annotated[int, Meta(ge=1, le=8)]
    kv_heads: Annotated[int, Meta(ge=1, le=1024)]
    channels: Annotated[int, Meta(ge=1, le=1 << 14)]
    data: Annotated[bytes, Meta(max_length=_LARGEST_FILE)]

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


def is_name(word: str) -> bool:
    """Whether a word is a hash that names tables, not a file."""
    return _NAME.fullmatch(word) is not None


def directory() -> Path:
    """Where this machine keeps the tables that it has."""
    from testbed.models.sources import cache_directory

    return cache_directory() / "tables"


def save(tables: Tables) -> tuple[str, Path]:
    """Keeps tables among those of this machine; their name and file."""
    data = msgspec.msgpack.encode(tables)
    name = _name(data)
    path = directory() / f"{name}.tables"
    with files.storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, data)
    return name, path


def load(path: Path) -> tuple[str, Tables]:
    """Tables from a file, and their name. Raises SpecError naming the file and what is wrong with it."""
    try:
        data = read_at_most(path, _LARGEST_FILE)
    except OSError as error:
        raise SpecError(f"tables {path}: {error.strerror or error}") from None
    try:
        tables = msgspec.msgpack.decode(data, type=Tables)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SpecError(f"tables {path}: {str(error)[:100]}") from None
    for i, part in enumerate(tables.parts):
        if len(part.data) != part.kv_heads * part.channels << part.bits:
            raise SpecError(f"tables {path}: part {i} has another number of frequencies than its shape")
        rows = part.frequencies()
        if not ((rows.max(1) == 255).all() and rows.min() >= 1):
            raise SpecError(f"tables {path}: part {i} has frequencies that nobody counts")
    return _name(data), tables


def size(name: str) -> int:
    """Bytes of the tables of that name, as both sides keep them. Raises SpecError as `known` does."""
    return len(msgspec.msgpack.encode(known(name)))


@functools.lru_cache(maxsize=8)
def known(name: str) -> Tables:
    """The tables of that name on this machine. Raises SpecError where it has none, or where the file holds others."""
    path = directory() / f"{name}.tables"
    if not is_name(name) or not path.is_file():
        raise SpecError(f"the tables {name[:40]} are not on this machine; copy their file to {path}")
    held, tables = load(path)
    if held != name:
        raise SpecError(f"tables {path}: the file holds the tables {held}, not {name}")
    return tables


def _name(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
