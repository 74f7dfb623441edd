"""Prefill: what a stretch of tokens leaves behind, computed at once or in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from testbed.models.inputs import AttentionInputs, in_turn, recorded
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.live import LayerShape, LiveCache, LivePass
from testbed.models.shrinking import Wanted

#: Takes a layer's index and its keys and values.
OnLayer = Callable[[int, KVLayer], None]


@dataclass
class Prefill:
    """What a stretch of tokens left behind."""

    cache: KVCache  #: of these tokens alone, in 16 bits, on the model's device
    queries: list[Tensor]  #: per layer [q_heads, n, head_dim] of the last n tokens; n may be 0
    query_positions: Tensor  #: int64 [n]: their absolute positions
    logits: Tensor | None  #: float32 [vocabulary] behind the last token; None where there were no tokens
    #: per layer float32 [kv_heads, tokens]: the attention that these tokens pay to each of themselves, summed over them
    #: and averaged over the query heads of a KV head (of attention's own ones, where a latent is cached)
    attention: list[Tensor] | None = None
    inputs: AttentionInputs | None = None  #: what the attention modules were given, where that was asked for
    ids: Sequence[int] = ()  #: the tokens


def drops_tokens(blocks: Callable[[list[int]], BlockPrefill], layers: int) -> bool:
    """Whether a model of so many layers can be given fewer tokens in later ones, and makes of these what it makes without the
    others. It is tried, so that `shrinking` need know nothing of what an architecture hands from layer to layer.
    """
    ids = [1, 2, 3, 4, 5]
    left = [*[5, 4][: layers - 1], *[3] * layers]
    alone = blocks(ids[:3]).run(3)
    try:
        cut = blocks(ids).run(5, lambda layer: left.pop(0) if layer else left[0])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return all(
        ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 0.05 * float(theirs.abs().max())
        for layer, other in zip(cut.layers, alone.layers, strict=True)
        for ours, theirs in ((layer.keys, other.keys), (layer.values, other.values))
    )


class BlockPrefill:
    """A prefill that goes on block by block, in one cache: each block's part of it is at hand before the next is computed.

    `LanguageModel.blocks` makes it. A block whose pass raises is forgotten: those before it stand, and it may be run again.
    """

    def __init__(
        self,
        ids: Sequence[int],
        live: LiveCache,
        forward: Callable[..., tuple[Tensor, LivePass]],
        network: Any,
        shapes: list[LayerShape],
        queries: int | None,
        attention: bool,
        inputs: bool,
    ) -> None:
        """forward(live, ids, queries=…, attention=…, wanted=…): its last token's logits [1, vocabulary], and what it kept."""
        self._ids, self._live, self._forward = ids, live, forward
        self._network, self._shapes = network, shapes
        self._queries = len(ids) if queries is None else min(queries, len(ids))
        self._observed: list[list[Tensor]] = [[] for _ in shapes]  # by layer, of one block after the other
        self._paid: list[Tensor] | None = [] if attention else None
        self._inputs: list[AttentionInputs] | None = [] if inputs else None
        self._logits: Tensor | None = None
        self.done = 0  #: tokens that have been prefilled

    def run(self, stop: int, wanted: Wanted | None = None) -> KVCache:
        """Go on up to token `stop` (of these, from 0; it is not among them); the cache of what that adds, a copy.

        wanted: up to which token the block is to go on (see `shrinking`); those behind it are dropped, and `done` says what is
        left. Such a block gathers no queries, attention or inputs.

        Sliding windows hold all of the block's tokens, as later ones may be computed behind it wherever it lies;
        `kvcache.seen_from` leaves out what nothing behind all of them sees. Joined and cut so, the blocks' caches are the one
        that `finish` gives. Raises ValueError where nothing is left to be done up to there, Stopped where nothing is `wanted`,
        and what `prefill` raises.
        """
        if not self.done < stop <= len(self._ids):
            raise ValueError(f"{self.done} of {len(self._ids)} tokens are prefilled; none can end at {stop}")
        begun = self.done
        self._advance(stop, None if wanted is None else lambda layer: wanted(layer) - begun)
        return self._live.export(self._shapes, self.done - begun)

    def finish(self, on_layer: OnLayer | None = None) -> Prefill:
        """Prefill what is left; then what `prefill` gives of all tokens. To be called once: it hands out what was kept.

        on_layer: is given each layer of the cache, a copy, as soon as it is final, while later ones are still to be computed.
        """
        tell = None if on_layer is None else partial(self._tell, on_layer)
        if self.done < len(self._ids):
            self._live.on_layer = tell
            self._advance(len(self._ids))
        elif tell is not None:
            for index in range(len(self._shapes)):
                tell(index)
        # Copies made here are ordinary tensors; those of inference mode could not be changed in place elsewhere.
        observed = [torch.cat(parts, 1) for parts in self._emptied(self._observed)] if self._queries else []
        last = self._live.length
        return Prefill(
            self._live.export(self._shapes),
            observed,
            torch.arange(last - self._queries, last, device=self._live.device),
            self._logits,
            self._paid or None,
            in_turn(self._inputs) if self._inputs else None,
            self._ids,
        )

    def _tell(self, on_layer: OnLayer, index: int) -> None:
        with torch.inference_mode(False):  # ordinary tensors, here too
            on_layer(index, self._live.export_layer(index, self._shapes[index]))

    @staticmethod
    def _emptied(lists: list[list[Tensor]]) -> Any:
        """One after the other, each let go of before the next is asked for."""
        while lists:
            yield lists.pop(0)

    def _advance(self, stop: int, wanted: Wanted | None = None) -> None:
        block, behind = self._ids[self.done : stop], len(self._ids) - stop
        kept = max(0, min(len(block), self._queries - behind))
        if wanted is not None and (kept or self._paid is not None or self._inputs is not None):
            raise ValueError("a block that may shrink gathers nothing for selectors")
        try:
            with recorded(self._network) if self._inputs is not None else nullcontext() as given:
                logits, run = self._forward(
                    self._live, block, queries=kept, attention=self._paid is not None, wanted=wanted
                )
        except BaseException:
            self._live.rewind(self.done)
            raise
        self.done += run.tokens
        self._logits = logits[-1].float().clone()
        if kept:
            for layer, parts in enumerate(self._observed):
                parts.append(run.queries.pop(layer))
        if run.attention is not None:
            self._add_up([run.attention[layer][:, -stop:] for layer in range(len(self._shapes))])
        if given is not None and self._inputs is not None:
            self._inputs.append(given)

    def _add_up(self, paid: list[Tensor]) -> None:
        """Per layer [kv_heads, tokens so far]: what a block's tokens pay to each of these, to what those before it paid."""
        assert self._paid is not None
        if not self._paid:
            self._paid = [sums.new_zeros(sums.shape[0], len(self._ids)) for sums in paid]
        for total, sums in zip(self._paid, paid, strict=True):
            total[:, : sums.shape[1]] += sums
