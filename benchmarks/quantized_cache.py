"""transformers' QuantizedCache, to stand beside our codecs: its quanto and HQQ backends on the tensors of one of our caches.

Needs the optional packages of the extra `bench` (optimum-quanto, hqq). The backends keep the cache quantized in memory; they
make no payload, no header and no checksum, and HQQ searches for its zero points.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from testbed.models.kvcache import KVCache

#: name -> the module that it needs, and settings: 4 bits in groups of 64, along the axis that the backend can take on any device.
BACKENDS: dict[str, tuple[str, dict[str, int]]] = {
    "quanto": ("optimum.quanto", {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64}),
    "hqq": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 64}),
}


def missing(backend: str) -> str:
    """Why a backend cannot be measured; empty where it can."""
    module = BACKENDS[backend][0]
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    return "" if found else f"{module} is not installed (pip install 'testbed[bench]')"


def round_trip(backend: str, cache: KVCache) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What quantizes all layers as a prefill does, and what gives all keys and values of the result back in 16 bits."""
    from transformers import LlamaConfig
    from transformers.cache_utils import QuantizedCache

    first = cache.layers[0]
    config = LlamaConfig(
        hidden_size=first.kv_heads * first.head_dim,
        num_hidden_layers=len(cache.layers),
        num_key_value_heads=first.kv_heads,
        num_attention_heads=first.kv_heads,
        head_dim=first.head_dim,
    )
    pairs = [(layer.keys[None], layer.values[None]) for layer in cache.layers]

    def encode() -> Any:
        with redirect_stdout(io.StringIO()):  # hqq greets
            made = QuantizedCache(backend, config, **BACKENDS[backend][1])
        for i, (keys, values) in enumerate(pairs):
            made.update(keys, values, i)
        return made

    def decode(made: Any) -> list[Any]:
        # What `update` does with the tokens that it holds, without the new ones and without joining them.
        return [
            layer._dequantize(part)
            for layer in made.layers
            for part in (layer._quantized_keys, layer._quantized_values)
        ]

    return encode, decode
