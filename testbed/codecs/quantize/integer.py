"""Uniform quantization to eight, four, three and two bits, with a scale for each group of elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError
from testbed.codecs.quantize import divided
from testbed.codecs.steps import Grid, Part, Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Integer(Quantizer):
    """Uniform quantization: groups of `group` elements along an axis share a scale.

    axis=token: elements of one token and KV head, along head_dim. axis=channel: one channel of a KV head, along the tokens.

    symmetric:   q = round(x / s), s = max|x| / L, L = 2^(bits-1) - 1;       x̂ = q · s
    asymmetric:  q = round((x - z) / s), s = (max - min) / L, L = 2^bits - 1, z = min;  x̂ = q · s + z

    Scales and zero points are in the cache's own 16-bit format, so they cannot overflow it, and z is exact; x is divided
    by the scale that is sent, which is rounded up where 16 bits are too coarse to reach the largest element otherwise.
    So |x̂ - x| ≤ s / 2, plus half a unit in the last place for x̂'s own rounding. A group of equal elements is exact
    (asymmetric). An axis that `group` does not divide ends in a shorter group. NaN and infinity raise CodecError.
    Symbols lie as the elements do, [kv_heads, tokens, head_dim], whatever the axis.
    """

    width: ClassVar[int]

    group: int = 32
    symmetric: bool = False
    axis: Literal["token", "channel"] = "token"

    def __post_init__(self) -> None:
        self.require(
            "group", "0 (the whole axis) or from 2 to 4096", self.group == 0 or 2 <= self.group <= 4096
        )

    @property
    def by_token(self) -> bool:
        return self.axis == "token"

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self.width, self.symmetric, self.group)

    def uniform(self, part: Part) -> Grid | None:
        if self.axis != "token" or (self.group and part.head_dim % self.group):
            return None
        return self._grid if self.group else Grid(self.width, self.symmetric, part.head_dim)

    def symbol_bits(self, part: Part) -> int:
        return self.width

    def _axes(self, part: Part) -> tuple[int, int]:
        """Rows of a head that are quantized by themselves, and the elements of each: (tokens, head_dim) or the reverse."""
        by_token = self.axis == "token"
        return (part.tokens, part.head_dim) if by_token else (part.head_dim, part.tokens)

    def _turned(self, x: Tensor) -> Tensor:
        """x as [kv_heads, rows, elements], a view."""
        return x if self.axis == "token" else x.transpose(-1, -2)

    def groups(self, part: Part) -> int:
        """Groups of a row."""
        elements = self._axes(part)[1]
        return -(-elements // (self.group or max(elements, 1)))

    def side_bytes(self, part: Part) -> int:
        rows = self._axes(part)[0]
        return part.kv_heads * rows * self.groups(part) * (2 if self.symmetric else 4)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        symbols = torch.empty(part.shape, dtype=torch.uint8, device=values.device)
        if not part.elements:
            return symbols, None
        grid, dtype, uniform = self._grid, getattr(torch, part.dtype), self.uniform(part)
        if uniform is not None and values.device.type == "cpu" and values.dtype == dtype:
            return symbols, self._encode_compiled(part, uniform, values.contiguous(), symbols)
        numbers = []  # [kv_heads, rows, kinds, groups] of each stretch
        for elements, groups in self._stretches(part):
            shape = (groups.stop - groups.start, -1)
            target = self._turned(symbols.view(torch.int8))[..., elements].unflatten(-1, shape)
            x = self._turned(values)[..., elements].unflatten(-1, shape)
            try:
                q, side = _quantized(x, grid, dtype)
            except _NotFinite:
                raise self._not_finite(part) from None
            if values.dtype == torch.float32 and not self.symmetric:
                # Numbers of 16 bits cannot leave the levels: x · (1/s) is below 2^15, so float32 holds it to 2^-8.
                q.clamp_(0, grid.levels)
            target.copy_(q.add_(grid.offset) if grid.offset else q)
            numbers.append(side)
        return symbols, numbers[0] if len(numbers) == 1 else torch.cat(numbers, -1)

    def _encode_compiled(self, part: Part, grid: Grid, values: Tensor, symbols: Tensor) -> Tensor:
        """What the processor does instead: writes the symbols, returns the side information."""
        import numpy as np
        import torch

        from testbed.codecs.fast import uniform

        side = torch.empty(self.side_bytes(part), dtype=torch.uint8)
        addresses = values.data_ptr(), side.data_ptr(), symbols.data_ptr()
        table = np.array([(*addresses, *uniform.settings(grid, part))], dtype=np.int64)
        table[:, uniform.PACKED] = 8
        if not uniform.encode(part.dtype, table)[0] <= torch.finfo(values.dtype).max:  # NaN is not, either
            raise self._not_finite(part)
        return side

    def _not_finite(self, part: Part) -> CodecError:
        return CodecError(
            f"{self.name}: {part.kind} of layer {part.layer} hold NaN, infinity or too large values"
        )

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        grid, dtype = self._grid, getattr(torch, part.dtype)
        numbers = self._numbers(part, side)
        signed = symbols.view(torch.int8) if self.width == 8 else symbols
        x = signed.view(part.shape).to(torch.float32)
        if grid.offset:
            x.sub_(grid.offset)
        fits = _fits(numbers, grid.levels, dtype)
        if not fits:
            numbers.mul_(0.5)  # L · s may be beyond float32 where L · s + z is not
        rows = self._turned(x)
        for elements, groups in self._stretches(part):
            view = rows[..., elements].unflatten(-1, (groups.stop - groups.start, -1))
            view.mul_(numbers[:, :, 0, groups, None])
            if not self.symmetric:
                view.add_(numbers[:, :, 1, groups, None])
        if not fits:
            x.clamp_(-torch.finfo(dtype).max / 2, torch.finfo(dtype).max / 2).mul_(2)
        return x

    def _numbers(self, part: Part, side: Tensor) -> Tensor:
        """Scales and zero points as they were sent, [kv_heads, rows, kinds, groups] in float32."""
        import torch

        shape = (part.kv_heads, self._axes(part)[0], 1 if self.symmetric else 2, self.groups(part))
        return side.view(getattr(torch, part.dtype)).view(shape).float()

    def _stretches(self, part: Part) -> Iterator[tuple[slice, slice]]:
        """Stretches of a row in groups of equal size, and which groups those are: the full ones, the short last."""
        elements = self._axes(part)[1]
        size = self.group or max(elements, 1)
        full, rest = divmod(elements, size)
        if full:
            yield slice(0, full * size), slice(0, full)
        if rest:
            yield slice(full * size, elements), slice(full, full + 1)


@dataclass(frozen=True)
class Int8(Integer):
    """Eight bits an element, symmetric, one scale for each token and KV head (per-token quantization).

    With 255 levels the grid is finer than most of the noise, and a zero point would double the side information.
    group: elements that share a scale; 0: the whole axis. See `Integer` for the formula and the error bound.
    """

    name: ClassVar[str] = "int8"
    source: ClassVar[str] = "uniform quantization; LLM.int8() (arXiv:2208.07339) for per-token scales"
    width: ClassVar[int] = 8

    group: int = 0
    symmetric: bool = True


@dataclass(frozen=True)
class Int4(Integer):
    """Four bits an element, two to a byte, with scale and zero point for each group along head_dim.

    Asymmetric by default: keys have channels far from zero, and a symmetric grid of 15 levels leaves those on one side
    unused. 32 elements a group cost 4 + 32/32 = 5 bits an element. See `Integer` for the formula and the error bound.
    """

    name: ClassVar[str] = "int4"
    source: ClassVar[str] = "uniform quantization; FlexGen (arXiv:2303.06865) for group-wise 4-bit caches"
    width: ClassVar[int] = 4


@dataclass(frozen=True)
class Int3(Integer):
    """Three bits an element, with scale and zero point for each group along head_dim.

    Eight levels: 32 elements a group cost 3 + 32/32 = 4 bits an element. See `Integer` for the formula and the error bound.
    """

    name: ClassVar[str] = "int3"
    source: ClassVar[str] = "uniform quantization, as int4 with one bit less"
    width: ClassVar[int] = 3


@dataclass(frozen=True)
class Int2(Integer):
    """Two bits an element, four to a byte, with scale and zero point for each group along head_dim.

    Four levels, three where symmetric: 32 elements a group cost 2 + 32/32 = 3 bits an element. See `Integer` for the formula
    and the error bound.
    """

    name: ClassVar[str] = "int2"
    source: ClassVar[str] = "uniform quantization; KIVI (arXiv:2402.02750) for what two bits need"
    width: ClassVar[int] = 2


INTEGERS: dict[int, type[Integer]] = {8: Int8, 4: Int4, 3: Int3, 2: Int2}  #: by bits of a symbol


class _NotFinite(ValueError):
    """Values that are NaN or infinite, or too far apart for a scale in 16 bits."""


def _quantized(x: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [kv_heads, rows, groups, size] -> q in float32, and the side information [kv_heads, rows, kinds, groups] in `dtype`.

    The kinds are scales, and zero points where not symmetric. Raises _NotFinite.
    """
    import torch

    levels = grid.levels
    if grid.symmetric:
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


def _fits(numbers: Tensor, levels: int, dtype: torch.dtype) -> bool:
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
        raise _NotFinite
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
