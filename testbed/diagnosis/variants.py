"""An example's cache with some keys and values quantized, and what a model makes of it beside the full one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from testbed.codecs.diagnosed import Kind, Place
from testbed.codecs.quantize import side_of
from testbed.codecs.quantize.fp16 import FP16
from testbed.codecs.quantize.integer import INTEGERS
from testbed.codecs.quantize.mixed import coarse
from testbed.codecs.steps import Part, Quantizer
from testbed.diagnosis.choose import Outcome
from testbed.models.kvcache import KVCache, KVLayer, join
from testbed.models.language import LanguageModel
from testbed.models.likelihood import mean_kl, mean_nll
from testbed.tasks.prompt import Prompted
from testbed.tasks.task import Example


class Variants:
    """An example, prefilled once, whose context's keys and values can each be full, coarse or fine."""

    def __init__(
        self,
        model: LanguageModel,
        task: Prompted,
        example: Example,
        prefix: KVCache | None,
        bits: tuple[int, int],
        scale: str = "group",
    ):
        """bits: the coarse width and the fine one. scale: the coarse one's, as `mixed` has it."""
        self._model, self._task, self._example = model, task, example
        self._question = model.tokenize(task.question_text(example), closing=task.closing)
        self._gold = model.tokenize(task.answer_text(example))
        context = model.prefill(model.tokenize(task.context_text(example)), prefix).cache
        self._context, self._prefix = context, prefix
        self.context_tokens = max(layer.tokens for layer in context.layers)
        self._full = self._behind(context)
        self._variants = {
            width: self._behind(quantized(context, _method(width, scale if width == bits[0] else None)))
            for width in set(bits)
        }
        self._reference = model.likelihoods(self._question, [self._gold], self._full)[0]
        # The full cache's answer through what ends it: a cache along which each of its tokens comes next answers alike.
        self._answer = self._through_end(
            model.generate(self._question, self._full, task.max_new_tokens, None)
        )
        self.full = Outcome(0.0, mean_nll(self._reference, self._gold), self._score(self._answer))

    def outcome(self, widths: dict[Place, int]) -> Outcome:
        """With these keys and values quantized to these bits, and all others full."""
        return self._outcome(self._mixture(widths))

    def everywhere(self, method: Quantizer) -> Outcome:
        """With all of the context's keys and values quantized in one way."""
        return self._outcome(self._behind(quantized(self._context, method)))

    def elements(self) -> list[tuple[int, int, int]]:
        """KV heads, tokens and elements of the context's keys and values, layer by layer."""
        held = (part for layer in self._context.layers for part in (layer.keys, layer.values))
        return [(part.shape[0], part.shape[1], part.shape[2]) for part in held]

    def _behind(self, context: KVCache) -> KVCache:
        return context if self._prefix is None else join(self._prefix, context)

    def _outcome(self, past: KVCache) -> Outcome:
        wanted = [self._gold, self._answer] if self._answer else [self._gold]
        likely, *forced = self._model.likelihoods(self._question, wanted, past)
        same = forced and self._ended(self._answer) and forced[0].argmax(-1).tolist() == self._answer
        score = self.full.score if same else self._score(self._generated(past))
        return Outcome(mean_kl(self._reference, likely), mean_nll(likely, self._gold), score)

    def _mixture(self, widths: dict[Place, int]) -> KVCache:
        layers = []
        for i, full in enumerate(self._full.layers):
            keys, values = (
                self._variants[widths[kind, i]].layers[i] if (kind, i) in widths else full
                for kind in ("keys", "values")
            )
            layers.append(KVLayer(keys.keys, values.values, full.positions, full.window))
        return KVCache(layers, self._full.length)

    def _through_end(self, ids: list[int]) -> list[int]:
        return next((ids[:end] for end in range(1, len(ids)) if self._ended(ids[:end])), ids)

    def _ended(self, ids: list[int]) -> bool:
        return len(ids) >= self._task.max_new_tokens or self._task.stop in self._model.text(ids)

    def _generated(self, past: KVCache) -> list[int]:
        return self._model.generate(self._question, past, self._task.max_new_tokens, self._task.stop)

    def _score(self, ids: list[int]) -> float:
        return self._task.score(self._model.text(ids, self._task.stop), self._example)["score"]


Way = TypeVar("Way", bound=Hashable)


class Outcomes(Generic[Way]):
    """Example by example what the full cache comes to, and each of these ways."""

    def __init__(self, ways: Mapping[Way, Callable[[Variants], Outcome]]) -> None:
        self._ways = ways
        self.full: list[Outcome] = []
        self.by_way: dict[Way, list[Outcome]] = {way: [] for way in ways}

    def __len__(self) -> int:
        """How many an example takes."""
        return len(self._ways)

    def add(self, variants: Variants) -> None:
        """One more example."""
        self.full.append(variants.full)
        for way, outcome in self._ways.items():
            self.by_way[way].append(outcome(variants))


def _method(bits: int, scale: str | None) -> Quantizer:
    """The coarse integers of these scales, or (None) the fine ones; 16 bits: the values as they are."""
    if scale is not None:
        return coarse(bits, scale)
    return FP16() if bits == 16 else INTEGERS[bits]()


def quantized(cache: KVCache, method: Quantizer) -> KVCache:
    """The cache as a quantizer gives it back."""
    dtype = str(cache.dtype).removeprefix("torch.")
    layers = []
    for i, layer in enumerate(cache.layers):
        parts = []
        both: tuple[tuple[Kind, Tensor], ...] = (("keys", layer.keys), ("values", layer.values))
        for kind, values in both:
            heads, tokens, width = values.shape
            part = Part(i, kind, heads, tokens, width, dtype)
            symbols, side = method.encode(part, values)
            numbers = symbols.new_empty(0, dtype=torch.uint8) if side is None else side_of(side)
            parts.append(method.decode(part, symbols.flatten(), numbers).to(values.dtype))
        layers.append(KVLayer(parts[0], parts[1], layer.positions, layer.window))
    return KVCache(layers, cache.length)
