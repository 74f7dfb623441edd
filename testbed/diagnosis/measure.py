"""Runs a model on caches of which some keys and values are quantized, and compares with the full cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from testbed.codecs.layout import Part
from testbed.codecs.quantize import Quantizer, side_of
from testbed.codecs.quantize.fp16 import FP16
from testbed.codecs.quantize.integer import INTEGERS
from testbed.codecs.quantize.protection import Kind, Place
from testbed.models.kvcache import KVCache, KVLayer, join
from testbed.models.language import LanguageModel
from testbed.models.likelihood import mean_kl, mean_nll
from testbed.tasks.prompt import Prompted
from testbed.tasks.task import Example


@dataclass(frozen=True)
class Outcome:
    """One example under one setting. kl: of the gold answer's next-token distributions from the full cache's, nats a token."""

    kl: float
    nll: float
    score: float


class Probe:
    """An example, prefilled once, whose context's keys and values can each be full, coarse or fine."""

    def __init__(
        self,
        model: LanguageModel,
        task: Prompted,
        example: Example,
        prefix: KVCache | None,
        bits: tuple[int, int],
    ):
        self._model, self._task, self._example = model, task, example
        self._question = model.tokenize(task.question_text(example))
        self._gold = model.tokenize(task.answer_text(example))
        context = model.prefill(model.tokenize(task.context_text(example)), prefix).cache
        self.context_tokens = max(layer.tokens for layer in context.layers)
        self._full = join(prefix, context) if prefix is not None else context
        self._variants = {
            width: join(prefix, made) if prefix is not None else made
            for width in set(bits)
            for made in [quantized(context, width)]
        }
        self._reference = model.likelihood(self._question, self._gold, self._full)
        self._answer = self._generated(self._full)
        self.full = Outcome(0.0, mean_nll(self._reference, self._gold), self._score(self._answer))

    def outcome(self, widths: dict[Place, int]) -> Outcome:
        """With these keys and values quantized to these bits, and all others full."""
        past = self._mixture(widths)
        found = self._model.likelihood(self._question, self._gold, past)
        return Outcome(
            mean_kl(self._reference, found), mean_nll(found, self._gold), self._scored(past, found)
        )

    def _mixture(self, widths: dict[Place, int]) -> KVCache:
        layers = []
        for i, full in enumerate(self._full.layers):
            keys, values = (
                self._variants[widths[kind, i]].layers[i] if (kind, i) in widths else full
                for kind in ("keys", "values")
            )
            layers.append(KVLayer(keys.keys, values.values, full.positions, full.window))
        return KVCache(layers, self._full.length)

    def _scored(self, past: KVCache, gold: Tensor) -> float:
        """The task's score. Greedy decoding is spared where every next token along the full cache's answer stays the same."""
        forced = gold if self._answer == self._gold else None
        if self._answer:
            if forced is None:
                forced = self._model.likelihood(self._question, self._answer, past)
            if forced.argmax(-1).tolist() == self._answer and self._ends(past):
                return self.full.score
        return self._score(self._generated(past))

    def _ends(self, past: KVCache) -> bool:
        """Whether the answer ends there: by its length, or because the next token brings what the task stops at."""
        if len(self._answer) >= self._task.max_new_tokens:
            return True
        following = self._model.generate([*self._question, *self._answer], past, 1, None)
        text = self._model.text([*self._answer, *following])
        return not following or self._task.stop in text

    def _generated(self, past: KVCache) -> list[int]:
        return self._model.generate(self._question, past, self._task.max_new_tokens, self._task.stop)

    def _score(self, ids: list[int]) -> float:
        return self._task.score(self._model.text(ids, self._task.stop), self._example)["score"]


def quantized(cache: KVCache, bits: int) -> KVCache:
    """The cache as `Integer` of that width (16: none) gives it back."""
    method: Quantizer = FP16() if bits == 16 else INTEGERS[bits]()
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


def damage(places: Iterable[Place], place: Place, bits: int) -> dict[Place, int]:
    """Only this place quantized."""
    return {place: bits}


def rescue(places: Iterable[Place], place: Place, bits: int) -> dict[Place, int]:
    """All places quantized but this one."""
    return {other: bits for other in places if other != place}
