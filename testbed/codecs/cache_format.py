"""The payload's format: a checked, bounded header and the sections behind it. Little-endian throughout.

    prefix     "TBKV", version u16, zero u16, header length u32, payload length u64, checksum u32
    header     msgpack (`Header`): codec, shapes, how positions and entropy-coded parts are cut
    zeros      to a multiple of 8
    side       scales and zero points, part by part: keys and values of layer 0, of layer 1, …
    symbols    part by part, packed or entropy-coded
    positions  each distinct list of kept positions once
    transform  what the transform's decoder needs

Lengths that follow from shapes are not stored but derived (`layout`), and must fill the payload exactly. The checksum
covers everything before and behind itself, so a payload with a flipped bit is refused, never decoded.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import Meta

from testbed.codecs.fast import threads
from testbed.codecs.layout import Part
from testbed.codecs.positions import PositionList
from testbed.codecs.spec import LONGEST
from testbed.errors import PayloadError

MAGIC, VERSION = b"TBKV", 3
MOST_LAYERS, MOST_HEADS, MOST_DIMENSIONS, MOST_TOKENS = 512, 1024, 1 << 14, 1 << 22
_MOST_HEADER = 1 << 24  # a position list for each of 512 × 1024 heads
_PREFIX, _CHECKSUM = struct.Struct("<4sHHIQ"), struct.Struct("<I")
_HEADER_AT = _PREFIX.size + _CHECKSUM.size
_CHUNK = 1 << 20  # of the checksum: chunks are summed in parallel

Format = Literal["float16", "bfloat16"]
_Dimension = Annotated[int, Meta(ge=1, le=MOST_DIMENSIONS)]
_Tokens = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
_Size = Annotated[int, Meta(ge=0, lt=1 << 48)]


class LayerGroup(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """`count` layers in a row that are alike. `lists`: which position list; one for the layer, or one for each head.

    `counts`: how many tokens each head holds, where the numbers differ (`tokens` is the largest); else empty.
    """

    count: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
    kv_heads: Annotated[int, Meta(ge=1, le=MOST_HEADS)]
    tokens: _Tokens
    head_dim: _Dimension
    value_dim: _Dimension
    window: Annotated[int, Meta(ge=1, lt=1 << 31)] | None
    lists: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1, max_length=MOST_HEADS)]
    counts: Annotated[list[_Tokens], Meta(max_length=MOST_HEADS)] = []

    @property
    def held(self) -> tuple[int, int]:
        """Heads and tokens as quantizers see them (`ragged.flatten`)."""
        return (1, sum(self.counts)) if self.counts else (self.kv_heads, self.tokens)


class Header(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a decoder knows before it allocates. `coded`: bytes of each entropy-coded part; empty without a coder."""

    codec: Annotated[str, Meta(max_length=LONGEST)]
    length: _Tokens
    dtype: Format
    groups: Annotated[list[LayerGroup], Meta(min_length=1, max_length=MOST_LAYERS)]
    lists: Annotated[list[PositionList], Meta(max_length=MOST_LAYERS * MOST_HEADS)]
    coded: Annotated[list[_Size], Meta(max_length=2 * MOST_LAYERS)]
    transform_bytes: _Size

    @property
    def layers(self) -> list[LayerGroup]:
        """One entry a layer."""
        return [group for group in self.groups for _ in range(group.count)]

    def parts(self) -> list[Part]:
        """Keys and values of every layer, in the payload's order."""
        parts, layers = [], self.layers
        for i, group in enumerate(layers):
            parts.append(Part(i, "keys", *group.held, group.head_dim, self.dtype, len(layers)))
            parts.append(Part(i, "values", *group.held, group.value_dim, self.dtype, len(layers)))
        return parts


def allocate(header: Header, body_bytes: int) -> tuple[npt.NDArray[np.uint8], int]:
    """A payload with its header written, and where the body starts; fill it, then `seal` it."""
    packed = msgspec.msgpack.encode(header)
    body_at = _body_at(len(packed))
    payload = threads.bytes_for(body_at + body_bytes)
    _PREFIX.pack_into(payload.data, 0, MAGIC, VERSION, 0, len(packed), len(payload))
    payload[_HEADER_AT : _HEADER_AT + len(packed)] = np.frombuffer(packed, dtype=np.uint8)
    payload[_HEADER_AT + len(packed) : body_at] = 0
    return payload, body_at


def seal(payload: npt.NDArray[np.uint8]) -> memoryview:
    """Writes the checksum; returns the payload's bytes, without copying them."""
    view = payload.data
    _CHECKSUM.pack_into(view, _PREFIX.size, _checksum(view))
    return view


def split(payload: bytes | bytearray | memoryview) -> tuple[memoryview, memoryview]:
    """A payload, and what lies behind its own end (chunks of bit planes); `unseal` says what is wrong with the former.

    Raises PayloadError for what is no run of bytes.
    """
    view = memoryview(payload)
    if not view.c_contiguous:
        raise PayloadError("a payload is contiguous bytes")
    view = view.cast("B")
    total = _PREFIX.unpack_from(view)[4] if len(view) >= _HEADER_AT else len(view)
    return view[:total], view[total:]


def unseal(payload: bytes | bytearray | memoryview) -> tuple[Header, memoryview]:
    """The header and the body of a payload; raises PayloadError unless both are whole and unchanged."""
    view = memoryview(payload)
    if not view.c_contiguous:
        raise PayloadError("a payload is contiguous bytes")
    view = view.cast("B")
    if len(view) < _HEADER_AT:
        raise PayloadError(f"{len(view)} bytes are too short for a payload")
    magic, version, zero, header_bytes, total = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError("not a KV payload: it does not start with TBKV")
    if version != VERSION or zero != 0:
        raise PayloadError(f"payload version {version}; this program reads version {VERSION}")
    if total != len(view):
        raise PayloadError(f"the payload says {total} bytes, but {len(view)} arrived")
    if header_bytes > _MOST_HEADER or _body_at(header_bytes) > total:
        raise PayloadError(f"a header of {header_bytes} bytes in a payload of {total}")
    if _CHECKSUM.unpack_from(view, _PREFIX.size)[0] != _checksum(view):
        raise PayloadError("the payload's checksum is wrong: bytes were changed on the way")
    try:
        header = msgspec.msgpack.decode(view[_HEADER_AT : _HEADER_AT + header_bytes], type=Header)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8
        raise PayloadError(f"payload header: {str(error)[:120]}") from None
    if len(header.layers) > MOST_LAYERS:
        raise PayloadError(f"{len(header.layers)} layers; at most {MOST_LAYERS} are read")
    if any(view[_HEADER_AT + header_bytes : _body_at(header_bytes)]):
        raise PayloadError("bytes between the payload's header and body")
    return header, view[_body_at(header_bytes) :]


def _body_at(header_bytes: int) -> int:
    return -(-(_HEADER_AT + header_bytes) // 8) * 8


def _checksum(payload: memoryview) -> int:
    """The low half of XXH3-64 over the hashes of the prefix and of each mebibyte behind the checksum.

    CRC-32 at 4 GB/s would take half of the time that int8 takes. Threads hash the mebibytes in parallel.
    """
    chunks = [payload[at : at + _CHUNK] for at in range(_HEADER_AT, len(payload), _CHUNK)]
    several = len(chunks) > 2
    sums = list((threads.each if several else map)(xxhash.xxh3_64_intdigest, chunks))
    first = xxhash.xxh3_64_intdigest(payload[: _PREFIX.size])
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{1 + len(sums)}Q", first, *sums)) & 0xFFFFFFFF
