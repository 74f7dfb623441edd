"""From a model's name to the model: device, number format, weights and tokenizer."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch

from testbed.errors import NotFiniteError, UsageError
from testbed.models import attention, devices
from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.shape import ShapeModel
from testbed.models.shapes import find_shape
from testbed.models.sources import ModelSource, resolve
from testbed.models.supported import refusal

#: What a model is run on before it is called loaded: a number format that it overflows in is refused then.
_PROBE = "The quick brown fox jumps over the lazy dog. " * 4


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a preset, a directory with safetensors, a converted GGUF file or a hub id; or what stands in for one by its shape.

    device: a word of `devices`. dtype: "auto" (float32 on a CPU, the
    weights' own on a GPU), "float32", "float16", "bfloat16". threads: of torch, for the whole process.
    cache_dtype: the format that keys and values are rounded to; None: 16 bits. Raises UsageError where the
    model cannot be had, or overflows in the format.
    """
    source = resolve(name)
    if threads is not None:
        torch.set_num_threads(threads)
    where = devices.find(device)
    if source.kind == "shape":
        if dtype not in ("auto", "float16"):
            raise UsageError(f"model {name!r}: dtype {dtype!r}: a shape's values are float16")
        return ShapeModel(find_shape(name), where)
    try:
        network = _network(source, where, _dtype(dtype, where))
        tokenizer, end = _tokenizer(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if error.args[:1] == (attention.BACKEND,):  # looked up among the attention classes of an architecture
            raise UsageError(
                f"model {name!r}: architecture {_config(source).model_type!r} is not supported: {attention.OWN_CODE}"
            ) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model {name!r} cannot be loaded from {source.location}: {first}") from error
    try:
        model = LanguageModel(source.name, network, tokenizer, end, cache_dtype)
        probe = model.prefill(model.tokenize(_PROBE, start=True)[: model.max_positions], None)
    except NotFiniteError as error:
        raise UsageError(str(error)) from error
    _check_cut(model, probe.cache)
    return model


def _check_cut(model: LanguageModel, cache: KVCache) -> None:
    """Raises UsageError where keys or values were cut to the largest number of the format that caches are held in."""
    largest = torch.finfo(cache.dtype).max
    for index, layer in enumerate(cache.layers):
        if any(part.numel() and float(part.abs().max()) >= largest for part in (layer.keys, layer.values)):
            held = str(cache.dtype).removeprefix("torch.")
            raise UsageError(
                f"model {model.name!r}: keys or values of layer {index} lie beyond {held}, which its caches are held in; "
                "use dtype=bfloat16"
            )


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
    config = _config(source)
    if why := refusal(config):  # before the weights are fetched
        raise UsageError(f"model {source.name!r}: architecture {config.model_type!r} is not supported: {why}")
    network = AutoModelForCausalLM.from_pretrained(
        source.location,
        dtype=dtype,
        attn_implementation=attention.BACKEND,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=source.path is not None,
    )
    return network.to(device).eval()


def _config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    local = source.path is not None
    return AutoConfig.from_pretrained(source.location, trust_remote_code=False, local_files_only=local)


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
