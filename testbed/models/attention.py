"""Attention over caches whose layers and heads may hold different tokens, and the scores selectors ask for.

The backend is registered with transformers under `BACKEND`. It sees queries and keys as the model made them
(rotary position, norms and scaling applied), whatever the architecture. transformers makes no mask for a
backend that it has no mask function for, so the masks here are made from absolute positions: a query at
position q sees the keys at p <= q, in a sliding-window layer those at q - window < p <= q.

What a forward pass works on travels with the call (the keyword `testbed`), so models and threads do not meet.
The module imports without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKEND = "testbed"

#: Queries handled at a time. Keys behind a block's last query are left out, which halves the work of a long
#: prefill; 256 is where torch 2.13 on two cores was fastest (1,024 tokens, 9 heads: 15 ms, one block with a
#: mask 22 ms).
BLOCK = 256


class Pass(Protocol):
    """What one forward pass attends to; `live.LivePass` is one."""

    def positions(self, layer: int) -> Tensor:
        """Absolute positions of the layer's keys, ascending, on the CPU: [tokens] or [kv_heads, tokens].

        A head that holds fewer tokens than another begins with places that no query sees, at position -1.
        """

    def masks(self) -> dict[Any, Any]:
        """A memory for the masks of this pass, since most layers share theirs."""

    def observe(
        self, layer: int, queries: Tensor, *, scaling: float, softcap: float | None, window: int | None
    ) -> None:
        """Takes the queries of a layer, [q_heads, n, head_dim], and what is done with their scores."""


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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, q_heads, n, d], key and value [1, kv_heads, tokens, d].

    The queries are those of the last n keys. Returns ([1, n, q_heads, d], None). Raises NotImplementedError
    for an architecture whose attention has terms that this one does not compute.
    """
    run: Pass | None = others.get("testbed")
    if run is None:
        raise RuntimeError(f"the attention backend {BACKEND!r} works under testbed's LanguageModel only")
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if unknown or attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError(
            f"attention with {', '.join(unknown) or 'a mask or a batch'} is not supported"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    run.observe(layer, query[0], scaling=scaling, softcap=softcap, window=sliding_window)
    output = attend(query, key, value, run.positions(layer), scaling, sliding_window, softcap, run.masks())
    return output.transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    masks: dict[Any, Any] | None = None,
) -> Tensor:
    """Causal attention of the last n keys' queries: query [1, q_heads, n, d] -> [1, q_heads, n, value_dim].

    `positions` ([tokens] or [kv_heads, tokens], on the CPU) may have gaps, but not among the last n.
    """
    import torch

    masks = {} if masks is None else masks
    new, tokens = query.shape[2], key.shape[2]
    past = tokens - new
    compute = _dot_product if softcap is None else _softcapped
    blocks = []
    for start in range(0, new, BLOCK):
        stop = min(start + BLOCK, new)
        name = (id(positions), start, stop, window)
        if name not in masks:
            masks[name] = _block_mask(positions, past + start, past + stop, window, query.device)
        first, mask = masks[name]
        keys, values = key[:, :, first : past + stop], value[:, :, first : past + stop]
        blocks.append(compute(query[:, :, start:stop], keys, values, mask, scaling, softcap))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _block_mask(
    positions: Tensor, start: int, stop: int, window: int | None, device: torch.device
) -> tuple[int, Tensor | str | None]:
    """The first key that any query of a block (keys start..stop) sees, and which keys from there each sees.

    None: all. "causal": query i sees key i and those before it. Else bool, [n, keys] or [kv_heads, n, keys].
    """
    queries = positions[..., start:stop]
    first = 0
    if window is not None:
        too_old = positions[..., :stop] <= queries[..., :1] - window
        # Keys that no head's first query sees are seen by none: later queries see less of the past.
        first = int(too_old.sum(-1).min())
        if int((queries[..., -1] - positions[..., first]).max()) < window:
            window = None
    empty = positions.dim() == 2 and bool((positions[:, first] < 0).any())
    if window is None and not empty:
        if stop - start == 1:
            return first, None
        if first == start:
            return first, "causal"
    return first, visible(queries, positions[..., first:stop], window).to(device)


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: [..., n] and [..., tokens] -> bool [..., n, tokens]."""
    queries, keys = query_positions[..., :, None], key_positions[..., None, :]
    seen = keys <= queries
    if key_positions.dim() == 2:
        seen = seen & (keys >= 0)
    return seen if window is None else seen & (keys > queries - window)


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
    _softcap: float | None,
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


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | str | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention whose scores go through softcap × tanh(score / softcap), as in Gemma 2 (arXiv:2408.00118)."""
    import torch

    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if isinstance(mask, str):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~_per_query_head(mask, query.shape[1]), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(group, 1)


def attention_blocks(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    key_positions: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    block: int = BLOCK,
) -> Iterator[tuple[int, int, Tensor]]:
    """Softmaxed attention probabilities, a block of queries at a time, so that the full matrix is never held.

    queries: [q_heads, n, d] at `query_positions` [n]; keys: [kv_heads, tokens, d] at `key_positions`
    [tokens] or [kv_heads, tokens]. Yields (start, stop, probabilities): queries start..stop, float32
    [q_heads, stop - start, tokens], over the keys that each query sees. A query that sees no key has zeros.
    Computed in float32.
    """
    import torch

    q_heads, n, _ = queries.shape
    group = q_heads // keys.shape[0]
    device = keys.device
    # [kv_heads, d, tokens], as a view where the keys are float32 already
    transposed = keys.float().transpose(1, 2)
    key_positions, query_positions = key_positions.to(device), query_positions.to(device)
    for start in range(0, n, block):
        stop = min(start + block, n)
        grouped = (
            queries[:, start:stop].to(device, torch.float32).reshape(keys.shape[0], -1, queries.shape[2])
        )
        scores = ((grouped * scaling) @ transposed).reshape(q_heads, stop - start, -1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = _per_query_head(visible(query_positions[start:stop], key_positions, window), q_heads)[0]
        probabilities = scores.masked_fill_(~seen, float("-inf")).softmax(-1)
        if not bool(seen.any(-1).all()):
            probabilities = probabilities.nan_to_num_(0.0)
        yield start, stop, probabilities.reshape(keys.shape[0] * group, stop - start, -1)


def attention_sum(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    key_positions: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Attention that each key gets, summed over the queries and averaged over the query heads of its group.

    Arguments as of `attention_blocks`. Returns float32 [kv_heads, tokens]; the softmax is over all keys
    given.
    """
    import torch

    keys = keys.float()
    total = torch.zeros(queries.shape[0], keys.shape[1], device=keys.device)
    for start in range(0, queries.shape[1], block):
        asking, at = queries[:, start : start + block], query_positions[start : start + block]
        # Keys behind the block's last query get nothing; leaving them out halves the work over a whole prompt.
        end = int((key_positions <= at.max().to(key_positions.device)).sum(-1).max())
        blocks = attention_blocks(
            asking,
            keys[:, :end],
            query_positions=at,
            key_positions=key_positions[..., :end],
            scaling=scaling,
            softcap=softcap,
            window=window,
            block=block,
        )
        for _, _, probabilities in blocks:
            total[:, :end] += probabilities.sum(1)
    return total.reshape(keys.shape[0], -1, keys.shape[1]).mean(1)
