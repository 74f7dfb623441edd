"""A codec on a cache alone, without the model that made it: true bytes, times, and what was lost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, Needs
from testbed.errors import PayloadError, UsageError
from testbed.models.kvcache import EMPTY, KVCache, KVLayer

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Loss:
    """How far what was decoded lies from what was encoded: the largest difference, and the norm of all by that of the values."""

    max: float
    relative: float


@dataclass(frozen=True)
class Coded:
    """What a codec made of a cache. Losses are of the tokens that were kept; times are medians, in seconds."""

    payload: memoryview
    tokens: int  #: kept, by a head of a layer that is pruned, on average
    select_s: float
    encode_s: float
    decode_s: float
    keys: Loss
    values: Loss


def encode(codec: Codec, cache: KVCache, repeats: int = 1, plain: bool = False) -> Coded:
    """Encodes, decodes and compares; each stage `repeats` times, and once before that is not counted.

    plain: keys are known to be turned to no positions.

    Raises UsageError naming what the codec needs beside keys and values.
    """
    if wanted := _wanted(codec.needs):
        raise UsageError(
            f"codec {codec}: it needs {wanted}, and a file of keys and values has none of that; run it with its model "
            "(`testbed run`)"
        )
    if codec.undoes_rope and not plain and not any(layer.rope for layer in cache.layers):
        raise UsageError(
            f"codec {codec}: it turns keys back from their positions; say how they were turned (--rope theta=10000) or that it "
            "takes them as they are (--rope none)"
        )

    def scaling(layer: int) -> float:
        raise CodecError("what the model multiplies its scores with is not at hand")

    try:
        kept, select_s = _timed(lambda: codec.select(Evidence(cache, scaling)), repeats)
        payload, encode_s = _timed(lambda: codec.encode(cache, kept), repeats)
        decoded, decode_s = _timed(lambda: decode(payload), repeats)
    except (CodecError, PayloadError) as error:
        raise UsageError(f"codec {codec}: {error}") from None
    return Coded(payload, kept.tokens, select_s, encode_s, decode_s, *losses(cache, decoded))


def _wanted(needs: Needs) -> str:
    """What of `needs` only a model gives; empty where that is nothing."""
    wanted = {
        "the question": needs.question,
        "the gold answer": needs.answer,
        "the context's queries": needs.context_queries != 0,
        "the attention its tokens pay": needs.context_attention,
        "what attention modules are given": needs.context_inputs,
        "the context read once more": needs.reread,
    }
    return ", ".join(what for what, there in wanted.items() if there)


def _timed(run: Callable[[], T], repeats: int) -> tuple[T, float]:
    took = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        result = run()
        took.append(time.perf_counter() - begun)
    return result, statistics.median(took[1:])  # in the first one, code is compiled and memory asked for


def losses(cache: KVCache, decoded: KVCache) -> tuple[Loss, Loss]:
    """Of keys and of values: of what was decoded, each token compared with that of its position, layer and head.

    Raises UsageError where `cache` has no such layer or token.
    """
    if len(cache.layers) != len(decoded.layers):
        raise UsageError(
            f"{len(decoded.layers)} layers were decoded; the other cache has {len(cache.layers)}"
        )
    pairs = [
        (_same_tokens(layer, found, index), found)
        for index, (layer, found) in enumerate(zip(cache.layers, decoded.layers, strict=True))
    ]
    return (
        _loss([(own.keys, found.keys) for own, found in pairs]),
        _loss([(own.values, found.values) for own, found in pairs]),
    )


def _same_tokens(layer: KVLayer, found: KVLayer, index: int) -> KVLayer:
    """Of a layer the tokens at the positions of another one of its shape."""
    import torch

    if (layer.kv_heads, layer.head_dim, layer.values.shape[2]) != (
        found.kv_heads,
        found.head_dim,
        found.values.shape[2],
    ):
        raise UsageError(f"layer {index} was decoded to other heads or dimensions than the other cache's")
    where, wanted = layer.positions, found.positions
    if where.dim() == 2 or wanted.dim() == 2:
        where, wanted = (each.expand(layer.kv_heads, -1).contiguous() for each in (where, wanted))
    places = torch.searchsorted(where.contiguous(), wanted.contiguous())
    there = places < layer.tokens
    if layer.tokens:
        there &= where.gather(-1, places.clamp_max(layer.tokens - 1)) == wanted
    empty = wanted == EMPTY
    if not bool((there | empty).all()):
        raise UsageError(f"layer {index}: the other cache has no token at a position that was decoded")
    return layer.select(places.masked_fill(empty, EMPTY))


def _loss(pairs: list[tuple[Tensor, Tensor]]) -> Loss:
    most, lost, whole = 0.0, 0.0, 0.0
    for own, found in pairs:
        if not own.numel():
            continue
        difference = found.double() - own.double()
        most = max(most, float(difference.abs().max()))
        lost += float(difference.square().sum())
        whole += float(own.double().square().sum())
    return Loss(most, (lost / whole) ** 0.5 if whole else lost)
