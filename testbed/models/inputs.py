"""What each attention module of a forward pass is given, for those who compute from hidden states themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from testbed.models.hooks import of_this_thread


@dataclass
class AttentionInputs:
    """Of one pass of `network`, by layer: its attention module, hidden states [1, tokens, hidden], cosines and sines
    ([1, tokens, …] each; one tensor of complex numbers in some models).
    """

    network: Any
    modules: dict[int, Any] = field(default_factory=dict)
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    position_embeddings: dict[int, Any] = field(default_factory=dict)


@contextmanager
def recorded(network: Any) -> Iterator[AttentionInputs]:
    """Whatever attention modules are given in this thread while this is open. Layers with modules called otherwise stay away."""
    inputs = AttentionInputs(network)

    def note(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
        states, embeddings = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
        if states is not None and embeddings is not None:
            inputs.modules[module.layer_idx] = module
            inputs.hidden_states[module.layer_idx] = states
            inputs.position_embeddings[module.layer_idx] = embeddings

    hooks = [
        module.register_forward_pre_hook(of_this_thread(note), with_kwargs=True)
        for module in network.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def in_turn(parts: Sequence[AttentionInputs]) -> AttentionInputs:
    """What attention modules were given in passes that went on one behind the other, as if it had been one pass."""
    if len(parts) == 1:
        return parts[0]
    states = {i: torch.cat([part.hidden_states[i] for part in parts], 1) for i in parts[0].hidden_states}
    embeddings = {i: _behind([part.position_embeddings[i] for part in parts]) for i in parts[0].modules}
    return AttentionInputs(parts[0].network, parts[0].modules, states, embeddings)


def _behind(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    return tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))
