"""What the edge's model knows, gathered for a selector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from testbed.codecs.evidence import Evidence, Needs

if TYPE_CHECKING:
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
