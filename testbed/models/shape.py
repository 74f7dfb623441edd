"""A model of a true shape with stand-in values: what endpoints do with a model, without one.

Its caches are as large as the model's, and its prompts as long; bytes are real, and so are the times of coding them. What it
says means nothing: answers are of a fixed length, and there is no likelihood of anything.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from testbed.errors import Stopped, UsageError
from testbed.models import kvcache as _kvcache
from testbed.models.arriving import Past
from testbed.models.kvcache import KVCache, KVLayer, seen_from
from testbed.models.language import LanguageModel
from testbed.models.live import LayerShape
from testbed.models.prefill import BlockPrefill, OnLayer, Prefill
from testbed.models.rotary import Rotation
from testbed.models.shapes import PREFIX, Shape
from testbed.models.shrinking import Wanted
from testbed.models.trail import Trail

#: A word and the space before it, at most six letters of it: about as many tokens as a tokenizer makes of English.
_TOKEN = re.compile(r" ?\w{1,6}| ?[^\w\s]|\s", re.ASCII)
#: Stand-in values repeat after so many positions; no two layers of one cache have the same.
_PERIOD, _STEP = 509, 31
_SEED = 20_250_101


class _Row:
    """Normal values by position, [heads, positions, dim], as many as are asked for: a row that repeats, in which each layer
    begins a step further on. What is taken of it are views.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def at(self, layer: int, positions: Tensor) -> Tensor:
        """A layer's values at those positions, one behind the other."""
        if not len(positions):
            return self._values[:, :0]
        first = int(positions[0]) + _STEP * layer
        if first + len(positions) > self._values.shape[1]:
            times = 2 * (first + len(positions)) // _PERIOD + 1
            self._values = self._values[:, :_PERIOD].repeat(1, times, 1)
        return self._values[:, first : first + len(positions)]


