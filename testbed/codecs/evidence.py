"""What a selector may look at, how it is collected from a model, and what the selector kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from testbed.codecs import CodecError

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.merged import Merged
    from testbed.models.inputs import AttentionInputs
    from testbed.models.kvcache import KVCache, KVLayer
    from testbed.models.language import LanguageModel
    from testbed.models.prefill import BlockPrefill, Prefill
    from testbed.models.rotary import Rotation

#: What a model is asked before it reads its context once more (KVzip, arXiv:2505.23416).
REPEAT = "\n\nRepeat the previous context exactly."


@dataclass(frozen=True)
class Needs:
    """What the edge must keep for a selector. `context_queries`: those of the last n context tokens; None: of all.

    `question`: the question's queries. `answer`: the gold answer's too, which no deployment knows. `context_attention`: what
    all context tokens pay to each of them, summed up while they are prefilled. `context_inputs`: what the context's
    attention modules are given, for foreign methods that compute from hidden states. `reread`: the queries of the context's
    tokens as they are read once more behind `REPEAT`, which takes a pass of as many tokens again.
    """

    context_queries: int | None = 0
    question: bool = False
    answer: bool = False
    context_attention: bool = False
    context_inputs: bool = False
    reread: bool = False

    @classmethod
    def of_all(cls, needs: Iterable[Needs]) -> Needs:
        """What serves every one of these."""
        each = list(needs)
        counts = [need.context_queries for need in each]
        return cls(
            None if None in counts else max((n for n in counts if n is not None), default=0),
            any(need.question for need in each),
            any(need.answer for need in each),
            any(need.context_attention for need in each),
            any(need.context_inputs for need in each),
            any(need.reread for need in each),
        )


def _no_softcap(layer: int) -> float | None:
    return None


def _no_sinks(layer: int) -> Tensor | None:
    return None


def _as_cached(layer: int, held: KVLayer) -> tuple[Tensor, Tensor]:
    return held.keys.float(), held.values.float()


@dataclass
class Evidence:
    """The context's KV and what is known about its use. Queries are as attention used them: [q_heads, n, head_dim].

    The cache holds the context alone; the prefix (known to both sides, never sent) and the question's own tokens
    take part in the softmax, so their caches stand beside it. All positions are absolute, [tokens] (no ragged heads).
    """

    cache: KVCache
    scaling: Callable[[int], float]  #: of a layer: what queries · keys are multiplied with
    prefix: KVCache | None = None
    context_queries: Sequence[Tensor] | None = None  #: per layer, of the last n context tokens
    context_query_positions: Tensor | None = None  #: int64 [n]
    context_attention: Sequence[Tensor] | None = (
        None  #: per layer [attention's KV heads, tokens], summed over all of them
    )
    context_inputs: AttentionInputs | None = None  #: of the context's prefill
    question_queries: Sequence[Tensor] | None = None  #: per layer, of every question token
    question_query_positions: Tensor | None = None  #: int64 [m]
    question_cache: KVCache | None = None  #: and of the answer behind it, where that is at hand
    answer_queries: Sequence[Tensor] | None = (
        None  #: per layer, of the tokens that the answer's are predicted at
    )
    answer_query_positions: Tensor | None = None  #: int64 [a]
    reread_queries: Sequence[Tensor] | None = None  #: per layer, of `REPEAT` and the context's tokens again
    reread_query_positions: Tensor | None = None  #: int64 [r]
    reread_cache: KVCache | None = None
    #: A layer's keys and values as attention sees them, [heads, tokens, dim]: not what is cached, where that is a latent.
    attended: Callable[[int, KVLayer], tuple[Tensor, Tensor]] = _as_cached
    rotation: Callable[[int], Rotation] | None = None  #: a layer's rotary position embedding
    projection: Callable[[int], Tensor] | None = (
        None  #: a layer's output projection, [hidden, q_heads · value_dim]
    )
    softcap: Callable[[int], float | None] = field(default=_no_softcap)
    sinks: Callable[[int], Tensor | None] = field(default=_no_sinks)  #: see `models.attention.with_sinks`
    seed: int | str = 0  #: of random choices; names the example

    @property
    def prunable(self) -> list[int]:
        """Indices of the layers that selectors prune: all but sliding-window ones, which travel whole."""
        return [i for i, layer in enumerate(self.cache.layers) if layer.window is None]

    @property
    def tokens(self) -> int:
        """Context tokens, counted in the layers with full attention (any layer where there is none)."""
        layers = [self.cache.layers[i] for i in self.prunable] or self.cache.layers
        counts = {layer.tokens for layer in layers}
        if len(counts) > 1:
            raise CodecError(
                f"full-attention layers hold {sorted(counts)[:4]} tokens; a selector takes unpruned caches"
            )
        return counts.pop()

    @property
    def question_tokens(self) -> int:
        """Question tokens whose queries are at hand."""
        return int(self.question_queries[0].shape[1]) if self.question_queries else 0

    def attention_of_question(self, layer: int, weights: Tensor | None = None) -> Tensor:
        """Attention paid to each context token, summed over the question's tokens: float32 [kv_heads, tokens].

        Causal softmax over prefix, context and question; a KV head's query heads are averaged. weights: [question tokens], by
        which each one's attention counts. Raises CodecError where there is no question.
        """
        queries, positions = self.question_queries, self.question_query_positions
        if not queries or positions is None or self.question_tokens == 0:
            raise CodecError("the selector ranks by the question's queries, and there are none")
        return self._attention(layer, queries[layer], positions, self.question_cache, weights)

    def attention_of_answer(self, layer: int) -> Tensor:
        """As `attention_of_question`: summed over the tokens at which the gold answer's tokens are predicted."""
        queries, positions = self.answer_queries, self.answer_query_positions
        if not queries or positions is None:
            raise CodecError("the selector ranks by the gold answer's queries, and there are none")
        return self._attention(layer, queries[layer], positions, self.question_cache)

    def attention_of_context(self, layer: int, last: int | None) -> Tensor:
        """Attention paid to each context token, summed over the last `last` context tokens (None: all).

        As `attention_of_question`, over prefix and context: what the prefill summed up, or else from its queries. Raises
        CodecError where those were not kept.
        """
        if last is None and self.context_attention is not None:
            return self._of_cached_heads(layer, self.context_attention[layer][:, -self.tokens :])
        wanted = self.tokens if last is None else min(last, self.tokens)
        queries, positions = self.context_queries, self.context_query_positions
        kept = queries[layer].shape[1] if queries else 0
        if not queries or positions is None or kept < wanted:
            raise CodecError(f"the selector needs the queries of {wanted} context tokens; {kept} were kept")
        return self._attention(layer, queries[layer][:, kept - wanted :], positions[kept - wanted :], None)

    def attention_before(self, layer: int, last: int) -> Tensor:
        """Attention that each of the last `last` context tokens pays to each context token before them: float32 [q_heads, last,
        n]. Causal softmax over prefix and context. Raises CodecError where their queries were not kept.
        """
        import torch

        from testbed.models.scores import attention_blocks

        queries, positions = self.context_queries, self.context_query_positions
        wanted = min(last, self.tokens)
        kept = queries[layer].shape[1] if queries else 0
        if not queries or positions is None or kept < wanted:
            raise CodecError(f"the selector needs the queries of {wanted} context tokens; {kept} were kept")
        held, keys, key_positions = self._stretched(layer, None)
        paid = attention_blocks(
            queries[layer][:, kept - wanted :],
            keys,
            query_positions=positions[kept - wanted :],
            key_positions=key_positions,
            scaling=self.scaling(layer),
            softcap=self.softcap(layer),
        )
        before = keys.shape[1] - held.tokens
        return torch.cat([block for _, _, block in paid], dim=1)[..., before : keys.shape[1] - wanted]

    def attention_within_context(self, layer: int, tokens: slice, size: int) -> Tensor:
        """Attention paid to each of these context tokens, summed over those of its stretch of `size`, later ones too: float32
        [kv_heads, n].

        The softmax is over the stretch alone. Raises CodecError where the context's queries were not kept.
        """
        import torch

        from testbed.models.scores import attention_sum

        held, queries = self.cache.layers[layer], self.context_queries
        kept = queries[layer].shape[1] if queries else 0
        if not queries or kept < self.tokens:
            raise CodecError(
                f"the selector needs the queries of {self.tokens} context tokens; {kept} were kept"
            )
        asking = queries[layer][:, kept - self.tokens :][:, tokens].split(size, dim=1)
        stretches = self.attended(layer, held)[0][:, tokens].split(size, dim=1)
        at = [torch.zeros(own.shape[1], dtype=torch.int64, device=own.device) for own in stretches]
        paid = [
            attention_sum(
                own_queries,
                own,
                query_positions=nowhere,  # all at one position, so that each sees all
                key_positions=nowhere,
                scaling=self.scaling(layer),
                softcap=self.softcap(layer),
                sinks=self.sinks(layer),
            )
            for own_queries, own, nowhere in zip(asking, stretches, at, strict=True)
        ]
        return self._of_cached_heads(layer, torch.cat(paid, dim=1))

    def most_attention_rereading(self, layer: int) -> Tensor:
        """The most attention that a token pays to each context token while the context is read again: float32 [kv_heads, tokens].

        The highest over those tokens and a KV head's query heads; causal softmax over prefix, context and what is read again.
        Raises CodecError where it was not.
        """
        import torch

        from testbed.models.scores import attention_blocks

        queries, positions = self.reread_queries, self.reread_query_positions
        if not queries or positions is None:
            raise CodecError("the selector ranks by how the context is read again, and it was not")
        held, keys, key_positions = self._stretched(layer, self.reread_cache)
        most = torch.zeros(len(queries[layer]), keys.shape[1], device=keys.device)
        for _, _, paid in attention_blocks(
            queries[layer],
            keys,
            query_positions=positions,
            key_positions=key_positions,
            scaling=self.scaling(layer),
            softcap=self.softcap(layer),
            sinks=self.sinks(layer),
            window=held.window,
        ):
            most = most.maximum(paid.amax(1))
        before = self.prefix.layers[layer].tokens if self.prefix is not None else 0
        return most[:, before : before + held.tokens].unflatten(0, (held.kv_heads, -1)).amax(1)

    def _stretched(self, layer: int, behind: KVCache | None) -> tuple[KVLayer, Tensor, Tensor]:
        """The context's layer, and the keys and positions of prefix, context and what is behind it, one after the other."""
        import torch

        stretches = [cache.layers[layer] for cache in (self.prefix, self.cache, behind) if cache is not None]
        keys = torch.cat([self.attended(layer, stretch)[0] for stretch in stretches], dim=1)
        return self.cache.layers[layer], keys, torch.cat([stretch.positions for stretch in stretches])

    def _attention(
        self,
        layer: int,
        queries: Tensor,
        positions: Tensor,
        behind: KVCache | None,
        weights: Tensor | None = None,
    ) -> Tensor:
        from testbed.models.scores import attention_sum

        held, keys, key_positions = self._stretched(layer, behind)
        before = self.prefix.layers[layer].tokens if self.prefix is not None else 0
        total = attention_sum(
            queries,
            keys,
            query_positions=positions,
            key_positions=key_positions,
            scaling=self.scaling(layer),
            softcap=self.softcap(layer),
            sinks=self.sinks(layer),
            window=held.window,
            weights=weights,
        )
        return self._of_cached_heads(layer, total[:, before : before + held.tokens])

    def _of_cached_heads(self, layer: int, attention: Tensor) -> Tensor:
        """Where one cached head serves several of attention's (MLA), it is worth their mean."""
        return attention.unflatten(0, (self.cache.layers[layer].kv_heads, -1)).mean(1)


