"""Several requests decoded at once: their caches side by side, one pass a token for all of them.

A request's keys and values lie at the end of its row, behind empty places where another row is longer, so that all write what is
new at one place. Positions stay each request's own, and no query sees another's row, or an empty place. Orca (Yu et al., OSDI
2022) makes passes of whoever is inside; how rows are padded is as in transformers' left-padded generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.errors import NotFiniteError
from testbed.models import attention
from testbed.models.answer import Answer
from testbed.models.arriving import Past
from testbed.models.kvcache import EMPTY, KVCache, KVLayer
from testbed.models.live import LiveCache, rounded

#: Reads a request: its answer, its cache, and its first token, where it may have any.
Begin = Callable[[Sequence[int], Past | None, int, str | None], tuple[Answer, LiveCache, int | None]]

#: Tokens that a row has room for before all rows are laid out anew.
_ROOM = 64
#: Logits of one row among others, and alone: one computation in another order of summation. Of the largest.
_ALIKE = 0.02


class SideBySide:
    """The caches of several requests, as transformers takes one: `update` writes a token of each."""

    is_compileable = False

    def __init__(self, caches: Sequence[KVCache], like: LiveCache, room: int = _ROOM) -> None:
        """like: of the same model, whose formats these have."""
        self.lengths = [cache.length for cache in caches]
        self.room, self.written = (
            room,
            0,
        )  #: tokens of each row since they were laid out, all layers' at the end of a pass
        self._dtype, self._cache_dtype, self.device = like.dtype, like.cache_dtype, like.device
        self.sources = like.sources
        self._layers = [self._laid_out(layers) for layers in zip(*(c.layers for c in caches), strict=True)]
        self._held = [[layer.tokens for layer in cache.layers] for cache in caches]
        known: list[Tensor] = []
        for index, (keys, values, positions) in enumerate(
            self._layers
        ):  # layers that are alike share their masks
            twin = next((p for p in known if p.shape == positions.shape and torch.equal(p, positions)), None)
            if twin is None:
                known.append(positions)
            else:
                self._layers[index] = keys, values, twin

    def _laid_out(self, layers: Sequence[KVLayer]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [rows, heads, places, d] and positions [rows, heads or 1, places] of a layer."""
        rows, most, heads = len(layers), max(layer.tokens for layer in layers), layers[0].kv_heads
        places = most + self.room
        keys, values = (
            torch.zeros(rows, heads, places, width, dtype=self._dtype, device=self.device)
            for width in (layers[0].keys.shape[2], layers[0].values.shape[2])
        )
        apart = any(layer.positions.dim() == 2 for layer in layers)
        positions = torch.full((rows, heads if apart else 1, places), EMPTY, device=self.device)
        for row, layer in enumerate(layers):
            place = slice(most - layer.tokens, most)
            keys[row, :, place], values[row, :, place] = layer.keys, layer.values
            positions[row, :, place] = layer.positions
            new = torch.arange(self.lengths[row], self.lengths[row] + self.room, device=self.device)
            positions[row, :, most:] = new
        return keys, values, positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The most that a row has seen, as transformers asks for it; each row's own positions are told."""
        return max(self.lengths) + self.written

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values of one token of each row, [rows, kv_heads, 1, d]; returns all up to there."""
        held_keys, held_values, positions = self._layers[layer_idx]
        place = positions.shape[2] - self.room + self.written
        for held, new in ((held_keys, keys), (held_values, values)):
            held[:, :, place : place + 1] = rounded(new, self._cache_dtype)
        return held_keys[:, :, : place + 1], held_values[:, :, : place + 1]

    def positions(self, layer: int) -> Tensor:
        """Where each key up to the token that is being written stands, [rows, heads or 1, places]."""
        whole = self._layers[layer][2]
        return whole[:, :, : whole.shape[2] - self.room + self.written + 1]

    def identity(self, layer: int) -> int:
        """Equal for layers whose positions are."""
        return id(self._layers[layer][2])

    def row(self, number: int) -> KVCache:
        """One request's cache, as views."""
        layers = []
        for (keys, values, positions), held in zip(self._layers, self._held[number], strict=True):
            end = keys.shape[2] - self.room + self.written
            place = slice(end - self.written - held, end)
            own = positions[number, :, place]
            layers.append(
                KVLayer(keys[number, :, place], values[number, :, place], own if len(own) > 1 else own[0])
            )
        return KVCache(layers, self.lengths[number] + self.written)


