"""What lies behind the payload of an embedded code: bit planes, each plane of everything before the next.

    payload    as `container` says, without symbols: header, scales, positions
    chunk      length u32, checksum u32, and a stretch of 16 KiB of a plane (the last one shorter), entropy-coded or not
    chunk      …

A plane is one bit of every symbol, packed, part by part. A chunk whose length is that of its stretch is not coded. The
checksum is over the chunk's place, its length and its bytes, so each chunk is checked by itself, and what arrived of a payload
that was cut off is as sure as a whole one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from testbed.codecs.entropy import MOST_EXPANSION, compressed, pack, unpack
from testbed.codecs.fast.batch import as_tensor
from testbed.codecs.layout import packed_bytes
from testbed.codecs.steps import Coder, Part, Piece
from testbed.errors import PayloadError

if TYPE_CHECKING:
    from torch import Tensor

_STRETCH = 1 << 14
_FRAME = struct.Struct("<II")


@dataclass(frozen=True)
class Planes:
    """The symbols that are known from the planes that arrived. `missing` says what did not; empty where nothing is."""

    symbols: tuple[
        Tensor, ...
    ]  #: uint8, flat, one tensor a piece; unknown bits are the middle of what they may be
    complete: int
    of: int
    missing: str


def write(symbols: Iterable[tuple[Piece, Tensor]], coder: Coder | None) -> list[bytes]:
    """The planes, each with its chunks, for the symbols of every piece."""
    import torch

    planes: list[list[npt.NDArray[np.uint8]]] = []
    for piece, own in symbols:
        planes = planes or [[] for _ in range(piece.bits)]
        for of_all, shift in zip(planes, reversed(range(piece.bits)), strict=True):
            of_all.append(pack((own >> shift).bitwise_and_(1), 1).cpu().numpy())
    written = []
    for number, parts in enumerate(planes):
        plane: npt.NDArray[np.uint8] = np.concatenate(parts)
        chunks = []
        for at, stretch in _stretches(len(plane)):
            plain = torch.from_numpy(plane[at : at + stretch.symbol_bytes])
            code = compressed(coder, stretch, plain) if coder else plain.numpy().data
            chunks.append(_FRAME.pack(len(code), _checksum(number, at, code)) + code)
        written.append(b"".join(chunks))
    return written


def read(data: memoryview, pieces: Sequence[Piece], coder: Coder | None) -> Planes:
    """What is known from these bytes, which may end anywhere.

    Raises PayloadError where not even the first plane is whole, for chunks that `write` did not write, and for bytes behind
    the last plane. Allocates what the bytes justify.
    """
    of, size = pieces[0].bits, sum(packed_bytes(piece.symbols, 1) for piece in pieces)
    if size > len(data) * (MOST_EXPANSION if coder else 1):
        raise PayloadError(_missing(0, of, 0, size))
    planes: list[npt.NDArray[np.uint8]] = []
    at, known = 0, size
    while len(planes) < of and known == size:
        plane, known = np.zeros(size, dtype=np.uint8), 0
        for start, stretch in _stretches(size):
            chunk = _chunk(data, at, len(planes), start, stretch, coder)
            if chunk is None:
                break
            at, known = at + chunk[0], start + stretch.symbol_bytes
            plane[start:known] = np.frombuffer(chunk[1], dtype=np.uint8)
        planes.append(plane)
    complete = len(planes) if known == size else len(planes) - 1
    if not complete:
        raise PayloadError(_missing(0, of, known, size))
    if complete == of and at != len(data):
        raise PayloadError(f"{len(data) - at} bytes behind the last plane")
    missing = "" if complete == of else _missing(complete, of, known if known < size else 0, size)
    return Planes(tuple(_symbols(pieces, planes, known)), complete, of, missing)


def _missing(complete: int, of: int, known: int, size: int) -> str:
    return f"plane {complete + 1} of {of} is missing: {known} of its {size} bytes arrived"


def _stretches(size: int) -> Iterator[tuple[int, Piece]]:
    """Where each stretch of a plane begins, and what it is to an entropy coder: bits of no channel, eight to a byte.

    Heads and tokens mean nothing here: a stretch runs over parts, and packing puts bits beside each other that lie apart.
    """
    for start in range(0, size, _STRETCH):
        length = min(_STRETCH, size - start)
        part = Part(0, "keys", 1, 8 * length, 1, "float16")
        yield start, Piece(part, 1, 8 * length, 0, 0, 0, length)


def _chunk(
    data: memoryview, at: int, plane: int, start: int, stretch: Piece, coder: Coder | None
) -> tuple[int, bytes | bytearray | memoryview] | None:
    """The bytes of the chunk at `at`, and the stretch that it holds; None where the data end within it."""
    if len(data) - at < _FRAME.size:
        return None
    length, checksum = _FRAME.unpack_from(data, at)
    size = stretch.symbol_bytes
    if not (length == size or (coder and 0 < length < size <= MOST_EXPANSION * length)):
        raise PayloadError(f"plane {plane + 1}: a chunk of {length} bytes for a stretch of {size}")
    code = data[at + _FRAME.size : at + _FRAME.size + length]
    if len(code) < length:
        return None
    if checksum != _checksum(plane, start, code):
        raise PayloadError(f"plane {plane + 1}: a chunk's checksum is wrong: bytes were changed on the way")
    if length == size or coder is None:
        return _FRAME.size + length, code
    plain = memoryview(coder.expand(stretch, code))
    return _FRAME.size + length, plain if coder.packed else pack(as_tensor(plain), 1).numpy().data


def _checksum(plane: int, start: int, code: bytes | memoryview) -> int:
    return zlib.crc32(code, zlib.crc32(struct.pack("<QQQ", plane, start, len(code))))


def _symbols(
    pieces: Sequence[Piece], planes: Sequence[npt.NDArray[np.uint8]], known: int
) -> Iterator[Tensor]:
    """Each piece's symbols; of the last plane the first `known` bytes are there. Bits below are 1000…: the middle."""
    import torch

    end = 0
    for piece in pieces:
        start, end = end, end + packed_bytes(piece.symbols, 1)
        symbols = torch.zeros(piece.symbols, dtype=torch.uint8)
        for i, plane in enumerate(planes):
            shift = piece.bits - 1 - i
            bits = unpack(torch.from_numpy(plane[start:end]), piece.symbols, 1)
            if i == len(planes) - 1:
                there = torch.zeros(end - start, dtype=torch.uint8)
                there[: max(0, known - start)] = 0xFF
                sure = unpack(there, piece.symbols, 1)
                middle = 1 << shift - 1 if shift else 0
                symbols += (bits << shift | middle) * sure + (1 - sure << shift)
            else:
                symbols += bits << shift
        yield symbols
