"""Quantizers: from keys and values to whole numbers of a few bits, and the scales that lead back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError
from testbed.codecs.layout import Part
from testbed.codecs.method import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.entropy import Coder
    from testbed.codecs.quantize.integer import Integer
    from testbed.codecs.transform import Transform


@dataclass(frozen=True)
class Quantizer(Method):
    """Codes one part (keys or values of one layer) at a time. Sizes follow from the part's shape alone."""

    stage: ClassVar[Literal["quantizer"]] = "quantizer"
    #: Whether its symbols are sent plane by plane (`progressive`), so that the beginning of a payload decodes too.
    embedded: ClassVar[bool] = False

    @property
    def by_token(self) -> bool:
        """Whether a token's symbols and scales depend on that token alone, whichever others are coded with it."""
        return False

    @property
    def own_transform(self) -> Transform | None:
        """A transform that it brings with it where the codec names none."""
        return None

    @property
    def own_coder(self) -> Coder | None:
        """An entropy coder that it brings with it where the codec names none."""
        return None

    def uniform(self, part: Part) -> Integer | None:
        """The integers as which a part is coded, where that is token by token in groups of equal size: `batch` is for these."""
        return None

    def symbol_bits(self, part: Part) -> int:
        """Bits of a symbol: from 1 to 8, or 16."""
        raise NotImplementedError

    def symbols(self, part: Part) -> int:
        """How many symbols a part becomes."""
        return part.elements

    def side_bytes(self, part: Part) -> int:
        """Bytes of the side information (scales, zero points): true bytes, counted in the payload."""
        return 0

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """[kv_heads, tokens, head_dim] -> (symbols, side information of `side_bytes` bytes in any format).

        Symbols are uint8 (int16 for 16 bits), contiguous, below 2^bits. Raises CodecError for NaN and infinity.
        """
        raise NotImplementedError

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        """The inverse: flat symbols and uint8 [side_bytes] -> [kv_heads, tokens, head_dim], float32 or 16-bit.

        May write over `symbols` where that is not the payload itself; any bytes give a result, if not a good one.
        """
        raise NotImplementedError

    def decode_into(self, part: Part, symbols: Tensor, side: Tensor, out: Tensor) -> Tensor:
        """`decode`, written to and returned as `out` [kv_heads, tokens, head_dim], 16-bit or float32.

        A quantizer whose format is the cache's own may override it to write once.
        """
        return out.copy_(self.decode(part, symbols, side))

    def require_finite(self, part: Part, values: Tensor) -> None:
        """Raises CodecError naming the place where values are NaN or infinite."""
        if not values.numel():
            return
        if not all(math.isfinite(float(extreme)) for extreme in values.aminmax()):
            raise CodecError(f"{self.name}: {part.kind} of layer {part.layer} hold NaN or infinity")


def side_of(*tensors: Tensor) -> Tensor:
    """Side information of several kinds, as the uint8 bytes that `cut_side` reads back."""
    import torch

    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])


def cut_side(side: Tensor, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """The tensors of these shapes and formats that lie one behind the other in uint8 `side`, as views."""
    found, at = [], 0
    for shape, dtype in kinds:
        size = dtype.itemsize
        for length in shape:
            size *= length
        found.append(side[at : at + size].view(dtype).view(shape))
        at += size
    return found


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
