"""Entropy coders: from symbols to bytes. Without one, symbols are packed to their width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.codecs.layout import packed_bytes, stretches

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.steps import Coder, Piece

#: A coded part may stand for this many times its bytes. Real caches stay far below; a forged payload that asks for
#: more memory is refused, and a part that would shrink further (a constant one) is sent packed.
MOST_EXPANSION = 64


def compressed(coder: Coder, piece: Piece, packed: Tensor) -> bytes | memoryview:
    """A piece's packed symbols (uint8, on the processor) as they travel: coded, or as they are where that is as short."""
    import torch

    plain = packed if coder.packed else unpack(packed, piece.symbols, piece.bits).view(torch.uint8)
    code = coder.compress(piece, plain.numpy().data)
    return code if worth_coding(piece, code) else packed.numpy().data


def worth_coding(piece: Piece, coded: bytes) -> bool:
    """Whether a part travels coded: not where packing is as short, or where decoders would refuse the expansion."""
    return len(coded) < piece.symbol_bytes <= MOST_EXPANSION * len(coded)


def pack(symbols: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Symbols of 1 to 8 or of 16 bits -> uint8, as many to a byte as fit; bytes that are not full end in zeros.

    A byte holds symbols that lie n/2 (n/4 …) apart, the earliest in its low bits, so that whole stretches are combined
    at once. Widths that do not divide a byte are cut into ones that do (`layout.stretches`), one behind the other.
    Writes to `out` where given.
    """
    return pack_rows(symbols.flatten(), bits, out)


def pack_rows(symbols: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """`pack` of each row: [..., symbols] -> [..., bytes]."""
    import torch

    count = symbols.shape[-1]
    if out is None:
        shape = (*symbols.shape[:-1], packed_bytes(count, bits))
        out = torch.empty(shape, dtype=torch.uint8, device=symbols.device)
    flat = symbols.view(torch.uint8) if bits == 16 else symbols
    widths = stretches(bits)
    if len(widths) == 1:
        return _pack_even(flat, widths[0], out)
    start = shift = 0
    for width in widths:
        stop = start + packed_bytes(count, width)
        part = (flat >> shift).bitwise_and_((1 << width) - 1)
        _pack_even(part, width, out[..., start:stop])
        start, shift = stop, shift + width
    return out


def _pack_even(flat: Tensor, bits: int, out: Tensor) -> Tensor:
    """`pack` for widths that divide a byte, and for whole bytes."""
    share = 8 // min(bits, 8)
    if share == 1:
        return out.copy_(flat)
    size = out.shape[-1]
    out.copy_(flat[..., :size])
    for i in range(1, share):
        stretch = flat[..., i * size : (i + 1) * size]
        head = out[..., : stretch.shape[-1]]
        head.add_(
            stretch, alpha=1 << (bits * i)
        )  # an addition, since no bits overlap: a pass less than shift and or
    return out


def unpack(data: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [..., bytes] -> [..., count], uint8 (int16 for 16 bits). May share `data`'s memory."""
    import torch

    if bits == 16:
        return data.view(torch.int16)
    widths = stretches(bits)
    if len(widths) == 1:
        return _unpack_even(data, count, bits)
    symbols = torch.zeros((*data.shape[:-1], count), dtype=torch.uint8, device=data.device)
    start = shift = 0
    for width in widths:
        stop = start + packed_bytes(count, width)
        symbols.add_(_unpack_even(data[..., start:stop], count, width), alpha=1 << shift)
        start, shift = stop, shift + width
    return symbols


def _unpack_even(data: Tensor, count: int, bits: int) -> Tensor:
    """`unpack` for widths that divide a byte."""
    import torch

    share = 8 // bits
    if share == 1:
        return data
    size = data.shape[-1]
    symbols = torch.empty((*data.shape[:-1], share * size), dtype=torch.uint8, device=data.device)
    for i in range(share):
        target = symbols[..., i * size : (i + 1) * size]
        if i == share - 1:
            torch.bitwise_right_shift(data, bits * i, out=target)
        else:
            torch.bitwise_and(data if i == 0 else data >> (bits * i), (1 << bits) - 1, out=target)
    return symbols[..., :count]
