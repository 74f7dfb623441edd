"""Models that stand in by their shape alone: what of a model decides a cache's size. Imports no torch.

``shape:NAME`` in a scenario. The figures are those of the models' published configurations (``config.json`` of the hub's
repository), as their `source` says; parameters are as the models' cards have them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from testbed.errors import UsageError

PREFIX = "shape:"


@dataclass(frozen=True)
class Shape:
    """A model's dimensions. What is cached of a layer is [kv_heads, tokens, head_dim] keys and [kv_heads, tokens, value_dim]
    values; of a latent (MLA), one head: the latent itself, and the rotary key that all heads share.
    """

    name: str
    layers: int
    heads: int  #: that attend, in each layer
    kv_heads: int  #: that are cached
    head_dim: int
    value_dim: int
    vocabulary: int
    max_positions: int
    parameters: float
    source: str  #: the repository on the Hugging Face hub whose configuration this is
    window: int | None = None  #: of sliding-window layers
    sliding: int = 0  #: every so many layers have that window, the first among them; 0: none has

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window; None: it sees everything."""
        slides = [bool(self.sliding) and layer % self.sliding == 0 for layer in range(self.layers)]
        return tuple(self.window if each else None for each in slides)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of keys and values in 16 bits, all layers."""
        return self.layers * self.kv_heads * (self.head_dim + self.value_dim) * 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-3b", 36, 16, 2, 128, 128, 151_936, 32_768, 3.09e9, "Qwen/Qwen2.5-3B-Instruct"),
        Shape("qwen2.5-7b", 28, 28, 4, 128, 128, 152_064, 32_768, 7.62e9, "Qwen/Qwen2.5-7B-Instruct"),
        Shape("qwen2.5-14b", 48, 40, 8, 128, 128, 152_064, 32_768, 14.8e9, "Qwen/Qwen2.5-14B-Instruct"),
        Shape("yi-1.5-6b", 32, 32, 4, 128, 128, 64_000, 4_096, 6.06e9, "01-ai/Yi-1.5-6B-Chat"),
        Shape("mistral-7b-v0.3", 32, 32, 8, 128, 128, 32_768, 32_768, 7.25e9, "mistralai/Mistral-7B-Instruct-v0.3"),
        Shape("llama-3.1-8b", 32, 32, 8, 128, 128, 128_256, 131_072, 8.03e9, "meta-llama/Llama-3.1-8B-Instruct"),
        Shape("llama-3.1-70b", 80, 64, 8, 128, 128, 128_256, 131_072, 70.6e9, "meta-llama/Llama-3.1-70B-Instruct"),
        Shape("phi-3.5-mini", 32, 32, 32, 96, 96, 32_064, 131_072, 3.82e9, "microsoft/Phi-3.5-mini-instruct"),
        Shape("pythia-2.8b", 32, 32, 32, 80, 80, 50_304, 2_048, 2.78e9, "EleutherAI/pythia-2.8b"),
        Shape("gemma-2-9b", 42, 16, 8, 256, 256, 256_000, 8_192, 9.24e9, "google/gemma-2-9b-it", 4_096, 2),
        Shape("deepseek-v2-lite", 27, 16, 1, 512, 64, 102_400, 163_840, 15.7e9, "deepseek-ai/DeepSeek-V2-Lite-Chat"),
    )
}  # fmt: skip


def is_shape(model: str) -> bool:
    """Whether a model is meant by its shape alone."""
    return model.startswith(PREFIX)


def find_shape(model: str) -> Shape:
    """The shape that ``shape:NAME`` means. Raises UsageError with the remedy."""
    name = model.removeprefix(PREFIX)
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower(), SHAPES, 1)
    hint = f"did you mean {PREFIX}{near[0]}?" if near else f"there is {', '.join(SHAPES)}"
    raise UsageError(f"unknown shape {name[:60]!r}; {hint}")
