"""`batch` on a GPU: parts that are quantized alike in one launch of Triton's `kernels`, from one table, read back once.

Nothing waits for the GPU but that reading back, which says whether every part could be quantized.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from testbed.codecs.fast import batch
from testbed.codecs.fast.batch import Table
from testbed.codecs.layout import packed_bytes
from testbed.codecs.quantize import kernels
from testbed.codecs.quantize.loops import Loops, OnProcessor

_STRETCHES = {8: 1, 4: 2, 3: 8, 2: 4}  #: stretches whose symbols share bytes, by bits
_LARGEST_GROUP = 4096
_TILE = 2048  #: elements of a stretch that a program holds; 16 a thread
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}  #: of a launch
_CHECKED_ROWS = 16
_SETTINGS = slice(batch.GROUPS, batch.OFFSET + 1)  #: of a row: what a kernel is compiled for


class OnGPU:
    """`Loops` on a GPU. The first use of a kernel compiles it, and compares it with the processor's loops on a small part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def takes(self, dtype: str, row: Sequence[int]) -> bool:
        """Groups of at most 4,096 elements, so many that they fill each stretch of the packed symbols alike."""
        groups = row[batch.ROWS] * row[batch.GROUPS]
        return (
            row[batch.SIZE] <= _LARGEST_GROUP
            and groups % _STRETCHES[row[batch.BITS]] == 0
            and _agrees(self.device, dtype, tuple(row[_SETTINGS]))
        )

    def encode(self, dtype: str, table: Table) -> npt.NDArray[np.float32]:
        return self._run(kernels.encode, dtype, table).astype(np.int32).view(np.float32)

    def decode(self, dtype: str, table: Table) -> npt.NDArray[np.bool_]:
        return self._run(kernels.decode, dtype, table) == 0

    def _run(self, kernel: Any, dtype: str, table: Table) -> npt.NDArray[np.int64]:
        """What the kernel found in each part."""
        found = np.empty(len(table), dtype=np.int64)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            for alike in _alike(table[:, _SETTINGS]):
                found[alike] = _launch(kernel, dtype, table[alike], self.device)
        return found


def _alike(settings: Table) -> Iterator[slice | npt.NDArray[np.intp]]:
    """Which parts have the same settings."""
    if (settings == settings[0]).all():
        yield slice(None)
        return
    kinds, which = np.unique(settings, axis=0, return_inverse=True)
    for kind in range(len(kinds)):
        yield np.flatnonzero(which.reshape(-1) == kind)


def _launch(kernel: Any, dtype: str, table: Table, device: torch.device) -> npt.NDArray[np.int64]:
    settings = tuple(table[0, _SETTINGS].tolist())
    constants = _constants(
        kernel is kernels.encode,
        dtype,
        settings,
        _divisor(table[:, batch.VALUES]),
        _divisor(table[:, batch.PACKED]),
    )
    rows = np.zeros((len(table), kernels.COLUMNS.value), dtype=np.int64)
    rows[:, :3] = table[:, :3]
    rows[:, 3] = table[:, batch.ROWS] * table[0, batch.GROUPS] // constants["STRETCHES"]
    # A copy from memory that is not pinned has read it when the call returns.
    given = torch.from_numpy(rows).to(device, non_blocking=True)
    grid = (-(-int(rows[:, 3].max()) // constants["BLOCK"]), len(rows))
    kernel[grid](given, **constants, **OPTIONS)
    return given.cpu().numpy()[:, 4]


def _divisor(addresses: npt.NDArray[np.int64]) -> int:
    """The largest power of two, up to 16, that divides them all."""
    together = int(np.bitwise_or.reduce(addresses)) | 16
    return together & -together


@functools.cache
def _constants(
    encode: bool, dtype: str, settings: tuple[int, ...], align: int, packed_align: int
) -> dict[str, Any]:
    """What a kernel is compiled for."""
    groups, size, bits, symmetric, levels, offset = settings
    stretches, width = _STRETCHES[bits], triton.next_power_of_2(size)
    # As `fused` computes it, in float32.
    limit = {"REACH": float(np.float32(1) + np.float32(0.49) / np.float32(levels))}
    if not encode:
        limit = {"LARGEST": torch.finfo(getattr(torch, dtype)).max}
    return {
        "HALF": dtype == "float16",
        "SYMMETRIC": bool(symmetric),
        "BITS": bits,
        "LEVELS": float(levels),
        "OFFSET": offset,
        "GROUPS": groups,
        "SIZE": size,
        "WIDTH": width,
        "BLOCK": max(1, _TILE // width // max(1, stretches // 2)),
        "ALIGN": align,
        "PACKED_ALIGN": packed_align,
        "STRETCHES": stretches,
        **limit,
    }


@functools.cache
def _agrees(device: torch.device, dtype: str, settings: tuple[int, ...]) -> bool:
    """Whether this GPU and this Triton do as the processor's loops do, bit for bit, on a part of these settings.

    Where they do not, or fail, says so once; torch then does the work.
    """
    try:
        same = all(
            torch.equal(a, b.cpu())
            for a, b in zip(
                _there_and_back(OnProcessor(), torch.device("cpu"), dtype, settings),
                _there_and_back(OnGPU(device), device, dtype, settings),
                strict=True,
            )
        )
        reason = "results differ from the processor's"
    except Exception as error:  # a compiler is missing, a GPU too old: whatever it is, there is another way
        same, reason = False, f"{type(error).__name__}: {error}"
    if not same:
        warnings.warn(f"integers on {device} go part by part: Triton's kernels: {reason}", stacklevel=2)
    return same


def _there_and_back(
    loops: Loops, device: torch.device, dtype: str, settings: tuple[int, ...]
) -> list[torch.Tensor]:
    """Scales and packed symbols of a part of any numbers, its largest step, its values decoded, and whether they could be."""
    groups, size, bits = settings[:3]
    values = _any_numbers(_CHECKED_ROWS * groups, size, dtype).to(device)
    packed = torch.zeros(packed_bytes(values.numel(), bits), dtype=torch.uint8, device=device)
    side = torch.zeros((_CHECKED_ROWS, 2, groups), dtype=torch.int16, device=device)
    addresses = [values.data_ptr(), side.data_ptr(), packed.data_ptr()]
    table = np.array([[*addresses, len(packed), _CHECKED_ROWS, *settings]], dtype=np.int64)
    worst = loops.encode(dtype, table)
    decoded = torch.zeros_like(values)
    table[:, batch.VALUES] = decoded.data_ptr()
    fits = loops.decode(dtype, table)
    return [side, packed, torch.from_numpy(worst), decoded.view(torch.int16), torch.from_numpy(fits)]


def _any_numbers(rows: int, size: int, dtype: str) -> torch.Tensor:
    """Rows of 16-bit floats: Gaussian ones of all magnitudes, then any finite bits, then zeros."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 12, (rows, 1), generator=generator)
    values = torch.randn(rows, size, generator=generator).ldexp(exponents).to(getattr(torch, dtype))
    bits = torch.randint(-(2**15), 2**15, (rows // 4, size), generator=generator).to(torch.int16)
    some = bits.view(values.dtype).nan_to_num(0.0, 0.0, 0.0)
    values[: len(some)] = some
    values[-1] = 0.0
    return values
