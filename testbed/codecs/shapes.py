"""A cache's shapes and positions, told in a payload's header and read back from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from testbed.codecs import CodecError, positions
from testbed.codecs.cache_format import (
    MOST_DIMENSIONS,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_TOKENS,
    Format,
    Header,
    LayerGroup,
)
from testbed.codecs.entropy import MOST_EXPANSION
from testbed.errors import PayloadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.models.kvcache import KVCache, KVLayer


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


def describe(cache: KVCache) -> tuple[list[LayerGroup], list[positions.PositionList], bytes]:
    """Layers in groups that are alike, the distinct lists of positions, and the lists' bytes.

    Raises CodecError for a layer whose tensors do not fit together or exceed the format's limits.
    """
    known: dict[bytes, int] = {}
    lists: list[positions.PositionList] = []
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
                _check_positions(i, row, cache.length)
                known[name] = len(lists)
                code, coded = positions.encode(row)
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
    found = {
        str(part.dtype).removeprefix("torch.")
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    }
    if len(found) > 1 or not found <= {"float16", "bfloat16"}:
        raise CodecError(
            f"a cache in {' and '.join(sorted(found))} cannot be encoded; hold it in float16 or bfloat16"
        )
    return "float16" if "float16" in found else "bfloat16"


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
    made: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    layers = []
    for group in header.layers:
        heads = group.kv_heads if len(group.lists) > 1 else 1
        key = (group.tokens, heads, tuple(group.lists), tuple(group.counts))
        if key not in made:
            _check_counts(group)
            if len(group.lists) not in (1, group.kv_heads) or max(group.lists) >= len(header.lists):
                raise PayloadError(f"{len(group.lists)} position lists for a layer of {group.kv_heads} heads")
            counts = group.counts or [group.tokens] * len(group.lists)
            rows = [
                positions.decode(header.lists[i], count, data[starts[i] : starts[i + 1]])
                for i, count in zip(group.lists, counts, strict=True)
            ]
            if max((int(row[-1]) for row in rows if len(row)), default=0) >= max(header.length, 1):
                raise PayloadError(f"a position lies behind the {header.length} tokens seen")
            if group.counts:
                rows = [np.pad(row, (group.tokens - len(row), 0), constant_values=-1) for row in rows]
            made[key] = torch.from_numpy(rows[0] if len(rows) == 1 else np.stack(rows)).to(device)
        layers.append(made[key])
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


def _check_positions(index: int, row: positions.Positions, length: int) -> None:
    if len(row) and not (row[0] >= 0 and row[-1] < length and bool((np.diff(row) > 0).all())):
        raise CodecError(f"layer {index}: positions must ascend within the {length} tokens seen")
