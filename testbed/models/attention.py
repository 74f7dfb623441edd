"""Attention over caches whose layers and heads may hold different tokens, and what selectors learn from it on the way.

The backend is registered with transformers under `BACKEND`. It sees queries and keys as the model made them
(rotary position, norms and scaling applied), whatever the architecture. transformers makes no mask for a
backend that it has no mask function for, so the masks here are made from absolute positions: a query at
position q sees the keys at p <= q, in a sliding-window layer those at q - window < p <= q.

What a forward pass works on is the thread's own while it runs (`running`): some models pass no keywords on to their attention.
The module imports without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKEND = "testbed"

#: Why a model is refused that transformers hands no backend to.
OWN_CODE = (
    "transformers computes its attention in code of its own, where its queries cannot be seen and its keys not be "
    "told their positions"
)

#: Queries handled at a time. Keys behind a block's last query are left out, which halves the work of a long
#: prefill; 256 is where torch 2.13 on two cores was fastest (1,024 tokens, 9 heads: 15 ms, one block with a
#: mask 22 ms).
BLOCK = 256
#: The same where weights are written out, since somebody wants their sums: a block of all heads then stays near the core.
SUMMED_BLOCK = 64


class Pass(Protocol):
    """What one forward pass attends to; `live.LivePass` is one."""

    def positions(self, layer: int) -> Tensor:
        """Absolute positions of the layer's keys, ascending, on the CPU: [tokens] or [kv_heads, tokens].

        A head that holds fewer tokens than another begins with places that no query sees, at position -1.
        """

    def masks(self) -> dict[Any, Any]:
        """A memory for the masks of this pass, since most layers share theirs."""

    def observe(
        self,
        layer: int,
        queries: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> None:
        """Takes the queries of a layer, [q_heads, n, head_dim], and what is done with their scores."""

    def sums(self, layer: int, kv_heads: int) -> Tensor | None:
        """Where the attention that these queries pay to each key is added up; None: nobody asks.

        float32 [kv_heads, tokens], on the device: a sum over queries, a mean over the query heads of a KV head.
        """


class Several:
    """A forward pass over one token of each of several requests; `together.TogetherPass` is one."""

    def seen(self, layer: int, window: int | None) -> Tensor:
        """Which of a layer's keys each request's query sees, bool [requests, kv_heads or 1, 1, places]. Window: see `visible`."""
        raise NotImplementedError


_RUNNING: ContextVar[Pass | Several] = ContextVar("testbed.pass")

#: What a backend may be given that this one does not compute.
_TERMS = {"position_bias": "position biases"}


class Chunk(int):
    """The length of attention's chunks (Llama 4), where others have a window: a query sees its own chunk's keys up to itself.

    Counted from position 0 on. A window of that length hides nothing that is seen.
    """


@contextmanager
def running(run: Pass | Several) -> Iterator[None]:
    """The forward pass that this thread makes meanwhile is `run`'s."""
    token = _RUNNING.set(run)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def register() -> None:
    """Make the backend known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(BACKEND, backend)


def backend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, q_heads, n, d], key and value [1, kv_heads, tokens, d].

    The queries are those of the last n keys. Returns ([1, n, q_heads, d], None); of `Several` requests all are as many, and n is
    1. Raises NotImplementedError for an architecture whose attention has terms that this one does not compute.
    """
    run = _RUNNING.get(None)
    if run is None:
        raise RuntimeError(f"the attention backend {BACKEND!r} works under testbed's LanguageModel only")
    unknown = [what for name, what in _TERMS.items() if others.get(name) is not None]
    several = isinstance(run, Several)
    if unknown or attention_mask is not None or (query.shape[2 if several else 0] != 1):
        raise NotImplementedError(f"its attention has {', '.join(unknown) or 'a mask or a batch of its own'}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention sees later tokens, not earlier ones alone")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = _chunk(module) or sliding_window
    if isinstance(run, Several):
        each = attend_each(query, key, value, run.seen(layer, window), scaling, softcap, s_aux)
        return each.transpose(1, 2).contiguous(), None
    run.observe(layer, query[0], scaling=scaling, softcap=softcap, window=window, sinks=s_aux)
    sums = run.sums(layer, key.shape[1])
    output = attend(
        query, key, value, run.positions(layer), scaling, window, softcap, run.masks(), sums, s_aux
    )
    return output.transpose(1, 2).contiguous(), None


