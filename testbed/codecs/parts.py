"""All parts of a cache through a quantizer: to side information and packed symbols where they lie in the payload, and back.

Parts that are quantized token by token in equal groups go through compiled loops, many at once (`quantize.loops`); others
through their quantizer, one by one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from testbed.codecs.entropy import pack, unpack
from testbed.codecs.layout import ALIGNMENT, Layout
from testbed.codecs.parallel import bytes_for
from testbed.codecs.quantize.loops import loops_for

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.quantize import Quantizer
    from testbed.codecs.quantize.batch import Table
    from testbed.models.kvcache import KVCache


#: Bytes of a block of decoded values. The C library gives larger ones back to the kernel when they are freed (`parallel`), and
#: the next ones are cleared page by page, which takes as long as decoding.
_BLOCK = 16 << 20


class Writer:
    """Writes parts of a cache to `side` and `packed`: uint8, as long as the layout's sections, on the cache's device."""

    def __init__(
        self, quantizer: Quantizer, cache: KVCache, layout: Layout, side: Tensor, packed: Tensor
    ) -> None:
        self.quantizer, self.pieces, self.side, self.packed = quantizer, layout.pieces, side, packed
        self._values = [
            values for layer in cache.layers for values in (layer.keys, layer.values)
        ]  # in the layout's order
        self._table = _Table(quantizer, layout, self._values)
        self._table.set_addresses(self._values, side, packed)

    def write(self, which: range) -> None:
        """Side information and packed symbols of these pieces. Raises CodecError where one cannot be quantized."""
        self._write_fitting(which)
        for i in which:
            piece = self.pieces[i]
            end = piece.symbols_at + piece.symbol_bytes
            if not self._table.fits(i):
                pack(self.symbols(i), piece.bits, out=self.packed[piece.symbols_at : end])
            _zero_gap(self.side, piece.side_at + piece.side_bytes)
            _zero_gap(self.packed, end)

    def symbols(self, i: int) -> Tensor:
        """A part's symbols before they are packed; its side information is written."""
        piece = self.pieces[i]
        symbols, numbers = self.quantizer.encode(piece.part, self._values[i])
        if numbers is not None and piece.side_bytes:
            import torch

            end = piece.side_at + piece.side_bytes
            self.side[piece.side_at : end] = numbers.contiguous().flatten().view(torch.uint8)
        return symbols

    def _write_fitting(self, which: range) -> None:
        import torch

        rows = self._table.of(which)
        if not len(rows):
            return
        dtype = self.pieces[which[0]].part.dtype
        worst = self._table.loops.encode(dtype, rows)
        if not worst.max() <= torch.finfo(getattr(torch, dtype)).max:  # NaN is not, either
            for i in which:  # which says what is wrong where
                self.quantizer.encode(self.pieces[i].part, self._values[i])


