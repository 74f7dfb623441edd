"""Rotary embeddings whose frequencies depend on how long a prompt is, held to one length.

LongRoPE (arXiv:2402.13753) and dynamic NTK. transformers looks at the positions of each forward pass alone: a prompt that is read
in stretches would have its first ones turned by one set of frequencies and its later ones by another, and keys are cached as they
were turned. So the length is told beforehand, and each pass sees its last position besides its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Stretching:
    """The rotary modules of a network that depend on length, and the length that they are held to."""

    def __init__(self, network: Any, length: int) -> None:
        self.length = length
        self._seen: dict[tuple[int, str], int] = {}  # what each module was last called with
        self._modules = [module for module in network.modules() if _stretches(module)]
        for module in self._modules:
            module.register_forward_pre_hook(self._with_last, with_kwargs=True)
            module.register_forward_hook(_without_last)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._modules)

    def _with_last(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        positions: Tensor = given["position_ids"]
        last = positions.new_full((*positions.shape[:-1], 1), self.length - 1)
        key = (id(module), str(given.get("layer_type")))
        if self._seen.get(key, self.length) != self.length:
            # Dynamic frequencies never shrink from one length to another, but begin anew with a short one.
            module.forward(**{**given, "position_ids": torch.zeros_like(last)})
        self._seen[key] = self.length
        return (), {**given, "position_ids": torch.cat([positions, last], -1)}


def _stretches(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named)


def _without_last(module: Any, args: Any, output: Any) -> Any:
    """Angles [batch, tokens, …] without those of the last position, which was not asked for."""
    return output[:, :-1] if isinstance(output, Tensor) else tuple(angles[:, :-1] for angles in output)
