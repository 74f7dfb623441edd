"""What the edge's model knows, gathered for a selector: of a whole context, or chunk by chunk while it arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from testbed.codecs.evidence import Evidence, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Kept
    from testbed.codecs.select import Selector
    from testbed.models.kvcache import KVCache
    from testbed.models.language import LanguageModel, Prefill


def prefill_for(model: LanguageModel, needs: Needs, ids: Sequence[int], prefix: KVCache | None) -> Prefill:
    """The context's prefill behind `prefix`, with what `needs` asks to be kept of it."""
    return model.prefill(
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
    the gold answer where `needs.answer`; their queries come of one pass.
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
        attended=model.attended,
        rotation=model.rotation,
        seed=seed,
    )
    if not (needs.question or needs.answer):
        return evidence
    asked = len(question_ids)
    past = context.cache if prefix is None else model.join(prefix, context.cache)
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


class OnlineSelection:
    """A question-aware selector over a context that comes in chunks, such as online Q2C.

    After a chunk the question's tokens, few beside a chunk's, run behind all that has arrived. So what is known then is what
    the selector says of a context that ends there, and behind the last chunk it is what it says of the whole.
    """

    def __init__(
        self, model: LanguageModel, selector: Selector, prefix: KVCache | None, question_ids: Sequence[int]
    ) -> None:
        self._model, self._selector = model, selector
        self._prefix, self._question = prefix, question_ids
        self._arrived: KVCache | None = None
        self._evidence: Evidence | None = None

    def arrive(self, chunk: KVCache) -> Kept:
        """Take in the cache of the next chunk's tokens; returns what to keep of all that has arrived."""
        import torch

        from testbed.models.language import Prefill

        self._arrived = chunk if self._arrived is None else self._model.join(self._arrived, chunk)
        context = Prefill(self._arrived, [], torch.arange(0), None)
        needs = Needs(question=True)
        self._evidence = gather(self._model, needs, self._prefix, context, self._question)
        return self._selector.select(self._evidence)

    def scores(self, layer: int) -> Tensor:
        """What each token that has arrived is worth to the selector, float32 [kv_heads, tokens]."""
        if self._evidence is None:
            raise ValueError("no chunk has arrived")
        return self._selector.scores(self._evidence, layer)