def _chunk(module: torch.nn.Module) -> Chunk | None:
    """The length of its chunks, where a layer has them: of these transformers tells a backend by a mask alone."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    layer: Any = module.layer_idx
    chunked = layer < len(kinds) and kinds[layer] == "chunked_attention"
    return Chunk(config.attention_chunk_size) if chunked else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    masks: dict[Any, Any] | None = None,
    sums: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last n keys' queries: query [1, q_heads, n, d] -> [1, q_heads, n, value_dim].

    `positions` ([tokens] or [kv_heads, tokens], on the CPU) may have gaps, but not among the last n. To `sums`, float32
    [kv_heads, tokens], the attention that all queries pay to each key is added, averaged over the heads that share it.
    sinks: [q_heads], see `with_sinks`.
    """
    import torch

    masks = {} if masks is None else masks
    new, tokens = query.shape[2], key.shape[2]
    past = tokens - new
    written_out = softcap is not None or sums is not None or sinks is not None
    if new > 1 and window is None and not written_out and positions.dim() == 1 and _flash(query, key, value):
        return _at_once(query, key, value, scaling)
    block = BLOCK if sums is None else SUMMED_BLOCK
    blocks = []
    for start in range(0, new, block):
        stop = min(start + block, new)
        name = (id(positions), start, stop, window)
        if name not in masks:
            masks[name] = _block_mask(positions, past + start, past + stop, window, query.device, masks)
        first, mask = masks[name]
        asking, seen = query[:, :, start:stop], slice(first, past + stop)
        keys, values = key[:, :, seen], value[:, :, seen]
        if written_out:
            paid = None if sums is None else sums[:, seen]
            blocks.append(_written_out(asking, keys, values, mask, scaling, softcap, paid, sinks))
            continue
        if isinstance(mask, str) and keys.shape[2] > stop - start:
            mask = _lower_right(stop - start, keys.shape[2], tokens, query, masks)
        blocks.append(_dot_product(asking, keys, values, mask, scaling))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in float32 of scores [..., q_heads, n, keys], -inf where a key is not seen.

    sinks [q_heads]: the score of one more key of each head, which every query sees and whose value is nothing (GPT-OSS,
    arXiv:2508.10925): what it is paid is missing from the others.
    """
    import torch

    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    column = sinks.to(scores.device, scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1]


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query of each of several requests: query [requests, q_heads, 1, d], key and value [requests, kv_heads,
    places, d], and which of these each sees (`Several.seen`) -> [requests, q_heads, 1, value_dim].
    """
    requests, q_heads, _, width = query.shape
    asking = (query * scaling).reshape(requests, key.shape[1], -1, width)
    scores = asking @ key.transpose(2, 3)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.masked_fill_(~seen, float("-inf"))
    weights = with_sinks(scores.reshape(requests, q_heads, 1, -1), sinks).reshape(scores.shape)
    return (weights.to(value.dtype) @ value).reshape(requests, q_heads, 1, -1)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch has a kernel for these that holds no scores, whatever their number, and needs no mask."""
    if query.device.type != "cuda":
        return False
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    grouped = query.shape[1] != key.shape[1]
    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped)))


def _at_once(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last keys' queries, each of which sees all keys up to its own."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _lower_right(new: int, keys: int, tokens: int, like: Tensor, masks: dict[Any, Any]) -> Tensor:
    """[new, keys], to be added to scores: 0 where a query sees a key, these being the last keys' own queries; else -inf.

    Cut out of one for all blocks of a pass over so many tokens: one for each would be a matrix of tokens by tokens. In the number
    of `like`, as anything else is made that first, for each block and layer anew.
    """
    import torch

    name = ("lower right", tokens)
    if name not in masks:
        hidden = torch.full((BLOCK, tokens), float("-inf"), dtype=like.dtype, device=like.device)
        masks[name] = hidden.triu_(tokens - BLOCK + 1)
    widest: Tensor = masks[name]
    return widest[BLOCK - new :, tokens - keys :]


def _block_mask(
    positions: Tensor,
    start: int,
    stop: int,
    window: int | None,
    device: torch.device,
    masks: dict[Any, Any],
) -> tuple[int, Tensor | str | None]:
    """The first key that any query of a block (keys start..stop) sees, and which keys from there each sees.

    None: all. "causal": each query sees its own key, these being the last ones, and all before it. Else bool, [n, keys] or
    [kv_heads, n, keys].
    """
    queries = positions[..., start:stop]
    first = 0
    if window is not None:
        too_old = positions[..., :stop] <= queries[..., :1] - window
        # Keys that no head's first query sees are seen by none: later queries see less of the past.
        first = int(too_old.sum(-1).min())
        if not isinstance(window, Chunk) and int((queries[..., -1] - positions[..., first]).max()) < window:
            window = None
    empty = positions.dim() == 2 and bool((positions[:, first] < 0).any())
    if window is None and not empty:
        return first, None if stop - start == 1 else "causal"
    seen = positions[..., first:stop]
    if positions.dim() == 2 or isinstance(window, Chunk) or int(seen[-1] - seen[0]) != stop - first - 1:
        return first, visible(queries, seen, window).to(device)
    name = (
        "window",
        stop - start,
        stop - first,
        window,
    )  # without gaps it is as any other block's of that size
    if name not in masks:
        masks[name] = visible(queries, seen, window).to(device)
    return first, masks[name]


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: [..., n] and [..., tokens] -> bool [..., n, tokens]. window: may be a `Chunk`."""
    queries, keys = query_positions[..., :, None], key_positions[..., None, :]
    seen = keys <= queries
    if key_positions.dim() == 2:
        seen = seen & (keys >= 0)
    return seen if window is None else seen & within(queries, keys, window)


