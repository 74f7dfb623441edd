"""Keys as they were before their rotary position embedding; what quantizers of pre-RoPE keys bring with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
from msgspec import Meta

from testbed.codecs.steps import Transform
from testbed.errors import PayloadError
from testbed.models.rope import Rope

if TYPE_CHECKING:
    from testbed.codecs.steps import Quantizer
    from testbed.models.kvcache import KVCache

_MOST_KINDS = 16  # of embeddings in one cache; models with sliding-window layers have two
_Index = Annotated[int, Meta(ge=0, lt=1 << 14)]


class _Kind(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A `Rope` in a payload: float32 frequencies as bytes, pairs in a row told by their start and step."""

    frequencies: Annotated[bytes, Meta(max_length=4 << 13)]
    first: Annotated[list[_Index], Meta(max_length=1 << 13)]
    apart: _Index


class _Side(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Which embedding each layer has: an index into `kinds`, -1 for none."""

    kinds: Annotated[list[_Kind], Meta(max_length=_MOST_KINDS)]
    layers: Annotated[list[Annotated[int, Meta(ge=-1, lt=_MOST_KINDS)]], Meta(max_length=512)]


@dataclass(frozen=True)
class Unrotated(Transform):
    """Turns keys back from their positions and, decoding, to them again. The payload carries the frequencies.

    A layer without one (`KVLayer.rope` is None) travels as it is, and the payload says so. A model whose embedding no plain
    numbers describe is refused where the cache is told of it (`LanguageModel.knowing_ropes`).
    """

    name: ClassVar[str] = "unrotated"
    source: ClassVar[str] = "KVQuant (arXiv:2401.18079), section 3.2"

    @property
    def undoes_rope(self) -> bool:
        return True

    def encode(self, cache: KVCache, quantizer: Quantizer) -> tuple[KVCache, bytes]:
        kinds: list[Rope] = []
        layers, indices = [], []
        for layer in cache.layers:
            rope = layer.rope
            if rope is not None and rope not in kinds and len(kinds) < _MOST_KINDS:
                kinds.append(rope)
            if rope is None or rope not in kinds:
                layers.append(layer)
                indices.append(-1)
                continue
            layers.append(replace(layer, keys=rope.turn(layer.keys, layer.positions, back=True)))
            indices.append(kinds.index(rope))
        side = _Side([_told(rope) for rope in kinds], indices)
        return replace(cache, layers=layers), msgspec.msgpack.encode(side)

    def decode(self, cache: KVCache, side: bytes) -> KVCache:
        try:
            sent = msgspec.msgpack.decode(side, type=_Side)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError(f"rotary embeddings: {str(error)[:100]}") from None
        kinds = [_read(kind) for kind in sent.kinds]
        if len(sent.layers) != len(cache.layers) or max(sent.layers, default=-1) >= len(kinds):
            raise PayloadError("rotary embeddings do not fit the layers")
        layers = []
        for layer, index in zip(cache.layers, sent.layers, strict=True):
            rope = kinds[index] if index >= 0 else None
            if rope is not None and not rope.fits(layer.head_dim):
                raise PayloadError(f"a rotary embedding does not fit a head of {layer.head_dim}")
            layers.append(
                layer if rope is None else replace(layer, keys=rope.turn(layer.keys, layer.positions))
            )
        return replace(cache, layers=layers)


def _told(rope: Rope) -> _Kind:
    import numpy as np

    return _Kind(np.array(rope.frequencies, dtype="<f4").tobytes(), list(rope.first), rope.apart)


def _read(kind: _Kind) -> Rope:
    import numpy as np

    if len(kind.frequencies) != 4 * len(kind.first):
        raise PayloadError("a rotary embedding has another number of frequencies than of pairs")
    numbers = np.frombuffer(kind.frequencies, dtype="<f4")
    if not np.isfinite(numbers).all():
        raise PayloadError("a rotary embedding has a frequency that is not a number")
    return Rope(tuple(numbers.tolist()), tuple(kind.first), kind.apart)