@dataclass(frozen=True)
class Kept:
    """Per layer the indices kept, ascending: int64 [n], [kv_heads, n] where heads differ, or None: all of them.

    Indices count the context's tokens (0 is its first), so layers that share one list may share the tensor. A head that
    keeps fewer than another has -1 in its first places.
    """

    layers: tuple[Tensor | None, ...]
    context_tokens: int
    #: Of each layer the keys' channels that are sent, bool [kv_heads, head_dim], where a quantizer chose some; the others are 0.
    channels: tuple[Tensor, ...] = ()
    #: Whether what a layer keeps is turned to positions one behind the other, of which the last is the context's.
    together: bool = False
    merged: tuple[Merged | None, ...] = ()  #: of each layer what goes into its kept tokens, where any does

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

    def within(self, start: int, stop: int) -> float:
        """Of the context tokens from `start` up to `stop` those that a head of a pruned layer keeps, on average."""
        pruned = [index for index in self.layers if index is not None]
        if not pruned:
            return stop - start
        return sum(
            int(((index >= start) & (index < stop)).sum()) / (index[..., 0].numel() or 1) for index in pruned
        ) / len(pruned)

    def apply(self, cache: KVCache) -> KVCache:
        """The cache of the kept tokens, with the original length, and original positions unless they are put `together`; other
        channels of keys are 0. Raises CodecError where keys are to be turned and the cache does not know how.
        """
        from testbed.models.kvcache import KVCache

        if len(self.layers) != len(cache.layers):
            raise ValueError(
                f"tokens were chosen for {len(self.layers)} layers, the cache has {len(cache.layers)}"
            )
        pairs = zip(cache.layers, self.layers, strict=True)
        layers = [layer if index is None else layer.select(index) for layer, index in pairs]
        if self.merged:
            layers = [
                layer if own is None else own.apply(whole, layer)
                for whole, layer, own in zip(cache.layers, layers, self.merged, strict=True)
            ]
        if self.together:
            if all(layer.rope is None for layer in layers):
                raise CodecError(
                    "keys are to be turned to other positions, and how they were turned is not known"
                )
            layers = [
                layer if index is None else _moved_up(layer, cache.length)
                for layer, index in zip(layers, self.layers, strict=True)
            ]
        if self.channels:
            layers = [
                replace(layer, keys=layer.keys.masked_fill(~sent[:, None], 0))
                for layer, sent in zip(layers, self.channels, strict=True)
            ]
        return KVCache(layers, cache.length)

    def digest(self) -> str:
        """Sixteen hex digits, equal for equal choices on any machine."""
        apart = [word for word in ("together", "merged") if getattr(self, word)]
        start = (len(self.layers), self.context_tokens, *apart)
        digest = hashlib.blake2b(str(start).encode(), digest_size=8)
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