def within(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Whether keys are not too far back for queries, of the absolute positions of both."""
    if isinstance(window, Chunk):
        return keys >= queries - queries % int(window)
    return keys > queries - window


def _per_query_head(mask: Tensor, q_heads: int) -> Tensor:
    """[n, keys] or [kv_heads, n, keys] -> [1, 1 or q_heads, n, keys]."""
    if mask.dim() == 2:
        return mask[None, None]
    return mask.repeat_interleave(q_heads // mask.shape[0], 0)[None]


def _dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | str | None,
    scaling: float,
) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    causal = isinstance(mask, str)
    tensor = None if mask is None or isinstance(mask, str) else _per_query_head(mask, query.shape[1])
    group = query.shape[1] // key.shape[1]
    if group > 1 and tensor is not None and query.device.type != "cpu":
        # The fused kernels of CUDA take grouped heads only without a mask; the fallback holds the full
        # matrix.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        group = 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=tensor, is_causal=causal, scale=scaling, enable_gqa=group > 1
    )


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | str | None,
    scaling: float,
    softcap: float | None,
    sums: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention whose weights are at hand: to be added to `sums` [kv_heads, keys], or because scores are capped or have sinks.

    A score goes through softcap × tanh(score / softcap), as in Gemma 2 (arXiv:2408.00118).
    """
    import torch

    kv_heads, keys = key.shape[1], key.shape[2]
    q_heads, n, width = query.shape[1:]
    # The query heads of a KV head one below the other, so that its keys are read once and never copied.
    asking = (query[0] * scaling).reshape(kv_heads, -1, width)
    scores = torch.bmm(asking, key[0].transpose(1, 2))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    by_head = scores.view(kv_heads, -1, n, keys)
    if isinstance(mask, str):
        later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
        by_head[..., keys - n :].masked_fill_(later, float("-inf"))
    elif mask is not None:
        by_head.masked_fill_(~(mask if mask.dim() == 2 else mask[:, None]), float("-inf"))
    weights = with_sinks(by_head.reshape(q_heads, n, keys), sinks).reshape(scores.shape)
    if sums is not None:
        sums.add_(weights.sum(1), alpha=kv_heads / q_heads)
    return torch.bmm(weights.to(value.dtype), value[0]).view(1, q_heads, n, -1)