class Reader:
    """Reads parts, whose layout's `side` section (uint8) is on `device`, into one block of memory there.

    targets: each part's values to be, [kv_heads, tokens, head_dim] of `dtype`, in the layout's order.
    """

    def __init__(
        self, quantizer: Quantizer, layout: Layout, side: Tensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.quantizer, self.pieces = quantizer, layout.pieces
        self._numbers = side.clone() if side.data_ptr() % ALIGNMENT else side
        self.targets = _targets(layout, dtype, device)
        self._table = _Table(quantizer, layout, self.targets)
        self._table.set_addresses(self.targets, self._numbers)

    def read(self, which: range, symbols_of: Callable[[int], tuple[Tensor, bool]]) -> None:
        """Fills these pieces' targets. symbols_of: a part's uint8 bytes, and whether they are packed to the symbols' width."""
        found = [symbols_of(i) for i in which]
        done = self._read_fitting(which, found)
        for i, (data, packed) in zip(which, found, strict=True):
            piece = self.pieces[i]
            if i not in done:
                symbols = unpack(data, piece.symbols, piece.bits) if packed else data
                own = self._numbers[piece.side_at : piece.side_at + piece.side_bytes]
                self.quantizer.decode_into(piece.part, symbols, own, self.targets[i])

    def _read_fitting(self, which: range, found: Sequence[tuple[Tensor, bool]]) -> set[int]:
        """Those of the pieces that the loops could decode."""
        rows = self._table.of(which)
        if not len(rows):
            return set()
        from testbed.codecs.quantize import batch

        fitting = [i for i in which if self._table.fits(i)]
        rows[:, batch.PACKED] = [found[i - which.start][0].data_ptr() for i in fitting]
        rows[[not found[i - which.start][1] for i in fitting], batch.BITS] = 8  # a byte a symbol
        whole = self._table.loops.decode(self.pieces[which[0]].part.dtype, rows)
        return {i for i, one in zip(fitting, whole, strict=True) if one}


class _Table:
    """Addresses and settings of those parts of a layout that the device's loops take."""

    def __init__(self, quantizer: Quantizer, layout: Layout, values: Sequence[Tensor]) -> None:
        self._pieces = layout.pieces
        self._row = [-1] * len(layout.pieces)
        self._kept: list[Tensor] = []  # alive while their addresses are in use
        rows: list[list[int]] = []
        loops = loops_for(values[0].device) if values else None
        if loops is not None:
            self.loops = loops
            for i, piece in enumerate(layout.pieces):
                integer = quantizer.uniform(piece.part) if piece.part.elements else None
                if integer is not None and str(values[i].dtype) == f"torch.{piece.part.dtype}":
                    from testbed.codecs.quantize import batch

                    row = batch.row_of(piece, integer)
                    if loops.takes(piece.part.dtype, row):
                        self._row[i] = len(rows)
                        rows.append(row)
        self._rows = np.array(rows, dtype=np.int64)

    def set_addresses(self, values: Sequence[Tensor], side: Tensor, packed: Tensor | None = None) -> None:
        """Where the parts' values lie, and the sections."""
        if not len(self._rows):
            return
        from testbed.codecs.quantize import batch

        fitting = [i for i in range(len(values)) if self.fits(i)]
        self._kept = [values[i].contiguous() for i in fitting]
        self._rows[:, batch.VALUES] = [own.data_ptr() for own in self._kept]
        self._rows[:, batch.SIDE] = [side.data_ptr() + self._pieces[i].side_at for i in fitting]
        if packed is not None:
            self._rows[:, batch.PACKED] = [packed.data_ptr() + self._pieces[i].symbols_at for i in fitting]

    def fits(self, i: int) -> bool:
        """Whether the loops take part `i`."""
        return self._row[i] >= 0

    def of(self, which: range) -> Table:
        """The rows of those of these parts that fit, to be changed at will."""
        return self._rows[[self._row[i] for i in which if self._row[i] >= 0]]


def _targets(layout: Layout, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Memory for each part's values, many parts side by side in a block, each at a cache line's start."""
    import torch

    sizes = [-(-piece.part.elements * dtype.itemsize // 64) * 64 for piece in layout.pieces]
    targets: list[Tensor] = []
    left, at = torch.empty(0, dtype=dtype, device=device), 0
    for i, (piece, size) in enumerate(zip(layout.pieces, sizes, strict=True)):
        if at + size > left.nbytes:
            left, at = _block(_together(sizes[i:]), dtype, device), 0
        start = at // dtype.itemsize
        targets.append(left[start : start + piece.part.elements].view(piece.part.shape))
        at += size
    return targets


def _together(sizes: Sequence[int]) -> int:
    """Bytes of the parts, from the first on, that share a block. At least one, and a block is never of nothing."""
    ends = itertools.takewhile(lambda end: end <= _BLOCK, itertools.accumulate(sizes))
    return max([sizes[0], 64, *ends])


def _block(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    if device.type == "cpu":
        return torch.from_numpy(bytes_for(size)).view(dtype)
    return torch.empty(size // dtype.itemsize, dtype=dtype, device=device)


def _zero_gap(section: Tensor, end: int) -> None:
    """Zeros behind a piece, up to the next multiple of the alignment."""
    if end % ALIGNMENT:
        section[end : end + ALIGNMENT - end % ALIGNMENT] = 0


def as_tensor(view: memoryview) -> Tensor:
    """Bytes as a tensor that shares them; nothing here writes to it."""
    import torch

    if len(view) == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only bytes; they stay unwritten
        return torch.frombuffer(view, dtype=torch.uint8)
