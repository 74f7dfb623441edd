"""KV caches in safetensors files: any program's keys and values, in the namings that are in use, and back.

    layers.N.keys        [kv_heads, tokens, head_dim], or with a batch of one before
    layers.N.values      [kv_heads, tokens, value_dim]
    layers.N.positions   int64 [tokens] or [kv_heads, tokens]; left away: 0, 1, 2, …

Also read: `past_key_values.N.key` and `.value` or `present.N.…` (ONNX exports), `key_cache.N` and `value_cache.N` (transformers),
and all layers in one, `keys` and `values` [layers, kv_heads, tokens, head_dim].

Metadata, all optional, as text: `length`, how many tokens the model has seen; `windows`, a JSON list with each layer's
sliding-window length or null; `rope`, as ``--rope`` has it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from testbed import files
from testbed.codecs.cache_format import MOST_DIMENSIONS, MOST_HEADS, MOST_LAYERS, MOST_TOKENS
from testbed.errors import UsageError
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.rope import Rope

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_FILE = 64 << 30
_FORMAT = "testbed kv cache 1"

#: A tensor's name -> its layer and which part of it that is, by the last letters.
_NAMES = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        r"layers\.(?P<layer>\d{1,4})\.(?P<part>keys|values|positions)",
        r"(?:past_key_values|present)\.(?P<layer>\d{1,4})\.(?P<part>key|value)",
        r"(?P<part>key|value)_cache\.(?P<layer>\d{1,4})",
    )
)
_STACKED = {"keys", "values"}
_ROPE = re.compile(
    r"theta=(?P<theta>[\d.eE+]{1,20})(?:,dim=(?P<dim>\d{1,5}))?(?:,pairs=(?P<pairs>halves|neighbours))?"
)


@dataclass(frozen=True)
class Turned:
    """A plain rotary embedding: base frequency, how many of a head's elements turn (None: all), and which ones are paired."""

    theta: float
    dim: int | None = None
    pairs: str = "halves"

    @classmethod
    def parse(cls, text: str) -> Turned | None:
        """``theta=10000,dim=64,pairs=neighbours``, of which only theta is needed; ``none``. Raises UsageError."""
        if text == "none":
            return None
        found = _ROPE.fullmatch(text.replace(" ", ""))
        try:
            theta = float(found["theta"]) if found else 0.0
        except ValueError:
            theta = 0.0
        if found is None or not 1 < theta < 1e12:
            raise UsageError(
                f"rope {text[:60]!r}: write none, or theta=10000, and behind it dim=64 where not all of a head turns "
                "and pairs=neighbours where those are paired"
            )
        return cls(theta, int(found["dim"]) if found["dim"] else None, found["pairs"] or "halves")

    def rope(self, head_dim: int) -> Rope:
        """For heads of that many elements. Raises UsageError where they are too short for it."""
        dim = head_dim if self.dim is None else self.dim
        if dim % 2 or not 0 < dim <= head_dim:
            raise UsageError(f"rope: {dim} elements in pairs do not fit a head of {head_dim}")
        frequencies = tuple(self.theta ** (-2 * i / dim) for i in range(dim // 2))
        halves = self.pairs == "halves"
        first = tuple(range(dim // 2)) if halves else tuple(range(0, dim, 2))
        return Rope(frequencies, first, dim // 2 if halves else 1)


def read(path: Path, dtype: torch.dtype | None = None, rope: str | None = None) -> KVCache:
    """The cache in a file. dtype: what its numbers are rounded to; rope: in the place of what the file says.

    Nothing of a file is ever executed. Raises UsageError naming the file and what is wrong with it.
    """
    tensors, told = _tensors(path)
    try:
        return _cache(tensors, told, dtype, rope)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_payload(path: Path) -> bytes:
    """All of a file. Raises UsageError."""
    with _opened(path) as (file, size):
        return file.read(size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A file and its size. Raises UsageError where it is none, or larger than any that is read."""
    try:
        with files.open_named(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST_FILE:
                raise UsageError(f"{path}: {size} bytes; at most {LARGEST_FILE} are read")
            yield file, size
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    with _opened(path):
        try:
            with safe_open(path, framework="pt") as held:
                if len(names := list(held.keys())) <= 3 * MOST_LAYERS:
                    return {name: held.get_tensor(name) for name in names}, held.metadata() or {}
        except (SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:120]  # or torch has no such numbers
            raise UsageError(f"{path}: no file of safetensors that can be read: {why}") from None
    raise UsageError(f"{path}: {len(names)} tensors; a cache has at most {3 * MOST_LAYERS}")


def _cache(
    tensors: dict[str, Tensor], told: dict[str, str], dtype: torch.dtype | None, rope: str | None
) -> KVCache:
    import torch

    parts = _by_layer(tensors)
    windows = _windows(told.get("windows"), len(parts))
    turned = Turned.parse(told.get("rope", "none") if rope is None else rope)
    layers = []
    for index, (part, window) in enumerate(zip(parts, windows, strict=True)):
        keys, values = (_values(part[kind], f"layer {index}: {kind}", dtype) for kind in ("keys", "values"))
        positions = part.get("positions")
        if positions is None:
            positions = torch.arange(keys.shape[1])
        elif positions.dtype != torch.int64:
            raise UsageError(f"layer {index}: positions are int64 numbers, not {_name(positions)}")
        if keys.shape[:2] != values.shape[:2] or positions.shape not in (keys.shape[1:2], keys.shape[:2]):
            shapes = ", ".join(str(tuple(each.shape)) for each in (keys, values, positions))
            raise UsageError(f"layer {index}: keys, values and positions do not fit together: {shapes}")
        found = None if turned is None else turned.rope(keys.shape[2])
        layers.append(KVLayer(keys, values, positions, window, found))
    if len({layer.keys.dtype for layer in layers} | {layer.values.dtype for layer in layers}) > 1:
        raise UsageError("keys and values are in several number formats; round them to one with --dtype")
    last = max((int(layer.positions.max()) for layer in layers if layer.positions.numel()), default=-1)
    return KVCache(layers, _length(told.get("length"), last + 1))


def _by_layer(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What there is of each layer, by the names of this module's head."""
    if set(tensors) == _STACKED:
        keys, values = tensors["keys"], tensors["values"]
        if keys.dim() != 4 or values.dim() != 4 or len(keys) != len(values):
            raise UsageError("keys and values of all layers are [layers, kv_heads, tokens, head_dim] each")
        return _complete([{"keys": k, "values": v} for k, v in zip(keys, values, strict=True)])
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = next((m for pattern in _NAMES if (m := pattern.fullmatch(name))), None)
        if match is None:
            raise UsageError(
                f"tensor {name[:60]!r} is none of a cache; they are called layers.N.keys, layers.N.values and layers.N.positions "
                "(or past_key_values.N.key and .value; key_cache.N and value_cache.N; keys and values)"
            )
        part = {"key": "keys", "value": "values"}.get(match["part"], match["part"])
        if part in found.setdefault(int(match["layer"]), {}):
            raise UsageError(f"layer {match['layer']} has its {part} twice, by two names")
        found[int(match["layer"])][part] = tensor
    if sorted(found) != list(range(len(found))):
        raise UsageError(f"layers {str(sorted(found))[1:60]} are not counted from 0 without a gap")
    return _complete([found[index] for index in range(len(found))])


def _complete(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    if not 0 < len(parts) <= MOST_LAYERS:
        raise UsageError(f"{len(parts)} layers; a cache has 1 to {MOST_LAYERS}")
    for index, part in enumerate(parts):
        for kind in ("keys", "values"):
            if kind not in part:
                raise UsageError(f"layer {index} has no {kind}")
    return parts


def _values(tensor: Tensor, where: str, dtype: torch.dtype | None) -> Tensor:
    """[kv_heads, tokens, dim] in 16 bits."""
    import torch

    if tensor.dim() == 4 and len(tensor) == 1:
        tensor = tensor[0]
    limits = (MOST_HEADS, MOST_TOKENS, MOST_DIMENSIONS)
    if (
        tensor.dim() != 3
        or any(size > most for size, most in zip(tensor.shape, limits, strict=True))
        or 0 in tensor.shape[::2]
    ):
        raise UsageError(f"{where} are [kv_heads, tokens, head_dim], not {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise UsageError(f"{where} are in {_name(tensor)}, which are no numbers of a cache")
    if dtype is not None:
        rounded = tensor.to(dtype)
        if bool((rounded.isinf() & tensor.float().isfinite()).any()):
            raise UsageError(f"{where} lie beyond {_name(rounded)}; use --dtype bfloat16")
        tensor = rounded
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(
            f"{where} are in {_name(tensor)}; say with --dtype to which 16 bits they are to be rounded"
        )
    return tensor.contiguous()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _windows(text: str | None, layers: int) -> list[int | None]:
    try:
        told: list[int | None] = (
            [None] * layers if text is None else msgspec.json.decode(text, type=list[int | None])
        )
    except (msgspec.MsgspecError, ValueError, RecursionError):
        told = []
    if len(told) != layers or any(window is not None and not 1 <= window < 1 << 31 for window in told):
        raise UsageError(
            f"windows {str(text)[:60]!r}: a JSON list of a length or null for each of {layers} layers"
        )
    return told


def _length(text: str | None, least: int) -> int:
    length = least if text is None else int(text) if re.fullmatch(r"\d{1,10}", text, re.ASCII) else -1
    if not least <= length <= MOST_TOKENS:
        raise UsageError(
            f"length {str(text or length)[:20]!r}: a number from {least}, the last position and one, to {MOST_TOKENS}"
        )
    return length


def write(path: Path, cache: KVCache, more: dict[str, str] | None = None) -> None:
    """The cache as a file that `read` reads. more: further metadata. Raises StorageError."""
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        parts = {"keys": layer.keys, "values": layer.values, "positions": layer.positions}
        for kind, tensor in parts.items():
            tensors[f"layers.{index}.{kind}"] = (
                tensor.contiguous().clone() if kind == "positions" else tensor.contiguous()
            )
    windows = msgspec.json.encode([layer.window for layer in cache.layers]).decode()
    told = {"format": _FORMAT, "length": str(cache.length), "windows": windows, **(more or {})}
    files.replace(path, save(tensors, told))
