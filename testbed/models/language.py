"""A language model that takes and gives KV caches: prefill, greedy decoding, likelihood.

model = load_model("smollm2-135m")
prefix = model.prefill(model.tokenize(task.prefix, start=True), None)
context = model.prefill(model.tokenize(text), prefix.cache)
ids = model.generate(model.tokenize(question), join(prefix.cache, context.cache), 32, stop="\\n")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from testbed.errors import UsageError
from testbed.models import attention
from testbed.models import kvcache as _kvcache
from testbed.models.inputs import AttentionInputs, recorded
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.likelihood import log_probabilities, mean_nll
from testbed.models.live import LayerShape, LiveCache, LivePass
from testbed.models.rope import Rope
from testbed.models.rotary import Rotation, find_rotations
from testbed.models.sources import ModelSource, resolve


@dataclass
class Prefill:
    """What a stretch of tokens left behind."""

    cache: KVCache  #: of these tokens alone, in 16 bits, on the model's device
    queries: list[Tensor]  #: per layer [q_heads, n, head_dim] of the last n tokens; n may be 0
    query_positions: Tensor  #: int64 [n]: their absolute positions
    logits: Tensor | None  #: float32 [vocabulary] behind the last token; None where there were no tokens
    #: per layer float32 [kv_heads, tokens]: the attention that these tokens pay to each of themselves, summed over them
    #: and averaged over the query heads of a KV head (of attention's own ones, where a latent is cached)
    attention: list[Tensor] | None = None
    inputs: AttentionInputs | None = None  #: what the attention modules were given, where that was asked for


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a preset, a directory with safetensors, a converted GGUF file or a hub id.

    device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1". dtype: "auto" (float32 on a CPU, the
    weights' own on a GPU), "float32", "float16", "bfloat16". threads: of torch, for the whole process.
    cache_dtype: the format that keys and values are rounded to; None: 16 bits. Raises UsageError where the
    model cannot be had.
    """
    source = resolve(name)
    if threads is not None:
        torch.set_num_threads(threads)
    where = _device(device)
    try:
        network = _network(source, where, _dtype(dtype, where))
        tokenizer, end = _tokenizer(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model {name!r} cannot be loaded from {source.location}: {first}") from error
    return LanguageModel(source.name, network, tokenizer, end, cache_dtype)


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: use auto, cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: this machine has no CUDA device that torch can use; use cpu")
    return found


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        # transformers' own "auto": as the weights are stored. CPUs compute in 16 bits slowly, if at all.
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in known:
        raise UsageError(f"dtype {dtype!r}: use auto, {', '.join(known)}")
    return known[dtype]


def _network(source: ModelSource, device: torch.device, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    attention.register()
    network = AutoModelForCausalLM.from_pretrained(
        source.location,
        dtype=dtype,
        attn_implementation=attention.BACKEND,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=source.path is not None,
    )
    return network.to(device).eval()


def _tokenizer(source: ModelSource) -> tuple[tokenizers.Tokenizer, int | None]:
    """The tokenizer, and the token that ends a text where the tokenizer names one."""
    if source.kind in ("preset", "gguf") and source.path is not None:
        # Written by transformers, so nothing is left for it to mend; it would parse the vocabulary three times
        # (Gemma: 4.4 s instead of 1.4 s).
        return tokenizers.Tokenizer.from_file(str(source.path / "tokenizer.json")), None
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(
        source.location, trust_remote_code=False, local_files_only=source.path is not None
    )
    if not hasattr(found, "backend_tokenizer"):
        raise ValueError(f"its tokenizer ({type(found).__name__}) is not of the tokenizers library")
    return found.backend_tokenizer, found.eos_token_id


class LanguageModel:
    """A model with its tokenizer. Instances are independent; one is for one thread at a time."""

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: tokenizers.Tokenizer,
        end: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self._network, self._tokenizer = network, tokenizer
        self.device: torch.device = network.device
        self.dtype: torch.dtype = network.dtype
        half = torch.float16 if self.dtype == torch.float32 else self.dtype
        self.cache_dtype: torch.dtype = half if cache_dtype is None else cache_dtype
        config = network.config.get_text_config(decoder=True)
        self.num_layers: int = config.num_hidden_layers
        self.max_positions: int = getattr(config, "max_position_embeddings", None) or 2**31
        self.shapes = self._probe(config)
        self.kv_heads: int = self.shapes[0].kv_heads
        self.head_dim: int = self.shapes[0].head_dim
        #: Size of a token's keys and values in a two-byte format, all layers.
        self.kv_bytes_per_token: int = sum(s.kv_heads * (s.head_dim + s.value_dim) * 2 for s in self.shapes)
        self._ropes: list[Rope | None] | None = None
        #: Modules that make keys and values out of what their layer caches, where that is a latent (MLA).
        self._latent: dict[int, Any] = {
            module.layer_idx: module for module in network.modules() if hasattr(module, "expand_kv")
        }
        self._rotations: list[Rotation] | None = None
        self._start = self._start_tokens()
        self._ends = self._end_tokens(end)

    def _probe(self, config: Any) -> list[LayerShape]:
        """Run one token and see what each layer's attention does, instead of trusting names in configs."""
        live = self._live(None, 1)
        unsupported = f"model {self.name!r}: architecture {config.model_type!r} is not supported"
        strange = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if strange:
            raise UsageError(f"{unsupported}: it has layers of the kinds {', '.join(sorted(strange))}")
        try:
            _, run = self._forward(live, [0], queries=1)
        except (NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{unsupported}: {error}") from error
        if set(run.told) != set(range(self.num_layers)) or live.written != [1] * self.num_layers:
            raise UsageError(f"{unsupported}: not every layer attends to keys and values of its own")
        shapes = []
        for index in range(self.num_layers):
            keys, values = live.held(index)
            scaling, softcap, window = run.told[index]
            shapes.append(
                LayerShape(keys.shape[1], keys.shape[3], values.shape[3], scaling, softcap, window or None)
            )
        return shapes

    def _start_tokens(self) -> list[int]:
        """What the tokenizer puts before a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def _end_tokens(self, end: int | None) -> frozenset[int]:
        """The tokens that end a text: what the model says, and what the tokenizer says."""
        listed = self._network.generation_config.eos_token_id
        ends = listed if isinstance(listed, list) else [listed]
        return frozenset(int(e) for e in (*ends, end) if e is not None)

    def scaling(self, layer: int) -> float:
        """What the layer's attention multiplies its scores with."""
        return self.shapes[layer].scaling

    def softcap(self, layer: int) -> float | None:
        """What the layer's attention caps its scores at; None: nothing."""
        return self.shapes[layer].softcap

    def window(self, layer: int) -> int | None:
        """The layer's sliding-window length; None: it sees everything."""
        return self.shapes[layer].window

    def knowing_ropes(self, cache: KVCache) -> KVCache:
        """The cache with each layer's rotary embedding told, where plain numbers describe it."""
        if self._ropes is None:
            try:
                turned = [layer not in self._latent for layer in range(self.num_layers)]
                self._ropes = [
                    self.rotation(layer).rope() if turned[layer] else None for layer in range(self.num_layers)
                ]
            except UsageError:
                self._ropes = [None] * self.num_layers
        layers = [replace(layer, rope=rope) for layer, rope in zip(cache.layers, self._ropes, strict=True)]
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
        if self._rotations is None:
            try:
                self._rotations = find_rotations(self._network, self.num_layers, self._queries_at)
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"model {self.name!r}: {error}") from error
        return self._rotations[layer]

    def _queries_at(self, position: int) -> dict[int, Tensor]:
        """Each layer's query of a lone token at a position."""
        live = self._live(None, 1)
        live.start = live.length = position
        # Not the token of padding, whose embedding is zero and tells nothing.
        token = 1 if self._network.config.get_text_config(decoder=True).pad_token_id == 0 else 0
        _, run = self._forward(live, [token], queries=1)
        return run.queries

    def tokenize(self, text: str, start: bool = False) -> list[int]:
        """Token ids of a text, without special tokens.

        start: with the token that opens a prompt, where the model has one (Gemma does); for the prefix.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._start, *ids] if start else ids

    def text(self, ids: Sequence[int], stop: str | None = None) -> str:
        """The text of token ids, without special tokens; with `stop`, only what is before it."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded if not stop else decoded.partition(stop)[0]

    def chat_template(self) -> Callable[[list[dict[str, str]]], str] | None:
        """How the model's chat turns are written as a prompt (see `chat`); None: it has no template."""
        from testbed.models.chat import chat_template

        location = self._network.name_or_path
        return chat_template(location, local=Path(location).is_dir())

    join = staticmethod(_kvcache.join)

    def _live(self, past: KVCache | None, capacity: int) -> LiveCache:
        if past is not None and len(past.layers) != self.num_layers:
            raise ValueError(f"a cache of {len(past.layers)} layers for a model of {self.num_layers}")
        return LiveCache(
            past,
            capacity,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            device=self.device,
            layers=self.num_layers,
        )

    def _check_length(self, past: KVCache | None, new: int) -> int:
        length = past.length if past is not None else 0
        if length + new > self.max_positions:
            raise UsageError(
                f"a prompt of {length + new} tokens is too long for model {self.name!r}, "
                f"which takes {self.max_positions}"
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
    ) -> tuple[Tensor, LivePass]:
        """Run ids behind what `live` holds; returns the last `keep` tokens' logits, [keep, vocabulary]."""
        run = LivePass(live, len(ids), queries, attention)
        positions = torch.arange(live.length, live.length + len(ids), device=self.device)
        output = self._network(
            input_ids=torch.tensor([list(ids)], device=self.device),
            position_ids=positions[None],
            past_key_values=live,
            use_cache=True,
            logits_to_keep=keep,
            testbed=run,
        )
        live.length += len(ids)
        return output.logits[0], run

    def prefill(
        self,
        ids: Sequence[int],
        past: KVCache | None,
        queries: int | None = 0,
        attention: bool = False,
        inputs: bool = False,
    ) -> Prefill:
        """Run ids behind `past` (None: from the start) and give the KV cache of these ids alone.

        queries: how many of the last tokens' queries to keep; None: all. attention: sum up what they pay to each other.
        inputs: keep what attention modules are given.
        Raises UsageError past the model's length.
        """
        length = self._check_length(past, len(ids))
        live = self._live(past, len(ids))
        if not ids:
            return Prefill(live.export(self.shapes), [], torch.arange(0), None)
        with recorded(self._network) if inputs else nullcontext() as given:
            logits, run = self._forward(live, ids, queries=queries, attention=attention)
        kept = len(ids) if queries is None else min(queries, len(ids))
        # Copies made here are ordinary tensors; those of inference mode could not be changed in place
        # elsewhere.
        observed = [run.queries.pop(layer).clone() for layer in range(self.num_layers)] if kept else []
        positions = torch.arange(length + len(ids) - kept, length + len(ids), device=self.device)
        held = run.attention
        paid = None if held is None else [held[i][:, -len(ids) :].clone() for i in range(self.num_layers)]
        return Prefill(live.export(self.shapes), observed, positions, logits[-1].float().clone(), paid, given)

    def generate(
        self,
        ids: Sequence[int],
        past: KVCache | None,
        max_new_tokens: int,
        stop: str | None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[int]:
        """Decode greedily behind `past` and `ids` (at least one).

        Ends before an end token or the `stop` text, after `max_new_tokens`, or at the model's length.

        A token that holds text before `stop` and the stop itself is the last one returned; `text(ids, stop)`
        cuts it. Where the stop spans tokens, those with its beginning have been returned when its end comes.
        `on_token(index, id)` is called with each token that will be returned, as soon as it is known.
        """
        if not ids:
            raise ValueError("generate() needs at least one token to start from")
        length = self._check_length(past, len(ids))
        limit = min(max_new_tokens, self.max_positions - length - len(ids) + 1)
        live = self._live(past, len(ids) + max(limit, 0))
        answer: list[int] = []
        feed, before = list(ids), ""
        while len(answer) < limit:
            logits, _ = self._forward(live, feed)
            token = int(logits[-1].argmax())
            if token in self._ends:
                break
            decoded = self.text([*answer, token]) if stop else ""
            at = decoded.find(stop) if stop else -1
            if 0 <= at <= len(before):
                break
            answer.append(token)
            if on_token is not None:
                on_token(len(answer) - 1, token)
            if at >= 0:
                break
            feed, before = [token], decoded
        return answer

    def likelihood(
        self, ids_question: Sequence[int], ids_answer: Sequence[int], past: KVCache | None
    ) -> Tensor:
        """Log-probabilities in nats of what may follow, at each token of the answer and behind the true ones.

        float32 [answer tokens, vocabulary]. Raises ValueError where question or answer have no tokens.
        """
        if not ids_question or not ids_answer:
            raise ValueError("a likelihood needs tokens of a question and of an answer")
        ids = [*ids_question, *ids_answer[:-1]]
        self._check_length(past, len(ids))
        logits, _ = self._forward(self._live(past, len(ids)), ids, keep=len(ids_answer))
        return log_probabilities(logits)

    def nll(self, ids_question: Sequence[int], ids_answer: Sequence[int], past: KVCache | None) -> float:
        """Mean negative log-likelihood in nats of the answer's tokens, each behind the true ones."""
        return mean_nll(self.likelihood(ids_question, ids_answer, past), ids_answer)

    def likelihoods(
        self, ids_question: Sequence[int], answers: Sequence[Sequence[int]], past: KVCache | None
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
                live.rewind(len(taught))
                logits = torch.cat([first, behind])
            found.append(log_probabilities(logits))
        return found

    def option_nlls(
        self, ids_question: Sequence[int], options: Sequence[Sequence[int]], past: KVCache | None
    ) -> list[float]:
        """Mean negative log-likelihood in nats a token of each option behind the question, which is read once.

        Raises ValueError where the question or an option has no tokens.
        """
        found = self.likelihoods(ids_question, options, past)
        return [mean_nll(one, option) for one, option in zip(found, options, strict=True)]
