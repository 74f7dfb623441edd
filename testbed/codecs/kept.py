"""Which context tokens a selector kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.kvcache import KVCache


@dataclass(frozen=True)
class Kept:
    """Per layer the indices kept, ascending: int64 [n], [kv_heads, n] where heads differ, or None: all of them.

    Indices count the context's tokens (0 is its first), so layers that share one list may share the tensor. A head that
    keeps fewer than another has -1 in its first places.
    """

    layers: tuple[Tensor | None, ...]
    context_tokens: int

    @classmethod
    def everything(cls, cache: KVCache) -> Kept:
        """Nothing dropped."""
        tokens = max((layer.tokens for layer in cache.layers), default=0)
        return cls((None,) * len(cache.layers), tokens)

    @property
    def tokens(self) -> int:
        """Context tokens that a head of a pruned layer keeps, on average; all of them where no layer is pruned."""
        pruned = [index for index in self.layers if index is not None]
        if not pruned:
            return self.context_tokens
        return round(
            sum(int((index >= 0).sum()) / (index[..., 0].numel() or 1) for index in pruned) / len(pruned)
        )

    def apply(self, cache: KVCache) -> KVCache:
        """The cache of the kept tokens, with their original positions and the original length."""
        from testbed.models.kvcache import KVCache

        if len(self.layers) != len(cache.layers):
            raise ValueError(
                f"tokens were chosen for {len(self.layers)} layers, the cache has {len(cache.layers)}"
            )
        pairs = zip(cache.layers, self.layers, strict=True)
        return KVCache(
            [layer if index is None else layer.select(index) for layer, index in pairs], cache.length
        )

    def digest(self) -> str:
        """Sixteen hex digits, equal for equal choices on any machine."""
        digest = hashlib.blake2b(str((len(self.layers), self.context_tokens)).encode(), digest_size=8)
        known: dict[int, bytes] = {}
        for index in self.layers:
            if index is None:
                digest.update(b"all;")
                continue
            if id(index) not in known:
                known[id(index)] = (
                    f"{tuple(index.shape)}".encode() + index.cpu().contiguous().numpy().tobytes()
                )
            digest.update(known[id(index)])
        return digest.hexdigest()