class ShapeModel(LanguageModel):
    """Stands where a `LanguageModel` stands at the endpoints. Values follow from position, layer and head alone, so blocks of a
    context and the whole of it are alike, and both sides agree.
    """

    stands_in = True

    @staticmethod
    def join(*caches: KVCache) -> KVCache:
        """One behind the other, as long as they are and with their positions. What is joined is only ever read behind, and of
        a shape nothing reads it: the values are one, over and over, so that a replayed pass waits for no copy of megabytes.
        """
        light = [KVCache([_light(layer) for layer in cache.layers], cache.length) for cache in caches]
        joined = _kvcache.join(*light)
        for layer, before in zip(joined.layers, caches[0].layers, strict=True):
            heads, tokens = layer.kv_heads, layer.tokens
            layer.keys = before.keys.new_zeros(1, 1, 1).expand(heads, tokens, before.keys.shape[2])
            layer.values = before.values.new_zeros(1, 1, 1).expand(heads, tokens, before.values.shape[2])
        return joined

    def __init__(self, shape: Shape, device: torch.device | None = None) -> None:
        self.name = PREFIX + shape.name
        self.shape = shape
        self.device = device or torch.device("cpu")
        self.dtype = self.cache_dtype = torch.float16
        self.num_layers, self.kv_heads, self.head_dim = shape.layers, shape.kv_heads, shape.head_dim
        self.max_positions = shape.max_positions
        self.kv_bytes_per_token = shape.kv_bytes_per_token
        scaling = shape.head_dim**-0.5
        self.shapes = [
            LayerShape(shape.kv_heads, shape.head_dim, shape.value_dim, scaling, None, window)
            for window in shape.windows
        ]
        numbers = torch.Generator().manual_seed(_SEED)
        self._keys, self._values, self._queries = (
            _Row(torch.randn(heads, _PERIOD, dim, generator=numbers).half().to(self.device))
            for heads, dim in (
                (shape.kv_heads, shape.head_dim),
                (shape.kv_heads, shape.value_dim),
                (shape.heads, shape.head_dim),
            )
        )

    @property
    def stretches(self) -> bool:
        return False

    @property
    def vocabulary(self) -> int:
        return self.shape.vocabulary

    @property
    def tokenizer(self) -> str:
        """All shapes cut texts alike."""
        return PREFIX

    def tokenize(self, text: str, start: bool = False, closing: str = "") -> list[int]:
        """As many tokens as words, or pieces of six letters of them, and signs; the same piece has the same id."""
        pieces = _TOKEN.findall(text.encode("ascii", "replace").decode() + closing)
        return [zlib.crc32(piece.encode("ascii", "replace")) % self.shape.vocabulary for piece in pieces]

    def text(self, ids: Sequence[int], stop: str | None = None) -> str:
        """Nothing: an answer's tokens stand for none."""
        return ""

    def chat_template(self) -> None:
        """It has none."""

    def expect(self, length: int | None) -> None:
        """Prompts of any length look alike."""

    def scaling(self, layer: int) -> float:
        return self.shapes[layer].scaling

    def softcap(self, layer: int) -> float | None:
        return None

    def sinks(self, layer: int) -> None:
        return None

    def window(self, layer: int) -> int | None:
        return self.shapes[layer].window

    def rotation(self, layer: int) -> Rotation:
        """Halves of a head turn together, by RoFormer's frequencies: what is done to turn them back takes as long."""
        half = self.head_dim // 2
        frequencies = 10_000.0 ** (-torch.arange(half) / half)

        def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
            turned = positions[:, None].float() * frequencies.to(positions.device)
            return turned.cos(), turned.sin()

        return Rotation(angles, slice(0, half), slice(half, 2 * half), self.head_dim)

    def knowing_ropes(self, cache: KVCache, first: int = 0) -> KVCache:
        rope = self.rotation(0).rope(self.max_positions)
        return KVCache([replace(layer, rope=rope) for layer in cache.layers], cache.length)

    def attended(self, layer: int, held: KVLayer) -> tuple[Tensor, Tensor]:
        return held.keys.float(), held.values.float()

    def projection(self, layer: int) -> Tensor:
        """Each head's values as they are: what is done with it takes as long."""
        shape = self.shape
        return torch.eye(shape.heads * shape.value_dim, device=self.device)

    def blocks(
        self,
        ids: Sequence[int],
        past: Past | None,
        queries: int | None = 0,
        attention: bool = False,
        inputs: bool = False,
    ) -> BlockPrefill:
        """As `LanguageModel.blocks`, of stand-in values. Raises UsageError past the model's length, and for `inputs`."""
        if inputs:
            raise UsageError(f"model {self.name!r} is a shape: it has no hidden states to look at")
        self._check_length(past, len(ids))
        return _Blocks(self, ids, past, queries, attention)

    def values_at(self, layer: int, positions: Tensor) -> KVLayer:
        """What a layer caches of those positions, in memory of its own, as codecs find a model's."""
        window = self.shapes[layer].window
        keys, values = (
            row.at(layer, positions).clone(memory_format=torch.contiguous_format)
            for row in (self._keys, self._values)
        )
        return KVLayer(keys, values, positions, window)

    def queries_at(self, layer: int, positions: Tensor) -> Tensor:
        """A layer's queries of those positions, [heads, n, head_dim]."""
        return self._queries.at(layer, positions)

    def paid_at(self, layer: int, positions: Tensor) -> Tensor:
        """Attention that those positions are paid, float32 [kv_heads, n]: some positive number each."""
        return self._keys.at(layer, positions)[..., 0].float().exp()

    def _check_length(self, past: Past | None, new: int) -> int:
        length = past.length if past is not None else 0
        if length + new > self.max_positions:
            raise UsageError(
                f"a prompt of {length + new} tokens is too long for model {self.name!r}, which takes {self.max_positions}"
            )
        return length

    def generate(
        self,
        ids: Sequence[int],
        past: Past | None,
        max_new_tokens: int,
        stop: str | None,
        on_token: Callable[[int, int], None] | None = None,
        draft: Sequence[int] = (),
        trail: Trail | None = None,
    ) -> list[int]:
        """`max_new_tokens` tokens, as far as the model's length allows."""
        if not ids:
            raise ValueError("generate() needs at least one token to start from")
        _wait_for(past)
        room = self.max_positions - self._check_length(past, len(ids)) - len(ids) + 1
        answer = [token % self.shape.vocabulary for token in range(min(max_new_tokens, room))]
        for index, token in enumerate(answer):
            if on_token is not None:
                on_token(index, token)
        return answer

    def likelihood(
        self,
        ids_question: Sequence[int],
        ids_answer: Sequence[int],
        past: Past | None,
        trail: Trail | None = None,
    ) -> Tensor:
        """Raises UsageError: there is none."""
        raise UsageError(f"model {self.name!r} is a shape: it has no likelihood of anything")

    def likelihoods(
        self, ids_question: Sequence[int], answers: Sequence[Sequence[int]], past: Past | None
    ) -> list[Tensor]:
        """Raises UsageError: there are none."""
        raise UsageError(f"model {self.name!r} is a shape: it has no likelihood of anything")

    def option_nlls(
        self, ids_question: Sequence[int], options: Sequence[Sequence[int]], past: Past | None
    ) -> list[float]:
        """All alike: nothing is likelier than anything else."""
        _wait_for(past)
        return [0.0 for _ in options]


