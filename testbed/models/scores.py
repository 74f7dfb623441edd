"""The attention that each key gets from some queries, for the selectors that rank tokens by it.

Queries are as `attention` handed them over: rotary position, norms and scaling as the model applies them. The module
imports without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from testbed.models.attention import BLOCK, visible, with_sinks

if TYPE_CHECKING:
    from torch import Tensor


def attention_blocks(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    key_positions: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
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
        seen = visible(query_positions[start:stop], key_positions, window)
        if seen.dim() == 3:
            seen = seen.repeat_interleave(group, 0)
        probabilities = with_sinks(scores.masked_fill_(~seen, float("-inf")), sinks)
        if not bool(seen.any(-1).all()):
            # Those rows alone: NaN of another origin has to be seen.
            probabilities = probabilities.masked_fill_(~seen.any(-1, keepdim=True), 0.0)
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
    sinks: Tensor | None = None,
    block: int = BLOCK,
    weights: Tensor | None = None,
) -> Tensor:
    """Attention that each key gets, summed over the queries and averaged over the query heads of its group.

    Arguments as of `attention_blocks`; weights: [n], by which each query counts. Returns float32 [kv_heads, tokens]; the softmax
    is over all keys given.
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
            sinks=sinks,
            block=block,
        )
        for _, _, probabilities in blocks:
            if weights is not None:
                probabilities = probabilities * weights[start : start + block, None].to(keys.device)
            total[:, :end] += probabilities.sum(1)
    return total.reshape(keys.shape[0], -1, keys.shape[1]).mean(1)
