"""Plain attention in one go, with no cache: what every cleverer path must equal.

A whole prompt runs through transformers' model with an attention function that is the textbook formula under an
explicit mask, which may hide keys from queries layer by layer and head by head.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_current = threading.local()


def _textbook(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    heads, tokens = query.shape[1], query.shape[2]
    window = given.get("sliding_window") or tokens
    softcap = given.get("softcap")
    layer = _cached(module)
    hidden, replaced = _current.hidden[layer], _current.replaced
    chunk = module.config.attention_chunk_size if _kind(module) == "chunked_attention" else None
    if replaced is not None:
        key, value = key.clone(), value.clone()
        for held, new in zip((key[0], value[0]), replaced[layer][1:], strict=True):
            for head, positions in enumerate(replaced[layer][0].expand(len(new), -1)):
                there = positions >= 0
                held[head, positions[there]] = new[head, there]
    out = torch.empty(1, heads, tokens, value.shape[3])
    for head in range(heads):
        kv = head * key.shape[1] // heads
        scores = query[0, head].double() @ key[0, kv].double().T * given["scaling"]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        for q in range(tokens):
            for_all = torch.zeros(tokens, dtype=torch.bool)
            for_all[max(0, q - window + 1) if chunk is None else q // chunk * chunk : q + 1] = True
            seen = for_all & ~hidden[kv * len(hidden) // key.shape[1], q, :tokens]
            scores[q, ~seen] = -torch.inf
        total = scores.logsumexp(-1, keepdim=True)
        if given.get("s_aux") is not None:
            total = total.logaddexp(given["s_aux"][head].double())
        out[0, head] = ((scores - total).exp() @ value[0, kv].double()).float()
    return out.transpose(1, 2), None


def _kind(module: Any) -> str | None:
    kinds = getattr(module.config, "layer_types", None)
    return kinds[module.layer_idx] if kinds else None


def _cached(module: Any) -> int:
    """The layer whose keys and values this one attends to: its own, or the last of its kind among those that have some."""
    own = len(_current.hidden)
    if module.layer_idx < own:
        return int(module.layer_idx)
    return max(layer for layer in range(own) if module.config.layer_types[layer] == _kind(module))


def reference_network(path: Path, implementation: str = "textbook") -> Any:
    """transformers' own model of a directory, in float32."""
    import transformers

    transformers.AttentionInterface.register("textbook", _textbook)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=implementation
    ).eval()


def logits(
    network: Any,
    ids: list[int],
    hidden: list[Tensor],
    replaced: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits [tokens, vocabulary] of a prompt run whole.

    hidden[layer]: bool [kv_heads, tokens or more, tokens or more], true where a query must not see a key.
    replaced[layer]: positions [n] or [heads, n] (below 0: none), and the keys and values that stand there, [heads, n, dim].
    """
    _current.hidden, _current.replaced = hidden, replaced
    with torch.no_grad():
        return network(torch.tensor([ids]), use_cache=False).logits[0]


def nothing_hidden(layers: int, kv_heads: int, tokens: int) -> list[Tensor]:
    """Masks that hide nothing."""
    return [torch.zeros(kv_heads, tokens, tokens, dtype=torch.bool) for _ in range(layers)]


def greedy(network: Any, ids: list[int], new: int, hidden: list[Tensor], end: int) -> list[int]:
    """Greedy decoding that runs the whole prompt anew for each token."""
    answer: list[int] = []
    for _ in range(new):
        token = int(logits(network, ids + answer, hidden)[-1].argmax())
        if token == end:
            break
        answer.append(token)
    return answer
