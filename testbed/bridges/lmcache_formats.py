"""What LMCache writes itself, read without it: its naive, fp8 and CacheGen bytes, as of 0.5.6.

The first two are bare numbers, whose shape the reader knows. CacheGen's are a pickle of tensors: symbols by range coding, a table
of frequencies a channel, and the largest magnitude of each layer's tokens. Of a pickle nothing is called but what makes these.
"""

from __future__ import annotations

import collections
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from testbed.errors import PayloadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PRECISION = 16  # bits of a frequency
_MOST_SYMBOLS = 64


def read_numbers(data: bytes, shape: tuple[int, ...], stored: str, dtype: torch.dtype) -> Tensor:
    """A chunk of bare numbers: `stored` as float16 or bfloat16 (naive), float8_e4m3fn or float8_e5m2 (fp8)."""
    import torch

    kind: torch.dtype = getattr(torch, stored)
    if len(data) != torch.Size(shape).numel() * kind.itemsize:
        raise PayloadError(f"{len(data)} bytes are no chunk of {list(shape)} in {stored}")
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape).to(dtype)


@dataclass
class _Stream:
    """LMCache's CacheGenGPUBytestream."""

    bytestream: Tensor
    bytestream_lengths: Tensor  #: [2 · layers, channels]
    ntokens: int


@dataclass
class _Output:
    """LMCache's CacheGenGPUEncoderOutput."""

    data_chunks: list[_Stream]
    cdf: Tensor  #: int16 [2 · layers, channels, symbols + 1], keys' layers before values'
    max_tensors_key: Tensor  #: [layers, tokens, 1]
    max_tensors_value: Tensor
    num_heads: int
    head_size: int


def bins(layers: int) -> tuple[list[int], list[int]]:
    """How many levels keys and values of each layer have, which no byte says: LMCache's for models that it does not name."""
    if layers < 10:
        return [32] * layers, [32] * layers
    return [32] * 10 + [16] * (layers - 10), [32] * 2 + [16] * (layers - 2)


def read_cachegen(data: bytes) -> Tensor:
    """A chunk: float32 [2, layers, tokens, kv_heads · head_dim]. Raises PayloadError for what LMCache did not write."""
    import torch

    found = _unpickled(data)
    _check(found)
    layers, tokens = found.max_tensors_key.shape[:2]
    tables = found.cdf.numpy().view(np.uint16).astype(np.uint32)
    symbols = np.zeros((tables.shape[0], tokens, tables.shape[1]), dtype=np.uint8)
    at = 0
    for stream in found.data_chunks:
        ends = stream.bytestream_lengths.flatten().cumsum(0).reshape(tables.shape[:2]).numpy()
        _decoder()(tables, stream.bytestream.numpy(), ends, symbols[:, at : at + stream.ntokens])
        at += stream.ntokens
    parts = torch.from_numpy(symbols).float().unflatten(0, (2, layers))
    largest = torch.stack((found.max_tensors_key, found.max_tensors_value)).float()
    half = torch.tensor(bins(layers)).float()[:, :, None, None] // 2 - 1
    return (parts - half) / half * largest


def _check(found: _Output) -> None:
    """Raises PayloadError unless shapes fit together, and streams end where they say."""
    import torch

    cdf, keys, values = found.cdf, found.max_tensors_key, found.max_tensors_value
    lengths = [stream.bytestream_lengths for stream in found.data_chunks]
    if not (
        cdf.dim() == 3
        and cdf.dtype == torch.int16
        and 2 < cdf.shape[2] <= _MOST_SYMBOLS
        and cdf.shape[0] == 2 * len(keys)
        and cdf.shape[1] == found.num_heads * found.head_size > 0
        and keys.dim() == 3
        and keys.shape == values.shape
        and keys.shape[2] == 1
        and keys.is_floating_point()
        and values.is_floating_point()
        and sum(stream.ntokens for stream in found.data_chunks) == keys.shape[1]
        and all(stream.ntokens > 0 for stream in found.data_chunks)
        and all(
            each.shape == cdf.shape[:2] and not each.is_floating_point() and int(each.min()) >= 0
            for each in lengths
        )
        and all(
            stream.bytestream.dtype == torch.uint8 and stream.bytestream.dim() == 1
            for stream in found.data_chunks
        )
        and all(
            int(each.long().sum()) == len(stream.bytestream)
            for each, stream in zip(lengths, found.data_chunks, strict=True)
        )
    ):
        raise PayloadError("LMCache's CacheGen bytes: the parts do not fit together")