class TogetherPass(attention.Several):
    """A pass over a token of each row."""

    def __init__(self, cache: SideBySide) -> None:
        self._cache = cache
        self._asking = torch.tensor(cache.lengths, device=cache.device) + cache.written
        self._seen: dict[tuple[int, int | None], Tensor] = {}

    def seen(self, layer: int, window: int | None) -> Tensor:
        """Which keys each row's query sees, bool [rows, heads or 1, 1, places]."""
        layer = self._cache.sources.get(layer, layer)
        name = self._cache.identity(layer), window
        if name not in self._seen:
            keys = self._cache.positions(layer)
            asking = self._asking[:, None, None]
            seen = (keys >= 0) & (keys <= asking)
            seen = seen if window is None else seen & attention.within(asking, keys, window)
            self._seen[name] = seen[:, :, None]
        return self._seen[name]


@dataclass
class _Inside:
    """A request that is being decoded. `number`: in order of joining."""

    number: int
    answer: Answer


class Together:
    """Requests that are decoded at once by one model; `LanguageModel.together` makes it. Each is read by itself as it joins; a
    `step` makes a token for each. `answers`: every request's tokens so far, by its number, as `LanguageModel.generate` has them.
    """

    def __init__(self, begin: Begin, network: Any) -> None:
        self._begin, self._network = begin, network
        self._inside: list[_Inside] = []
        self._cache: SideBySide | None = None
        self.answers: list[list[int]] = []

    @property
    def inside(self) -> list[int]:
        """The numbers of those that are not at their ends."""
        return [each.number for each in self._inside]

    def join(self, ids: Sequence[int], past: Past | None, max_new_tokens: int, stop: str | None) -> int:
        """Read a request's `ids` (at least one) behind its `past`: its first token is known, where it has any. Returns its
        number. Raises what `LanguageModel.generate` raises."""
        answer, live, token = self._begin(ids, past, max_new_tokens, stop)
        number = len(self.answers)
        self.answers.append(answer.tokens)
        if token is not None and answer.take(token):
            others = self._rows(range(len(self._inside)))
            self._inside.append(_Inside(number, answer))
            self._like = live
            self._cache = SideBySide([*others, whole(live)], live)
        return number

    def step(self) -> list[int]:
        """Make the next token of each that is inside; returns the numbers of those that have come to their ends by it. Raises
        NotFiniteError."""
        if self._cache is None:
            return []
        if self._cache.written == self._cache.room:
            self._cache = SideBySide(self._rows(range(len(self._inside))), self._like)
        logits = behind(self._network, self._cache, [each.answer.tokens[-1] for each in self._inside])
        if not bool(logits.isfinite().all()):
            raise NotFiniteError("a pass over several requests left NaN or infinity")
        staying, ended = [], []
        for row, token in enumerate(logits.argmax(-1).tolist()):
            own = self._inside[row]
            if own.answer.take(token):
                staying.append(row)
            else:
                ended.append(own.number)
        if ended:
            rows = self._rows(staying)
            self._inside = [self._inside[row] for row in staying]
            self._cache = SideBySide(rows, self._like) if rows else None
        return ended

    def _rows(self, rows: Sequence[int]) -> list[KVCache]:
        return [] if self._cache is None else [self._cache.row(row) for row in rows]


def whole(live: LiveCache) -> KVCache:
    """All that a model's cache holds, as views: its past, and what was written."""
    layers = []
    for index in range(len(live.written)):
        keys, values = live.held(index)
        positions, past = torch.arange(live.start, live.length), live.past_positions(index)
        if past is not None:
            positions = torch.cat([past, positions.expand(*past.shape[:-1], -1)], -1)
        layers.append(KVLayer(keys[0], values[0], positions.to(live.device)))
    return KVCache(layers, live.length)


@torch.inference_mode()
def behind(network: Any, cache: SideBySide, tokens: Sequence[int]) -> Tensor:
    """The logits behind each row's token, [rows, vocabulary]."""
    positions = torch.tensor(cache.lengths, device=cache.device) + cache.written
    with attention.running(TogetherPass(cache)):
        output = network(
            input_ids=torch.tensor(tokens, device=cache.device)[:, None],
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    cache.written += 1
    logits: Tensor = output.logits[:, -1]
    return logits


def unable(begin: Begin, forward: Callable[[LiveCache, list[int]], tuple[Tensor, Any]], network: Any) -> str:
    """Why a model cannot make one pass of several requests; empty where it can. It is tried with two of unlike lengths, each of
    which has to come out as it does alone."""
    try:
        lives = [begin(ids, None, 1, None)[1] for ids in ([1, 2, 3], [2])]
        both = behind(network, SideBySide([whole(live) for live in lives], lives[0]), [3, 1])
        alone = torch.cat([forward(live, [token])[0] for live, token in zip(lives, (3, 1), strict=True)])
    except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    off = float((both - alone).abs().max())
    return "" if off <= _ALIKE * float(alone.abs().max()) else "what it makes of one depends on the others"
