"""Quantizers: from keys and values to whole numbers of a few bits, and the scales that lead back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def side_of(*tensors: Tensor) -> Tensor:
    """Side information of several kinds, as the uint8 bytes that `cut_side` reads back."""
    import torch

    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])


def cut_side(side: Tensor, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """The tensors of these shapes and formats that lie one behind the other in uint8 `side`, as views."""
    tensors, at = [], 0
    for shape, dtype in kinds:
        size = dtype.itemsize
        for length in shape:
            size *= length
        tensors.append(side[at : at + size].view(dtype).view(shape))
        at += size
    return tensors


def rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive float32 numbers in a 16-bit format, none below what it stands for."""
    import torch

    near = scale.to(dtype)
    return (near.view(torch.int16) + (near.float() < scale).to(torch.int16)).view(dtype)


def divided(x: Tensor, by: float) -> Tensor:
    """x / by, rounded alike on every device: by a plain number CUDA does not divide, but multiplies with its reciprocal."""
    return x / x.new_full((), by)


def over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in float32; 0 where the scale is."""
    wide = scale.float()
    return (x.float() / wide.masked_fill(wide == 0, 1.0)).masked_fill_(wide == 0, 0.0)
