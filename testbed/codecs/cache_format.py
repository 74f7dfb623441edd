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

The header tells a cache's shapes and positions; a contiguous range of kept positions is free, others take a bit for each token of
their span or a number a gap.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import Meta

from testbed.codecs import CodecError
from testbed.codecs.entropy import MOST_EXPANSION
from testbed.codecs.fast import threads
from testbed.codecs.fast.pinned import pinned
from testbed.codecs.spec import LONGEST
from testbed.codecs.steps import Part
from testbed.errors import PayloadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.models.kvcache import KVCache, KVLayer


Positions = npt.NDArray[np.int64]

CONTIGUOUS, BITMAP = 0, 1
_GAPS: dict[int, np.dtype[np.unsignedinteger]] = {2: np.dtype("<u1"), 3: np.dtype("<u2"), 4: np.dtype("<u4")}
_LARGEST = 1 << 31


class PositionList(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """How an ascending list of positions is coded: from `start` on, in `size` bytes. How many it holds is known."""

    coding: Annotated[int, msgspec.Meta(ge=0, le=4)]
    start: Annotated[int, msgspec.Meta(ge=0, lt=_LARGEST)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=_LARGEST)]


def encode_positions(positions: Positions) -> tuple[PositionList, bytes]:
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


def decode_positions(code: PositionList, count: int, data: memoryview) -> Positions:
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


def allocate(header: Header, body_bytes: int, for_gpu: bool = False) -> tuple[npt.NDArray[np.uint8], int]:
    """A payload with its header written, and where the body starts; fill it, then `seal` it. for_gpu: a GPU fills it."""
    packed = msgspec.msgpack.encode(header)
    body_at = _body_at(len(packed))
    payload = (pinned if for_gpu else threads.bytes_for)(body_at + body_bytes)
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


_POSITION_BYTES, _SMALL = 8, 1 << 20  # bytes of a position; and of as many as any payload may have


@dataclass(frozen=True)
class CacheShape:
    """A model's caches. layers: KV heads, elements of a key and of a value, and the window of each; length: the most tokens."""

    layers: tuple[tuple[int, int, int, int | None], ...]
    length: int


def check_fits(header: Header, shape: CacheShape) -> None:
    """Raises PayloadError for a payload that may be valid, and yet is of another model."""
    theirs = tuple((g.kv_heads, g.head_dim, g.value_dim, g.window) for g in header.layers)
    if theirs != shape.layers or header.length > shape.length:
        raise PayloadError("the payload is another model's cache: layers, heads, dimensions or length differ")


def check_positions(groups: Sequence[LayerGroup], payload_bytes: int) -> None:
    """Raises CodecError where positions would take more memory than a payload of so many bytes justifies.

    A list may stand for a range of any length, and be referred to by any number of heads.
    """
    lists = {(group.tokens, tuple(group.lists)) for group in groups}
    size = _POSITION_BYTES * sum(tokens * len(references) for tokens, references in lists)
    if size > max(_SMALL, MOST_EXPANSION * payload_bytes):
        raise CodecError(f"positions of {size} bytes in a payload of {payload_bytes}")


def describe(cache: KVCache) -> tuple[list[LayerGroup], list[PositionList], bytes]:
    """Layers in groups that are alike, the distinct lists of positions, and the lists' bytes.

    Raises CodecError for a layer whose tensors do not fit together or exceed the format's limits.
    """
    known: dict[bytes, int] = {}
    lists: list[PositionList] = []
    data: list[bytes] = []
    groups: list[LayerGroup] = []
    for i, layer in enumerate(cache.layers):
        _check_shapes(i, layer, cache.length)
        where = np.atleast_2d(layer.positions.cpu().numpy().astype(np.int64))
        counts = layer.counts or []
        if counts and layer.kv_heads * layer.tokens > MOST_EXPANSION * sum(counts):
            raise CodecError(f"layer {i}: its heads hold too different numbers of tokens")
        references = []
        for head, row in enumerate(where):
            if counts:
                row = row[layer.tokens - counts[head] :]
            name = row.tobytes()
            if name not in known:
                _check_row(i, row, cache.length)
                known[name] = len(lists)
                code, coded = encode_positions(row)
                lists.append(code)
                data.append(coded)
            references.append(known[name])
        dimensions = (layer.kv_heads, layer.tokens, layer.keys.shape[2], layer.values.shape[2], layer.window)
        alike = groups[-1].count if groups else 0
        if groups and groups[-1] == LayerGroup(alike, *dimensions, references, counts):
            groups[-1] = LayerGroup(alike + 1, *dimensions, references, counts)
        else:
            groups.append(LayerGroup(1, *dimensions, references, counts))
    return groups, lists, b"".join(data)


