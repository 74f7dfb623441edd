"""From a payload's body to a cache: its sections, whose lengths are checked first, then each part's values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from testbed.codecs import ragged
from testbed.codecs.cache_format import Header
from testbed.codecs.entropy import MOST_EXPANSION, Coder
from testbed.codecs.fast.beginnings import Reader, as_tensor
from testbed.codecs.fast.threads import runs
from testbed.codecs.layout import Layout
from testbed.codecs.progressive import Planes
from testbed.codecs.shapes import torch_dtype
from testbed.errors import PayloadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.codec import Codec
    from testbed.models.kvcache import KVCache


def sections(header: Header, layout: Layout, body: memoryview, codec: Codec) -> tuple[memoryview, ...]:
    """The four sections, whose lengths must fill the body. Those of an embedded code hold no symbols."""
    coded = codec.coder is not None and not codec.quantizer.embedded
    if len(header.coded) != (len(layout.pieces) if coded else 0):
        raise PayloadError(f"{len(header.coded)} coded parts in a payload of {len(layout.pieces)} parts")
    lengths = [
        layout.side_bytes,
        sum(header.coded) if coded else 0 if codec.quantizer.embedded else layout.symbol_bytes,
        sum(code.size for code in header.lists),
        header.transform_bytes,
    ]
    if any(
        piece.symbol_bytes > MOST_EXPANSION * size
        for piece, size in zip(layout.pieces, header.coded, strict=False)
    ):
        raise PayloadError("a coded part is said to stand for more bytes than any encoder writes")
    if sum(lengths) != len(body):
        raise PayloadError(f"the header's shapes take {sum(lengths)} bytes, but {len(body)} are there")
    sections, at = [], 0
    for length in lengths:
        sections.append(body[at : at + length])
        at += length
    return tuple(sections)


def dequantize(
    codec: Codec,
    header: Header,
    layout: Layout,
    side: memoryview,
    symbols: memoryview | Planes,
    device: str | torch.device,
) -> list[Tensor]:
    """Each part's values: in 16 bits, or float32 where a transform follows."""
    import torch

    dtype = torch.float32 if codec.transform else torch_dtype(header.dtype)
    device = torch.device(device)
    reader = Reader(codec.quantizer, layout, as_tensor(side).to(device), dtype, device)

    def read(which: range) -> None:
        if isinstance(symbols, Planes):
            known = symbols.symbols
            reader.read(which, lambda i: (known[i].to(device), False))
        elif codec.coder is None:
            reader.read_packed(which, packed)
        else:
            found = _expanded(codec.coder, header, layout, symbols, device)
            # Expanded and read while it is close to the core; a GPU is given all parts at once.
            for own in [range(i, i + 1) for i in which] if device.type == "cpu" else [which]:
                reader.read(own, found)

    if codec.coder is None and not isinstance(symbols, Planes):
        packed = as_tensor(symbols).to(device)
    runs(read, len(layout.pieces), device, even=codec.coder is None)
    return reader.targets


def _expanded(
    coder: Coder, header: Header, layout: Layout, data: memoryview, device: torch.device
) -> Callable[[int], tuple[Tensor, bool]]:
    """What expands a part's symbols, and says whether they are packed."""
    import torch

    pieces = layout.pieces
    ends = list(itertools.accumulate(header.coded))

    def expanded(i: int) -> tuple[Tensor, bool]:
        part = data[ends[i] - header.coded[i] : ends[i]]
        if len(part) == pieces[i].symbol_bytes:  # did not shrink, and was packed only
            return as_tensor(part).to(device), True
        plain = as_tensor(memoryview(coder.expand(pieces[i], part))).to(device)
        return (plain.view(torch.int16) if pieces[i].bits == 16 and not coder.packed else plain), coder.packed

    return expanded


def assemble(header: Header, held: Sequence[Tensor], parts: Sequence[Tensor]) -> KVCache:
    """The cache of these positions (a layer each) and values (keys and values of each layer in turn)."""
    from testbed.models.kvcache import KVCache, KVLayer

    layers = [
        KVLayer(keys, values, ragged.flat_positions(where), group.window)
        for keys, values, where, group in zip(parts[0::2], parts[1::2], held, header.layers, strict=True)
    ]
    return KVCache(layers, header.length)
