"""Seeded random rotations that any machine rebuilds from two numbers."""

from __future__ import annotations

from functools import lru_cache
from hashlib import shake_256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 256  #: dimensions that are rotated at once; more are cut into blocks, so that no matrix grows with a header's claim


def blocks(dimensions: int) -> list[slice]:
    """The stretches of a vector that are rotated by themselves."""
    return [slice(at, min(at + LARGEST, dimensions)) for at in range(0, dimensions, LARGEST)]


@lru_cache(16)
def rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix [size, size], float32: random signs, then a Hadamard transform (a cosine transform where `size`
    is no power of two), which spreads any vector's energy evenly over all coordinates.
    """
    import torch

    bits = int.from_bytes(
        shake_256(f"testbed rotation {seed} {size}".encode()).digest(-(-size // 8)), "little"
    )
    signs = torch.tensor([1.0 - 2.0 * (bits >> i & 1) for i in range(size)], dtype=torch.float64)
    if size & (size - 1) == 0:
        spread = torch.ones(1, 1, dtype=torch.float64)
        while len(spread) < size:
            spread = torch.cat([torch.cat([spread, spread], 1), torch.cat([spread, -spread], 1)])
        spread = spread / size**0.5
    else:
        k = torch.arange(size, dtype=torch.float64)
        spread = torch.cos(torch.pi / size * (k[None] + 0.5) * k[:, None]) * (2 / size) ** 0.5
        spread[0] /= 2**0.5
    return (spread * signs).float()