def dtype_name(cache: KVCache) -> Format:
    """The 16-bit format that all of a cache is in; raises CodecError for another."""
    if not 0 < len(cache.layers) <= MOST_LAYERS:
        raise CodecError(f"a cache of {len(cache.layers)} layers cannot be encoded")
    dtypes = {
        str(part.dtype).removeprefix("torch.")
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    }
    if len(dtypes) > 1 or not dtypes <= {"float16", "bfloat16"}:
        raise CodecError(
            f"a cache in {' and '.join(sorted(dtypes))} cannot be encoded; hold it in float16 or bfloat16"
        )
    return "float16" if "float16" in dtypes else "bfloat16"


def torch_dtype(name: str) -> torch.dtype:
    """``"float16"`` -> torch.float16."""
    import torch

    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def layer_positions(header: Header, data: memoryview, device: str | torch.device) -> list[Tensor]:
    """Each layer's positions, [tokens] or [kv_heads, tokens]; layers that refer to the same lists share the tensor.

    A head that holds fewer tokens than another begins with places at position -1. Raises
    PayloadError where the lists do not fit the layers.
    """
    import torch

    starts = np.cumsum([0, *(code.size for code in header.lists)]).tolist()
    shared: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    layers = []
    for group in header.layers:
        heads = group.kv_heads if len(group.lists) > 1 else 1
        key = (group.tokens, heads, tuple(group.lists), tuple(group.counts))
        if key not in shared:
            _check_counts(group)
            if len(group.lists) not in (1, group.kv_heads) or max(group.lists) >= len(header.lists):
                raise PayloadError(f"{len(group.lists)} position lists for a layer of {group.kv_heads} heads")
            counts = group.counts or [group.tokens] * len(group.lists)
            rows = [
                decode_positions(header.lists[i], count, data[starts[i] : starts[i + 1]])
                for i, count in zip(group.lists, counts, strict=True)
            ]
            if max((int(row[-1]) for row in rows if len(row)), default=0) >= max(header.length, 1):
                raise PayloadError(f"a position lies behind the {header.length} tokens seen")
            if group.counts:
                rows = [np.pad(row, (group.tokens - len(row), 0), constant_values=-1) for row in rows]
            shared[key] = torch.from_numpy(rows[0] if len(rows) == 1 else np.stack(rows)).to(device)
        layers.append(shared[key])
    return layers


def _check_counts(group: LayerGroup) -> None:
    """That numbers of tokens by head are those of a ragged layer, and ask for no more memory than the tokens justify."""
    if not group.counts:
        return
    if len(group.counts) != group.kv_heads or len(group.lists) != group.kv_heads:
        raise PayloadError(f"{len(group.counts)} numbers of tokens for a layer of {group.kv_heads} heads")
    if max(group.counts) != group.tokens or min(group.counts) == group.tokens:
        raise PayloadError("the heads' numbers of tokens do not fit their layer's")
    if group.kv_heads * group.tokens > MOST_EXPANSION * sum(group.counts):
        raise PayloadError("the heads are said to hold too different numbers of tokens")


def _check_shapes(index: int, layer: KVLayer, length: int) -> None:
    heads, tokens, head_dim = layer.keys.shape
    value_dim = layer.values.shape[2]
    if layer.values.shape[:2] != (heads, tokens) or layer.positions.shape not in ((tokens,), (heads, tokens)):
        shapes = [tuple(tensor.shape) for tensor in (layer.keys, layer.values, layer.positions)]
        raise CodecError(f"layer {index}: the shapes of keys, values and positions do not fit: {shapes}")
    limits = ((heads, MOST_HEADS), (head_dim, MOST_DIMENSIONS), (value_dim, MOST_DIMENSIONS))
    if any(not 0 < size <= limit for size, limit in limits) or length > MOST_TOKENS:
        raise CodecError(
            f"layer {index}: {heads} heads of {head_dim} and {value_dim} after {length} tokens is too much"
        )


def _check_row(index: int, row: Positions, length: int) -> None:
    if len(row) and not (row[0] >= 0 and row[-1] < length and bool((np.diff(row) > 0).all())):
        raise CodecError(f"layer {index}: positions must ascend within the {length} tokens seen")
