"""The entropy of quantized symbols, each figure by its name: a 4-bit symbol cannot hold 7.9 bits, a byte of two can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Entropy:
    """Zeroth-order entropies: what a coder reaches that knows the frequencies, and nothing of neighbours."""

    bits_per_symbol: float  #: at most the symbols' width
    bits_per_packed_byte: float  #: of bytes as `pack` makes them, at most 8
    bits_per_element: float  #: bits_per_symbol × symbols / elements of keys or values


def entropy(symbols: Tensor, bits: int, elements: int) -> Entropy:
    """Of a part's uint8 symbols, each of `bits` bits (1 to 8), that stand for `elements` elements."""
    from testbed.codecs.entropy import pack

    flat = symbols.flatten()
    each = _entropy(flat.cpu().numpy())
    packed = _entropy(pack(flat, bits).cpu().numpy())
    return Entropy(each, packed, each * flat.numel() / max(elements, 1))


def _entropy(values: npt.NDArray[np.uint8]) -> float:
    counts = np.bincount(values, minlength=1)
    share = counts[counts > 0] / max(len(values), 1)
    return float(-(share * np.log2(share)).sum()) if len(share) else 0.0
