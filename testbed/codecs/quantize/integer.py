"""Uniform quantization to eight, four, three and two bits, with a scale for each group of elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError
from testbed.codecs.quantize import grid
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
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

    @property
    def levels(self) -> int:
        """The largest multiple of the scale."""
        return 2 ** (self.width - 1) - 1 if self.symmetric else 2**self.width - 1

    @property
    def offset(self) -> int:
        """What is added to q before it is stored: eight bits store int8, fewer store unsigned numbers."""
        if self.width == 8:
            return 0 if self.symmetric else -128
        return 2 ** (self.width - 1) if self.symmetric else 0

    def uniform(self, part: Part) -> Integer | None:
        fits = self.axis == "token" and part.head_dim % (self.group or part.head_dim) == 0
        return self if fits else None

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
        if self._fusible(part, values):
            return symbols, self._encode_fused(part, values, symbols)
        dtype = getattr(torch, part.dtype)
        numbers = []  # [kv_heads, rows, kinds, groups] of each stretch
        for elements, groups in self._stretches(part):
            shape = (groups.stop - groups.start, -1)
            target = self._turned(symbols.view(torch.int8))[..., elements].unflatten(-1, shape)
            x = self._turned(values)[..., elements].unflatten(-1, shape)
            try:
                q, side = grid.quantize(x, self.levels, self.symmetric, dtype)
            except grid.NotFinite:
                raise self._not_finite(part) from None
            if values.dtype == torch.float32 and not self.symmetric:
                # Numbers of 16 bits cannot leave the levels: x · (1/s) is below 2^15, so float32 holds it to 2^-8.
                q.clamp_(0, self.levels)
            target.copy_(q.add_(self.offset) if self.offset else q)
            numbers.append(side)
        return symbols, numbers[0] if len(numbers) == 1 else torch.cat(numbers, -1)

    def _fusible(self, part: Part, values: Tensor) -> bool:
        """Whether `uniform` takes values like these: 16 bits, on the processor, in groups of equal size that lie together."""
        import torch

        return (
            values.device.type == "cpu"
            and values.dtype == getattr(torch, part.dtype)
            and self.uniform(part) is not None
        )

    def _encode_fused(self, part: Part, values: Tensor, symbols: Tensor) -> Tensor:
        """Writes the symbols; returns the side information [rows, kinds, groups]."""
        import torch

        from testbed.codecs.fast import uniform

        rows = (part.kv_heads * part.tokens, self.groups(part), -1)
        side = torch.empty((rows[0], 1 if self.symmetric else 2, rows[1]), dtype=torch.int16)
        worst = uniform.QUANTIZE[part.dtype](
            values.contiguous().view(torch.int16).view(rows).numpy(),
            *self._settings,
            side.numpy(),
            symbols.view(torch.int8).view(rows).numpy(),
        )
        if not worst <= torch.finfo(values.dtype).max:
            raise self._not_finite(part)
        return side

    @property
    def _settings(self) -> tuple[bool, float, float]:
        return self.symmetric, float(self.levels), float(self.offset)

    def _not_finite(self, part: Part) -> CodecError:
        return CodecError(
            f"{self.name}: {part.kind} of layer {part.layer} hold NaN, infinity or too large values"
        )

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        dtype = getattr(torch, part.dtype)
        numbers = self._numbers(part, side)
        signed = symbols.view(torch.int8) if self.width == 8 else symbols
        x = signed.view(part.shape).to(torch.float32)
        if self.offset:
            x.sub_(self.offset)
        fits = self.fits(part, side)
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

    def decode_into(self, part: Part, symbols: Tensor, side: Tensor, out: Tensor) -> Tensor:
        import torch

        if part.elements and self._fusible(part, out) and out.is_contiguous():
            from testbed.codecs.fast import uniform

            rows = (part.kv_heads * part.tokens, self.groups(part), -1)
            fits = uniform.DEQUANTIZE[part.dtype](
                symbols.view(torch.int8).view(rows).numpy(),
                *self._settings,
                side.view(torch.int16).view(rows[0], -1, rows[1]).numpy(),
                out.view(torch.int16).view(rows).numpy(),
            )
            if fits:
                return out
        return super().decode_into(part, symbols, side, out)

    def fits(self, part: Part, side: Tensor) -> bool:
        """Whether every number from a part's symbols to its values is finite in the part's 16 bits."""
        import torch

        return grid.fits(self._numbers(part, side), self.levels, getattr(torch, part.dtype))

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