def _moved_up(layer: KVLayer, end: int) -> KVLayer:
    """A layer's tokens at the positions before `end`, none left out between them; one that turns no keys keeps its keys."""
    import torch

    positions = torch.arange(end - layer.tokens, end, device=layer.positions.device)
    if layer.counts is not None:
        positions = positions.expand_as(layer.positions).where(layer.positions != -1, -1)
    if layer.rope is None:
        return replace(layer, positions=positions)
    keys = layer.rope.turn(layer.keys, (positions - layer.positions) * (layer.positions != -1))
    return replace(layer, keys=keys.to(layer.keys.dtype), positions=positions)


def prefill_for(model: LanguageModel, needs: Needs, ids: Sequence[int], prefix: KVCache | None) -> Prefill:
    """The context's prefill behind `prefix`, with what `needs` asks to be kept of it."""
    return blocks_for(model, needs, ids, prefix).finish()


def blocks_for(
    model: LanguageModel, needs: Needs, ids: Sequence[int], prefix: KVCache | None
) -> BlockPrefill:
    """As `prefill_for`, in blocks: what its `finish` gives is what `gather` takes."""
    return model.blocks(
        ids,
        prefix,
        queries=needs.context_queries,
        attention=needs.context_attention,
        inputs=needs.context_inputs,
    )


