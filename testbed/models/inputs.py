"""What each attention module of a forward pass is given, for those who compute from hidden states themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class AttentionInputs:
    """Of one pass of `network`, by layer: its attention module, hidden states [1, tokens, hidden], cosines and sines."""

    network: Any
    modules: dict[int, Any] = field(default_factory=dict)
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    position_embeddings: dict[int, Any] = field(default_factory=dict)


@contextmanager
def recorded(network: Any) -> Iterator[AttentionInputs]:
    """Whatever attention modules are given while this is open. Layers whose modules are called otherwise stay away."""
    inputs = AttentionInputs(network)

    def note(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
        states, embeddings = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
        if states is not None and embeddings is not None:
            inputs.modules[module.layer_idx] = module
            inputs.hidden_states[module.layer_idx] = states
            inputs.position_embeddings[module.layer_idx] = embeddings

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in network.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