class _Unpickler(pickle.Unpickler):
    """Knows the names that CacheGen's pickles have, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        known: dict[str, Any] = {
            "CacheGenGPUEncoderOutput": _Output,
            "CacheGenGPUBytestream": _Stream,
            "OrderedDict": collections.OrderedDict,
            "_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
            "_load_from_bytes": _storage,
        }
        if name not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing of CacheGen's")
        return known[name]


def _storage(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unpickled(data: bytes) -> _Output:
    try:
        found = _Unpickler(io.BytesIO(data)).load()
        tensors = (found.cdf, found.max_tensors_key, found.max_tensors_value)
        streams = [
            tensor for each in found.data_chunks for tensor in (each.bytestream, each.bytestream_lengths)
        ]
        numbers = [found.num_heads, found.head_size, *(each.ntokens for each in found.data_chunks)]
        if not streams or not all(hasattr(tensor, "untyped_storage") for tensor in (*tensors, *streams)):
            raise TypeError("parts are no tensors")
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("sizes are no numbers")
    except Exception as error:  # a pickle may fail in any way
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise PayloadError(f"not LMCache's CacheGen bytes: {why}") from None
    result: _Output = found
    return result


@functools.cache
def _decoder() -> Callable[
    [npt.NDArray[np.uint32], npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.uint8]], None
]:
    """A range decoder. tables: [rows, channels, symbols + 1]; ends: where a channel's bytes end; symbols: [rows, n, channels]."""
    import numba

    @numba.njit(cache=True)
    def decode(tables: Any, data: Any, ends: Any, symbols: Any) -> None:
        whole = np.int64(1) << 32
        rows, tokens, channels = symbols.shape
        begin = np.int64(0)
        for row in range(rows):
            for channel in range(channels):
                end, table = np.int64(ends[row, channel]), tables[row, channel]
                last = len(table) - 2
                low, high, value = np.int64(0), whole - 1, np.int64(0)
                bit = begin * 8
                for _ in range(32):
                    value = 2 * value + (
                        np.int64(data[bit >> 3]) >> (7 - (bit & 7)) & 1 if bit < end * 8 else 0
                    )
                    bit += 1
                for token in range(tokens):
                    span = high - low + 1
                    count = ((value - low + 1) * (1 << _PRECISION) - 1) // span
                    symbol = 0
                    while symbol < last and table[symbol + 1] <= count:
                        symbol += 1
                    symbols[row, token, channel] = symbol
                    upper = np.int64(1 << _PRECISION) if symbol == last else np.int64(table[symbol + 1])
                    high = low + ((span * upper) >> _PRECISION) - 1
                    low = low + ((span * np.int64(table[symbol])) >> _PRECISION)
                    while high > low:
                        if high < whole // 2:
                            shift = np.int64(0)
                        elif low >= whole // 2:
                            shift = whole // 2
                        elif low >= whole // 4 and high < 3 * (whole // 4):
                            shift = whole // 4
                        else:
                            break
                        low, high, value = 2 * (low - shift), 2 * (high - shift) + 1, 2 * (value - shift)
                        value += np.int64(data[bit >> 3]) >> (7 - (bit & 7)) & 1 if bit < end * 8 else 0
                        bit += 1
                begin = end

    return decode