def gather(
    model: LanguageModel,
    needs: Needs,
    prefix: KVCache | None,
    context: Prefill,
    question_ids: Sequence[int],
    answer_ids: Sequence[int] = (),
    seed: int | str = 0,
) -> Evidence:
    """The evidence on a context that was prefilled behind `prefix`, with what `needs` asks for.

    The context's queries and attention are those that its prefill kept. A question is run behind the context, and behind it
    the gold answer where `needs.answer`; their queries come of one pass. So is the context once more, where `needs.reread`:
    UsageError is raised where the model's length leaves no room for it.
    """
    evidence = Evidence(
        cache=context.cache,
        prefix=prefix,
        context_queries=context.queries,
        context_query_positions=context.query_positions,
        context_attention=context.attention,
        context_inputs=context.inputs,
        scaling=model.scaling,
        softcap=model.softcap,
        sinks=model.sinks,
        attended=model.attended,
        rotation=model.rotation,
        projection=model.projection,
        seed=seed,
    )
    if not (needs.question or needs.answer or needs.reread):
        return evidence
    past = context.cache if prefix is None else model.join(prefix, context.cache)
    if needs.reread:
        again = model.prefill([*model.tokenize(REPEAT), *context.ids], past, queries=None)
        evidence.reread_queries, evidence.reread_query_positions = again.queries, again.query_positions
        evidence.reread_cache = again.cache
    if not (needs.question or needs.answer):
        return evidence
    asked = len(question_ids)
    # The last answer token is predicted, and predicts nothing that is scored.
    ids = [*question_ids, *(answer_ids[:-1] if needs.answer else ())]
    run = model.prefill(ids, past, queries=None)
    evidence.question_queries = [queries[:, :asked] for queries in run.queries]
    evidence.question_query_positions = run.query_positions[:asked]
    evidence.question_cache = run.cache
    if needs.answer:
        evidence.answer_queries = [queries[:, asked - 1 :] for queries in run.queries]
        evidence.answer_query_positions = run.query_positions[asked - 1 :]
    return evidence
