"""The arithmetic of uniform quantization in torch, for any device and any stretch of a part; `uniform` is it compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.codecs.quantize import divided

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NotFinite(ValueError):
    """Values that are NaN or infinite, or too far apart for a scale in 16 bits."""


def quantize(x: Tensor, levels: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [kv_heads, rows, groups, size] -> q in float32, and the side information [kv_heads, rows, kinds, groups] in `dtype`.

    The kinds are scales, and zero points where not symmetric. Raises NotFinite.
    """
    import torch

    if symmetric:
        scale, inverse = _scale(divided(_largest(x), levels), levels, dtype)
        return torch.mul(x, inverse[..., None]).round_(), scale[..., None, :]
    working = x.to(torch.float32, copy=True)
    # The zero point as it is sent (which 16-bit values reach exactly); divided first: a difference may overflow.
    zero = working.amin(-1).add_(0.0).to(dtype)  # + 0: no -0
    low = zero.float()
    step = (divided(working.amax(-1), levels) - divided(low, levels)).clamp_min_(0)
    scale, inverse = _scale(step, levels, dtype)
    working.mul_(inverse[..., None]).sub_((low * inverse)[..., None]).round_()
    return working, torch.stack((scale, zero), -2)


def fits(numbers: Tensor, levels: int, dtype: torch.dtype) -> bool:
    """Whether every number on the way from q to x̂ is finite in 16 bits. numbers: side information in float32.

    A scale that was rounded up may lead past the largest number, which is then as near as x̂ can be.
    """
    import torch

    if not numbers.numel():
        return True
    largest = torch.finfo(dtype).max
    span = numbers[:, :, 0] * levels
    if numbers.shape[2] == 1:
        return float(span.amax()) <= largest
    return float((numbers[:, :, 1] + span).amax()) <= largest and float(span.amax()) <= largest


def _scale(step: Tensor, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales in 16 bits and their reciprocals in float32 (0 for a scale of 0).

    Where neighbouring numbers are far apart (bf16 beside 127 levels; fp16's subnormal numbers), a scale rounded
    down may leave round(max / scale) above the levels; then it is the next number up. None is below float32's
    smallest normal number, whose reciprocal is finite.
    """
    import torch

    format = torch.finfo(dtype)
    least, most = (float(extreme) for extreme in step.aminmax())
    if not most <= format.max:
        raise NotFinite
    if least >= format.smallest_normal and levels * format.eps / 2 < 0.45:
        scale = step.to(dtype)
        return scale, scale.float().reciprocal_()
    scale = step.clamp_min(torch.finfo(torch.float32).tiny).to(dtype)
    short = scale.float() * (1 + 0.49 / levels) < step
    scale = (scale.view(torch.int16) + short.to(torch.int16)).view(dtype)  # the next positive number
    return scale, scale.float().reciprocal_().masked_fill_(scale == 0, 0.0)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude along the last dimension, in float32; NaN where there is one."""
    import torch

    if x.dtype == torch.float32 or x.shape[-1] < 64:
        return x.to(torch.float32).abs().amax(-1)
    # Without the sign, 16-bit floats are in the order of their bits, which the processor compares ten times as fast.
    return (x.view(torch.int16) & 0x7FFF).amax(-1).view(x.dtype).float()
