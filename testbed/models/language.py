"""A language model that takes and gives KV caches: prefill, greedy decoding, likelihood.

model = load_model("smollm2-135m")  # from models/loading.py
prefix = model.prefill(model.tokenize(task.prefix, start=True), None)
context = model.prefill(model.tokenize(text), prefix.cache)
ids = model.generate(model.tokenize(question), join(prefix.cache, context.cache), 32, stop="\\n")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from testbed.errors import NotFiniteError, UsageError
from testbed.models import attention as _attention
from testbed.models import kvcache as _kvcache
from testbed.models import supported
from testbed.models.answer import Answer
from testbed.models.arriving import Past
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.likelihood import log_probabilities, mean_nll
from testbed.models.live import LayerShape, LiveCache, LivePass
from testbed.models.prefill import BlockPrefill, OnLayer, Prefill, drops_tokens
from testbed.models.rotary import Rotation, Rotations
from testbed.models.shrinking import Wanted, decoder_layers, shrinking
from testbed.models.stretching import Stretching
from testbed.models.together import Together, unable
from testbed.models.tokens import Tokens, chat_template
from testbed.models.trail import Trail

#: What architectures call the projection behind their attention.
_PROJECTIONS = ("o_proj", "dense", "out_proj")


class LanguageModel:
    """A model with its tokenizer. Instances are independent; one is for one thread at a time."""

    stands_in = False  #: whether it is a shape alone (`shape.ShapeModel`), whose answers mean nothing

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: tokenizers.Tokenizer,
        end: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self._network = network
        self._tokens = Tokens(tokenizer, _listed(network.generation_config.eos_token_id, end))
        self.device: torch.device = network.device
        self.dtype: torch.dtype = network.dtype
        half = torch.float16 if self.dtype == torch.float32 else self.dtype
        self.cache_dtype: torch.dtype = half if cache_dtype is None else cache_dtype
        config = network.config.get_text_config(decoder=True)
        self._sources = supported.sources(config)
        #: Of layers with keys and values of their own: others attend to those.
        self.num_layers: int = config.num_hidden_layers - len(self._sources)
        self.max_positions: int = getattr(config, "max_position_embeddings", None) or 2**31
        self._stretching = Stretching(network, self.max_positions)
        self._layers, self._drops = decoder_layers(network, config.num_hidden_layers), True
        self.shapes = self._probe(config)
        self.kv_heads: int = self.shapes[0].kv_heads
        self.head_dim: int = self.shapes[0].head_dim
        #: Size of a token's keys and values in a two-byte format, all layers.
        self.kv_bytes_per_token: int = sum(s.kv_heads * (s.head_dim + s.value_dim) * 2 for s in self.shapes)
        #: Modules that make keys and values out of what their layer caches, where that is a latent (MLA).
        self._latent: dict[int, Any] = {
            module.layer_idx: module for module in network.modules() if hasattr(module, "expand_kv")
        }
        self._rotations = self._found_rotations()
        self._drops = drops_tokens(partial(self.blocks, past=None), config.num_hidden_layers)

    def _probe(self, config: Any) -> list[LayerShape]:
        """Run one token and see what each layer's attention does, instead of trusting names in configs."""
        live = self._live(None, 1)
        unsupported = f"model {self.name!r}: architecture {config.model_type!r} is not supported"
        if why := supported.refusal(self._network.config):
            raise UsageError(f"{unsupported}: {why}")
        own_code = not getattr(self._network, "_supports_attention_backend", True)
        try:
            _, run = self._forward(live, [0], queries=1)
        except (NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{unsupported}: {_attention.OWN_CODE if own_code else error}") from error
        if set(run.told) != set(range(config.num_hidden_layers)) or live.written != [1] * self.num_layers:
            why = "not every layer attends to keys and values of its own"
            raise UsageError(f"{unsupported}: {_attention.OWN_CODE if own_code else why}")
        shapes = []
        for index in range(self.num_layers):
            keys, values = live.held(index)
            scaling, softcap, window, sinks = run.told[index]
            window, sinks = None if not window else int(window), None if sinks is None else sinks.detach()
            sizes = keys.shape[1], keys.shape[3], values.shape[3]
            shapes.append(LayerShape(*sizes, scaling, softcap, window, sinks))
        return shapes

    @property
    def vocabulary(self) -> int:
        """How many tokens texts are made of: as the tokenizer numbers them, since models of one tokenizer may have tables of
        embeddings of several lengths."""
        return min(self._tokens.count, self._network.config.get_text_config(decoder=True).vocab_size)

    @property
    def tokenizer(self) -> str:
        """Equal for models whose token numbers mean the same (see `Tokens.digest`)."""
        return self._tokens.digest

    @property
    def stretches(self) -> bool:
        """Whether a prompt's length decides how its keys are turned (LongRoPE, dynamic NTK)."""
        return bool(self._stretching)

    def expect(self, length: int | None) -> None:
        """Turn keys as prompts of `length` tokens, answer included, want it; None: as the model's longest, which is the default.

        Where the model `stretches`, longer prompts are refused from now on, and caches made under another length do not fit.
        """
        length = self.max_positions if length is None else min(length, self.max_positions)
        if self.stretches and length != self._stretching.length:
            self._stretching.length = length
            self._rotations = self._found_rotations()

    def _found_rotations(self) -> Rotations:
        return Rotations(self.name, self._network, self.num_layers, self._queries_at, self._longest)

    @property
    def _longest(self) -> int:
        return self._stretching.length if self.stretches else self.max_positions

    def scaling(self, layer: int) -> float:
        """What the layer's attention multiplies its scores with."""
        return self.shapes[layer].scaling

    def softcap(self, layer: int) -> float | None:
        """What the layer's attention caps its scores at; None: nothing."""
        return self.shapes[layer].softcap

    def sinks(self, layer: int) -> Tensor | None:
        """The scores of the layer's sinks, [q_heads] (see `attention.with_sinks`); None: it has none."""
        return self.shapes[layer].sinks

    def window(self, layer: int) -> int | None:
        """The layer's sliding-window length; None: it sees everything."""
        return self.shapes[layer].window

    def knowing_ropes(self, cache: KVCache, first: int = 0) -> KVCache:
        """The cache with each layer's rotary embedding told. first: which layer its first one is. Raises UsageError where no
        plain numbers describe it."""
        ropes = self._rotations.ropes(self._latent)[first : first + len(cache.layers)]
        layers = [replace(layer, rope=rope) for layer, rope in zip(cache.layers, ropes, strict=True)]
        return KVCache(layers, cache.length)

    @torch.inference_mode()
    def attended(self, layer: int, held: KVLayer) -> tuple[Tensor, Tensor]:
        """The keys and values that attention makes of a cached layer: [heads, tokens, dim] each, float32.

        What is cached, in nearly all models; where a latent and a rotary key are cached (MLA), those of every head.
        """
        if layer not in self._latent:
            return held.keys.float(), held.values.float()
        latent, rotary = (tensor[None].to(self.device, self.dtype) for tensor in (held.keys, held.values))
        keys, values = self._latent[layer].expand_kv(latent, rotary)
        return keys[0].float().clone(), values[0].float().clone()

    def rotation(self, layer: int) -> Rotation:
        """The layer's rotary position embedding. Raises UsageError where it is of a kind that cannot be undone."""
        return self._rotations.of(layer)

    def projection(self, layer: int) -> Tensor:
        """What the layer multiplies its heads' values with: float32 [hidden, q_heads · value_dim], q_heads one after the other.

        Raises UsageError where its attention has no such weight of a name that is known.
        """
        for module in self._network.modules():
            if getattr(module, "layer_idx", None) != layer:
                continue
            for name in _PROJECTIONS:
                weight = getattr(getattr(module, name, None), "weight", None)
                if weight is not None and weight.dim() == 2 and weight.is_floating_point():
                    return weight.detach().float()
        raise UsageError(
            f"model {self.name!r}: layer {layer} has no output projection by a name that is known"
        )

    def _queries_at(self, position: int) -> dict[int, Tensor]:
        """Each layer's query of a lone token at a position."""
        live = self._live(None, 1)
        live.start = live.length = position
        # Not the token of padding, whose embedding is zero and tells nothing.
        token = 1 if self._network.config.get_text_config(decoder=True).pad_token_id == 0 else 0
        _, run = self._forward(live, [token], queries=1)
        return run.queries

    def tokenize(self, text: str, start: bool = False, closing: str = "") -> list[int]:
        """Token ids of a text, which is data: special tokens that are written in it are read as any other text.

        start: with the token that opens a prompt, where the model has one (Gemma does), and with the special tokens of a chat's
        layout; for the prefix. closing: what the layout has behind a question (`Prompted.closing`).
        """
        return self._tokens.encode(text, start, closing)

    def text(self, ids: Sequence[int], stop: str | None = None) -> str:
        """The text of token ids, without special tokens; with `stop`, only what is before it."""
        return self._tokens.decode(ids, stop)

    def chat_template(self) -> Callable[[list[dict[str, str]]], str] | None:
        """How the model's chat turns are written as a prompt (see `chat_template`); None: it has no template."""

        location = self._network.name_or_path
        return chat_template(location, local=Path(location).is_dir())

    join = staticmethod(_kvcache.join)

    def _live(self, past: Past | None, capacity: int) -> LiveCache:
        if past is not None and len(past.layers) != self.num_layers:
            raise ValueError(f"a cache of {len(past.layers)} layers for a model of {self.num_layers}")
        return LiveCache(
            past,
            capacity,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            device=self.device,
            layers=self.num_layers,
            sources=self._sources,
        )

    def _check_length(self, past: Past | None, new: int) -> int:
        length = past.length if past is not None else 0
        if length + new > self._longest:
            which = "takes" if self._longest == self.max_positions else "was told to expect"
            raise UsageError(
                f"a prompt of {length + new} tokens is too long for model {self.name!r}, "
                f"which {which} {self._longest}"
            )
        return length

    @torch.inference_mode()
    def _forward(
        self,
        live: LiveCache,
        ids: Sequence[int],
        *,
        queries: int | None = 0,
        attention: bool = False,
        keep: int = 1,
        wanted: Wanted | None = None,
    ) -> tuple[Tensor, LivePass]:
        """Run ids behind what `live` holds; returns the last `keep` tokens' logits, [keep, vocabulary].

        wanted: of how many of them, as `shrinking` has it. Raises NotFiniteError where the logits are not all numbers.
        """
        run = LivePass(live, len(ids), queries, attention)
        positions = torch.arange(live.length, live.length + len(ids), device=self.device)
        cut = nullcontext() if wanted is None else shrinking(self._layers, run, wanted, self._drops)
        with _attention.running(run), cut:
            output = self._network(
                input_ids=torch.tensor([list(ids)], device=self.device),
                position_ids=positions[None],
                past_key_values=live,
                use_cache=True,
                logits_to_keep=keep,
            )
        live.length += run.tokens
        if run.tokens < len(ids):
            live.rewind(live.length - live.start)
        logits = output.logits[0]
        if not bool(logits.isfinite().all()):
            raise NotFiniteError(self._not_finite(live))
        return logits, run

    def _not_finite(self, live: LiveCache) -> str:
        """Why a pass left NaN or infinity, and what helps."""
        if (layer := live.first_not_finite(past=True)) is not None:
            return f"the cache given to model {self.name!r} holds NaN or infinity in layer {layer}"
        layer = live.first_not_finite(past=False)
        where = "in its logits" if layer is None else f"from layer {layer} on"
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            return f"model {self.name!r} gives NaN or infinity in {dtype} {where}; its weights may be damaged"
        wider = "bfloat16 or float32" if self.dtype == torch.float16 else "float32"
        return f"model {self.name!r} overflows in {dtype} {where}; use dtype={wider}"

    def prefill(
        self,
        ids: Sequence[int],
        past: Past | None,
        queries: int | None = 0,
        attention: bool = False,
        inputs: bool = False,
        on_layer: OnLayer | None = None,
    ) -> Prefill:
        """Run ids behind `past` (None: from the start) and give the KV cache of these ids alone.

        queries: how many of the last tokens' queries to keep; None: all. attention: sum up what they pay to each other.
        inputs: keep what attention modules are given. on_layer: is given each layer of the cache, a copy, as soon as it is final.
        Raises UsageError past the model's length, NotFiniteError where the cache or the logits are not all numbers (`on_layer`
        may have been given some of these).
        """
        return self.blocks(ids, past, queries, attention, inputs).finish(on_layer)

    def blocks(
        self,
        ids: Sequence[int],
        past: Past | None,
        queries: int | None = 0,
        attention: bool = False,
        inputs: bool = False,
    ) -> BlockPrefill:
        """A `prefill` that goes on block by block: `run(stop)` gives each block's cache, `finish()` what `prefill` gives."""
        self._check_length(past, len(ids))
        live = self._live(past, len(ids))
        return BlockPrefill(
            ids, live, self._forward_finite, self._network, self.shapes, queries, attention, inputs
        )

    def _forward_finite(
        self,
        live: LiveCache,
        ids: Sequence[int],
        *,
        queries: int,
        attention: bool,
        wanted: Wanted | None,
    ) -> tuple[Tensor, LivePass]:
        """As `_forward`; raises NotFiniteError of keys and values, too."""
        logits, run = self._forward(live, ids, queries=queries, attention=attention, wanted=wanted)
        if live.first_not_finite(past=False, last=run.tokens) is not None:
            raise NotFiniteError(self._not_finite(live))  # behind a window, the last token sees none of it
        return logits, run

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
        """Decode greedily behind `past` and `ids` (at least one).

        Ends before an end token or the `stop` text, after `max_new_tokens`, or at the model's length.

        A token that holds text before `stop` and the stop itself is the last one returned; `text(ids, stop)`
        cuts it. Where the stop spans tokens, those with its beginning have been returned when its end comes.
        `on_token(index, id)` is called with each token that will be returned, as soon as it is known.

        draft: what the answer may be. It is read in one pass with `ids`, and holds as far as it is what is decoded here; from the
        first token that is another one, decoding goes on token by token. trail: is told of the passes, where there is no draft.
        """
        answer, live = self._opened(ids, past, max_new_tokens, stop)
        read = list(draft[: max(0, answer.limit - 1)])
        feed, keep = [*ids, *read], len(read) + 1
        ahead: list[int] = []  #: the likeliest tokens behind what was read, the last one first
        goes_on = answer.limit > 0
        while goes_on:
            if not ahead:
                logits, _ = self._forward(live, feed, keep=keep)
                ahead, keep = logits.argmax(-1).tolist()[::-1], 1
                if trail is not None and not draft:
                    trail.add(live, feed, logits)
            token, count = ahead.pop(), len(answer.tokens)
            goes_on = answer.take(token)
            if on_token is not None and len(answer.tokens) > count:
                on_token(count, token)
            if ahead and goes_on and token != read[count]:  # what was read from there on does not follow
                live.rewind(len(ids) + count)
                ahead = []
            feed = [token]
        return answer.tokens

    def _opened(
        self, ids: Sequence[int], past: Past | None, max_new_tokens: int, stop: str | None
    ) -> tuple[Answer, LiveCache]:
        """An answer behind `past` and `ids` that has no token yet, and the cache that these will be read into."""
        if not ids:
            raise ValueError("an answer needs at least one token to start from")
        length = self._check_length(past, len(ids))
        limit = min(max_new_tokens, self._longest - length - len(ids) + 1)
        return Answer(self._tokens.ends, stop, limit, self.text), self._live(past, len(ids) + max(limit, 0))

    def _begun(
        self, ids: Sequence[int], past: Past | None, max_new_tokens: int, stop: str | None
    ) -> tuple[Answer, LiveCache, int | None]:
        """The same with `ids` read, and the first token; None where it may have none."""
        answer, live = self._opened(ids, past, max_new_tokens, stop)
        if answer.limit <= 0:
            return answer, live, None
        logits, _ = self._forward(live, ids)
        return answer, live, int(logits[-1].argmax())

    @cached_property
    def _unable(self) -> str:
        return unable(self._begun, self._forward, self._network)

    def together(self) -> Together:
        """Several requests, decoded at once. Raises UsageError where the architecture cannot make one pass of them."""
        if self._unable:
            kind = self._network.config.get_text_config(decoder=True).model_type
            raise UsageError(
                f"model {self.name!r}: architecture {kind!r} does not decode several requests at once: {self._unable}"
            )
        return Together(self._begun, self._network)

    def likelihood(
        self,
        ids_question: Sequence[int],
        ids_answer: Sequence[int],
        past: Past | None,
        trail: Trail | None = None,
    ) -> Tensor:
        """Log-probabilities in nats of what may follow, at each token of the answer and behind the true ones.

        float32 [answer tokens, vocabulary]. trail: of an answer to this question, behind this past: the passes that were made for
        it are not made again, and the outcome differs by rounding. Raises ValueError where question or answer have no tokens.
        """
        if not ids_question or not ids_answer:
            raise ValueError("a likelihood needs tokens of a question and of an answer")
        ids = [*ids_question, *ids_answer[:-1]]
        self._check_length(past, len(ids))
        if trail:
            return log_probabilities(trail.along(ids_answer, self._logits))
        return log_probabilities(self._logits(self._live(past, len(ids)), ids, len(ids_answer)))

    def _logits(self, live: LiveCache, ids: Sequence[int], keep: int) -> Tensor:
        return self._forward(live, ids, keep=keep)[0]

    def nll(self, ids_question: Sequence[int], ids_answer: Sequence[int], past: Past | None) -> float:
        """Mean negative log-likelihood in nats of the answer's tokens, each behind the true ones."""
        return mean_nll(self.likelihood(ids_question, ids_answer, past), ids_answer)

    def likelihoods(
        self, ids_question: Sequence[int], answers: Sequence[Sequence[int]], past: Past | None
    ) -> list[Tensor]:
        """`likelihood` of several answers behind one question, which is read once.

        Raises ValueError where the question or an answer has no tokens, or where there is no answer.
        """
        if not ids_question or not answers or not all(answers):
            raise ValueError("likelihoods need tokens of a question and of every answer")
        longest = max(map(len, answers))
        self._check_length(past, len(ids_question) + longest)
        live = self._live(past, len(ids_question) + longest)
        first, _ = self._forward(live, ids_question)
        found = []
        for answer in answers:
            logits, taught = first, list(answer[:-1])
            if taught:
                behind, _ = self._forward(live, taught, keep=len(taught))
                live.rewind(len(ids_question))
                logits = torch.cat([first, behind])
            found.append(log_probabilities(logits))
        return found

    def option_nlls(
        self, ids_question: Sequence[int], options: Sequence[Sequence[int]], past: Past | None
    ) -> list[float]:
        """Mean negative log-likelihood in nats a token of each option behind the question, which is read once.

        Raises ValueError where the question or an option has no tokens.
        """
        found = self.likelihoods(ids_question, options, past)
        return [mean_nll(one, option) for one, option in zip(found, options, strict=True)]


def _listed(ends: int | list[int] | None, end: int | None) -> list[int]:
    """The tokens that end a text: what the model says, and what the tokenizer says."""
    return [int(e) for e in (*(ends if isinstance(ends, list) else [ends]), end) if e is not None]
