"""LagKV: tokens that stand out from the range of the tokens behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.quantize import over
from testbed.codecs.select import Selector, ranked_within

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class LagKV(Selector):
    """Lag-relative information: keeps of each partition the tokens that spread most beside the next one's range.

    Behind `sinks` tokens the context is cut into partitions of `lag` tokens. With least and most [d] of each channel over the
    next partition, x̄ = (x - least) / (most - least), and a token's spread is the deviation of x̄ over its channels. A token is
    worth the softmax over its partition of the keys' spread plus that of the values', and score[h, t] is its rank there, so
    that partitions keep equal shares: [kv_heads, tokens]. A channel that does not change in the next partition counts as 0.

    Sinks, the last partition and what is behind it are always kept, as in the paper; looks at no query.
    """

    name: ClassVar[str] = "lagkv"
    source: ClassVar[str] = (
        "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important (arXiv:2504.04704)"
    )

    sinks: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)
        self.require("lag", "from 1 to 65536", 1 <= self.lag <= 65536)

    def _end(self, tokens: int) -> int:
        """Where the partitions end that have another behind them."""
        return self.sinks + max(0, (tokens - self.sinks) // self.lag - 1) * self.lag

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        end = min(tokens, self._end(tokens))
        return chain(range(min(self.sinks, tokens)), range(tokens - 1, end - 1, -1))

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        held, end = evidence.cache.layers[layer], self._end(evidence.tokens)
        scores = torch.zeros(held.kv_heads, evidence.tokens)
        if end <= self.sinks:  # all are kept by right, whoever ranks
            return scores
        keys, values = (
            self._spread(x[:, self.sinks : end + self.lag].float()).softmax(-1)
            for x in (held.keys, held.values)
        )
        scores[:, self.sinks : end] = ranked_within((keys + values).flatten(1), self.lag)
        return scores

    def _spread(self, x: Tensor) -> Tensor:
        """[heads, partitions · lag, d] -> [heads, partitions - 1, lag]."""
        parts = x.unflatten(1, (-1, self.lag))
        least, most = parts[:, 1:].aminmax(dim=2, keepdim=True)
        return over(parts[:, :-1] - least, most - least).std(-1)
