"""Merging: what a selector drops goes into what it keeps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError, registry
from testbed.codecs.merged import Merged
from testbed.codecs.select import Selector, rankable
from testbed.codecs.select.wrapper import Wrapper

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence, Kept


@dataclass(frozen=True)
class Merge(Wrapper):
    """Cache merging: runs of like tokens become one token (kvmerger), or dropped values go into the kept ones behind them (cam).

    kvmerger: of a budget of b tokens, each KV head's context is cut where neighbouring keys are least alike by cosine, into b
    runs; what the selector `by` keeps always is a run by itself, as the paper's unmerged tokens are. In each, the token p of the
    highest score of by's takes the place of all:
        k_p = Σ w[t] k[t], v_p = Σ w[t] v[t],   w[t] ∝ exp(-‖k_p - k_t‖² / 2σ²),   σ = Σ ‖k_p - k_t‖ / (√2 · |run|)
    summed over the run, w to 1. The paper cuts at a threshold of its own; here the budget decides. Keys are as they are cached,
    with RoPE.

    cam: what `by` keeps, and into the values of the next m = `reach` kept tokens (fewer at the end) goes V[t] / m of a dropped
    token t, with probability min(1, s[t] / mean of their s), s being by's scores, which are to be shares of attention; ones
    below 0 are refused. Chance is seeded by the example and the layer.
    """

    name: ClassVar[str] = "merge"
    source: ClassVar[str] = (
        "Model Tells You Where to Merge (KVMerger, arXiv:2407.08454); CaM: Cache Merging for Memory-efficient LLMs Inference"
        " (ICML 2024, openreview.net/forum?id=LCTmppB165)"
    )

    form: Literal["kvmerger", "cam"] = "kvmerger"
    reach: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("form", "kvmerger or cam", self.form in ("kvmerger", "cam"))
        self.require("reach", "from 1 to 65536", 1 <= self.reach <= 65536)
        scored = registry.find(self.by).scores is not Selector.scores  # type: ignore[attr-defined]
        self.require("by", "a selector that has scores where form=cam", scored or self.form != "cam")
        self.require("scope", "head where form=kvmerger", self.scope == "head" or self.form == "cam")

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        return super().always(tokens, budget) if self.form == "cam" else ()

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        if self.form == "cam":
            return super().scores(evidence, layer)
        scores, runs = self._worth(evidence, layer), self._runs(evidence, layer)
        most = scores.new_full((len(scores), self._budget(evidence)), -math.inf)
        most = most.scatter_reduce(1, runs, scores, "amax").gather(1, runs)
        best = scores == most
        first = best & (_numbered(best, runs) == 1)
        return scores.masked_fill(~first, -math.inf)

    def select(self, evidence: Evidence) -> Kept:
        kept = super().select(evidence)
        merging = self._into_pivots if self.form == "kvmerger" else self._into_following
        merged = [
            None if index is None else merging(evidence, layer, index)
            for layer, index in enumerate(kept.layers)
        ]
        return replace(kept, merged=tuple(merged)) if any(merged) else kept

    def _budget(self, evidence: Evidence) -> int:
        return max(1, round(self.ratio * evidence.tokens))

    def _alone(self, evidence: Evidence) -> list[int]:
        budget = self._budget(evidence)
        return list(dict.fromkeys(super().always(evidence.tokens, budget)))[:budget]

    def _worth(self, evidence: Evidence, layer: int) -> Tensor:
        """by's scores, highest where it keeps a token always: float32 [kv_heads, tokens]."""
        import torch

        alone = self._alone(evidence)
        if len(alone) == self._budget(evidence):  # it may have no scores then
            scores = torch.zeros(evidence.cache.layers[layer].kv_heads, evidence.tokens)
        else:
            scores = rankable(super().scores(evidence, layer))
        scores[:, alone] = torch.finfo(torch.float32).max
        return scores

    def _runs(self, evidence: Evidence, layer: int) -> Tensor:
        """Which run each token is of, counted from 0: int64 [kv_heads, tokens]."""
        import torch

        keys = evidence.cache.layers[layer].keys.float()
        alike = rankable(torch.cosine_similarity(keys[:, :-1], keys[:, 1:], dim=2))
        for token in self._alone(evidence):
            alike[:, max(0, token - 1) : token + 1] = -2
        cuts = alike.sort(dim=1, stable=True).indices[:, : self._budget(evidence) - 1]
        begins = torch.zeros(len(alike), evidence.tokens, dtype=torch.int64).scatter_(1, cuts + 1, 1)
        return begins.cumsum(1)

    def _into_pivots(self, evidence: Evidence, layer: int, pivots: Tensor) -> Merged:
        import torch

        keys = evidence.cache.layers[layer].keys.float().cpu()
        runs, pivots = self._runs(evidence, layer), pivots.expand(len(keys), -1)
        own = pivots.gather(1, runs)[..., None]
        distances = (keys - keys.gather(1, own.expand_as(keys))).norm(dim=2)

        def over_run(numbers: Tensor) -> Tensor:
            return torch.zeros(pivots.shape).scatter_add_(1, runs, numbers).gather(1, runs)

        sizes = over_run(torch.ones_like(distances))
        deviation = over_run(distances) / (math.sqrt(2) * sizes)
        weights = torch.exp(-((distances / deviation.clamp_min(1e-12)) ** 2) / 2)
        weights = weights / over_run(weights)
        tokens = torch.arange(evidence.tokens).expand_as(runs)
        return Merged(runs, tokens, weights, weights)

    def _into_following(self, evidence: Evidence, layer: int, kept: Tensor) -> Merged:
        import torch

        scores = rankable(super().scores(evidence, layer))
        if scores.numel() and float(scores.min()) < 0:
            raise CodecError(
                f"{self.name}(form=cam) goes by shares of attention, and {self.by} gives scores below 0"
            )
        kept = kept.expand(len(scores), -1)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
        dropped = torch.arange(evidence.tokens).expand_as(scores)[~taken].unflatten(0, (len(scores), -1))
        places = taken.cumsum(1).gather(1, dropped)
        ends = (places + self.reach).clamp_max(kept.shape[1])
        behind = ends - places  # 0: dropped behind the last that is kept
        sums = torch.nn.functional.pad(scores.gather(1, kept).double().cumsum(1), (1, 0))
        mean = (sums.gather(1, ends) - sums.gather(1, places)) / behind.clamp_min(1)
        share = (scores.gather(1, dropped) / mean).nan_to_num(0, 1, 0).clamp_max(1)
        seed = hashlib.blake2b(f"{evidence.seed}/merge/{layer}".encode(), digest_size=8).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        taken_over = torch.rand(share.shape, generator=chance) < share
        weights = (taken_over & (behind > 0)) / behind.clamp_min(1)
        return Merged(places.clamp_max(kept.shape[1] - 1), dropped, weights.float(), reach=self.reach)


def _numbered(chosen: Tensor, runs: Tensor) -> Tensor:
    """Of each token how many of its run are chosen up to it, itself too."""
    counts = chosen.long().cumsum(1)
    starts = (runs != runs.roll(1, dims=1)).index_fill(1, runs.new_zeros(1), True)
    before = (counts - chosen.long()).masked_fill(~starts, 0).cummax(1).values
    return counts - before