class _Blocks(BlockPrefill):
    """A prefill of so many tokens, block by block: all that it takes is to lay the values out."""

    def __init__(
        self,
        model: ShapeModel,
        ids: Sequence[int],
        past: Past | None,
        queries: int | None,
        attention: bool,
    ) -> None:
        self._model, self._past, self._attention = model, past, attention
        self._ids, tokens = ids, len(ids)
        first = 0 if past is None else past.length
        self._positions = torch.arange(first, first + tokens, device=model.device)
        self._queries = tokens if queries is None else min(queries, tokens)
        self.done = 0

    def run(self, stop: int, wanted: Wanted | None = None) -> KVCache:
        if not self.done < stop <= len(self._positions):
            raise ValueError(
                f"{self.done} of {len(self._positions)} tokens are prefilled; none can end at {stop}"
            )
        begun = self.done
        _wait_for(self._past)
        for _ in range(self._model.num_layers):  # as often as a pass would ask
            stop = stop if wanted is None else min(stop, wanted(True))
            if stop <= begun:
                raise Stopped("a pass was given up")
        self.done = stop
        return self._laid_out(self._positions[begun:stop])

    def finish(self, on_layer: OnLayer | None = None) -> Prefill:
        if self.done < len(self._positions):
            _wait_for(self._past)
        self.done = len(self._positions)
        model, layers = self._model, range(self._model.num_layers)
        whole = self._laid_out(self._positions)
        cache = seen_from(whole, whole.length)
        for index, layer in enumerate(cache.layers):
            if on_layer is not None:
                on_layer(index, layer)
        last = self._positions[len(self._positions) - self._queries :]
        asked = [model.queries_at(index, last) for index in layers] if self._queries else []
        paid = [model.paid_at(index, self._positions) for index in layers] if self._attention else None
        return Prefill(cache, asked, last, None, paid, ids=self._ids)

    def _laid_out(self, positions: Tensor) -> KVCache:
        """The cache of those positions, all of them in every layer."""
        layers = [self._model.values_at(index, positions) for index in range(self._model.num_layers)]
        length = int(positions[-1]) + 1 if len(positions) else self._past.length if self._past else 0
        return KVCache(layers, length)


def _light(layer: KVLayer) -> KVLayer:
    """The layer with keys and values of no elements."""
    return replace(layer, keys=layer.keys[..., :0], values=layer.values[..., :0])


def _wait_for(past: Past | None) -> None:
    """Until each layer of a past is there: a pass reads them all."""
    for _ in () if past is None else past.layers:
        pass
