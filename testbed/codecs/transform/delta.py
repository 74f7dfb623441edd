"""Differences between tokens: neighbours' keys and values are alike, and what differs needs fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError
from testbed.codecs.steps import Part, Transform
from testbed.codecs.transform.unrotated import Unrotated
from testbed.errors import PayloadError

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.steps import Quantizer
    from testbed.models.kvcache import KVCache

Decoded = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Delta(Transform):
    """Groups of `anchor` tokens: the first is sent as it is, the others as differences d_t = x_t - p_t, x̂_t = d̂_t + p_t.

    order=anchor: p_t is the group's first token (CacheGen, section 5.2); consecutive: the token before.
    loop=open: p_t is the original on the encoder's side, so errors of the decoded p̂_t add to those of d̂_t; closed: p_t is
    what the decoder will have, so only the error of d̂_t is left. A closed loop needs a quantizer that codes each token
    by itself.
    rope=pre: keys are turned back from their positions first, where the cache knows its rotary embedding.
    """

    name: ClassVar[str] = "delta"
    source: ClassVar[str] = "CacheGen (arXiv:2310.07240)"

    anchor: int = 10
    loop: Literal["open", "closed"] = "closed"
    order: Literal["anchor", "consecutive"] = "anchor"
    rope: Literal["pre", "post"] = "post"

    def __post_init__(self) -> None:
        self.require("anchor", "from 2 to 4096", 2 <= self.anchor <= 4096)

    @property
    def undoes_rope(self) -> bool:
        return self.rope == "pre"

    def encode(self, cache: KVCache, quantizer: Quantizer) -> tuple[KVCache, bytes]:
        side, dtype = b"", str(cache.dtype).removeprefix("torch.")
        if self.rope == "pre":
            cache, side = Unrotated().encode(cache, quantizer)
        layers = []
        for i, layer in enumerate(cache.layers):
            place = (i, len(cache.layers), dtype)
            keys = self._differences(layer.keys.float(), self._loop(quantizer, "keys", *place))
            values = self._differences(layer.values.float(), self._loop(quantizer, "values", *place))
            layers.append(replace(layer, keys=keys, values=values))
        return replace(cache, layers=layers), side

    def decode(self, cache: KVCache, side: bytes) -> KVCache:
        layers = [
            replace(layer, keys=self._sums(layer.keys), values=self._sums(layer.values))
            for layer in cache.layers
        ]
        cache = replace(cache, layers=layers)
        if self.rope == "pre":
            return Unrotated().decode(cache, side)
        if side:
            raise PayloadError("delta: bytes beside the differences")
        return cache

    def unfit(self, quantizer: Quantizer) -> str:
        if self.loop == "open" or quantizer.by_token:
            return ""
        return f"delta: a closed loop needs a quantizer that codes each token by itself; {quantizer} does not. Use loop=open"

    def _loop(
        self, quantizer: Quantizer, kind: Literal["keys", "values"], layer: int, layers: int, dtype: str
    ) -> Decoded:
        """What the decoder makes of some tokens [kv_heads, tokens, head_dim]; themselves where the loop is open."""
        if self.loop == "open":
            return lambda x: x
        if why := self.unfit(quantizer):
            raise CodecError(why)

        def decoded(x: Tensor) -> Tensor:
            import torch

            part = Part(layer, kind, x.shape[0], x.shape[1], x.shape[2], dtype, layers)
            symbols, numbers = quantizer.encode(part, x.contiguous())
            side = symbols.new_empty(0) if numbers is None else numbers.contiguous().flatten()
            return quantizer.decode(part, symbols.flatten(), side.view(torch.uint8)).float()

        return decoded

    def _differences(self, x: Tensor, decoded: Decoded) -> Tensor:
        """x [kv_heads, tokens, dim] in float32 -> first tokens of groups and differences, in the tokens' places."""
        out = x.clone()
        if not x.numel():
            return out
        first = known = decoded(x[:, :: self.anchor])
        for i in range(1, min(self.anchor, x.shape[1])):
            tokens = x[:, i :: self.anchor]  # the last group may be too short to have one
            before = (first if self.order == "anchor" else known)[:, : tokens.shape[1]]
            out[:, i :: self.anchor] = tokens - before
            if self.order == "consecutive":
                known = decoded(tokens - before) + before if self.loop == "closed" else tokens
        return out

    def _sums(self, d: Tensor) -> Tensor:
        """The inverse of `_differences`."""
        out = d.clone()
        for i in range(1, min(self.anchor, d.shape[1])):
            target = out[:, i :: self.anchor]
            before = 0 if self.order == "anchor" else i - 1
            target += out[:, before :: self.anchor][:, : target.shape[1]]
        return out
