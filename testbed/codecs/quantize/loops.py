"""Who quantizes all parts of a cache at once: compiled loops on the processor, Triton's kernels on a GPU, or nobody."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from testbed.codecs.fast.batch import Table


class Loops(Protocol):
    """Quantizes and packs, and the reverse, the parts that a `batch.Table` describes. dtype: "float16" or "bfloat16"."""

    def takes(self, dtype: str, row: Sequence[int]) -> bool:
        """Whether a part of these settings, `batch.row_of`, is for these loops."""
        ...

    def encode(self, dtype: str, table: Table) -> npt.NDArray[np.float32]:
        """Values -> symbols and side information; each part's largest step, NaN or infinite where it cannot be quantized."""
        ...

    def decode(self, dtype: str, table: Table) -> npt.NDArray[np.bool_]:
        """Symbols and side information -> values; whether each part could be decoded."""
        ...


class OnProcessor:
    """The loops of `batch`."""

    def takes(self, dtype: str, row: Sequence[int]) -> bool:
        return True

    def encode(self, dtype: str, table: Table) -> npt.NDArray[np.float32]:
        from testbed.codecs.fast import batch

        worst = np.empty(len(table), dtype=np.float32)
        batch.ENCODE[dtype](table, worst)
        return worst

    def decode(self, dtype: str, table: Table) -> npt.NDArray[np.bool_]:
        from testbed.codecs.fast import batch

        fits = np.empty(len(table), dtype=np.float32)
        batch.DECODE[dtype](table, fits)
        return fits != 0


@functools.cache
def loops_for(device: torch.device) -> Loops | None:
    """The loops for tensors on that device; None where there are none, and torch works part by part."""
    if device.type == "cpu":
        return OnProcessor()
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from testbed.codecs.quantize.batch_triton import OnGPU

        return OnGPU(device)
    return None
