"""All parts of a cache through a quantizer: to side information and packed symbols where they lie in the payload, and back.

Parts that are quantized token by token in equal groups go through compiled loops on the processor, many at once (`batch`). On
another device those of one shape go through torch together: a launch takes as long for a small part as for sixty. Others go
through their quantizer, one by one.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from testbed.codecs import CodecError
from testbed.codecs.entropy import pack, pack_rows, unpack
from testbed.codecs.fast.threads import bytes_for
from testbed.codecs.layout import ALIGNMENT, Layout, aligned
from testbed.codecs.steps import Part, Piece

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.fast.batch import Table
    from testbed.codecs.quantize.integer import Integer
    from testbed.codecs.steps import Quantizer
    from testbed.models.kvcache import KVCache


#: Bytes of a block of decoded values. The C library gives larger ones back to the kernel when they are freed (`parallel`), and
#: the next ones are cleared page by page, which takes as long as decoding.
_BLOCK = 16 << 20
_TOGETHER = 1 << 26  #: elements that torch is given at once; it holds them in float32 several times


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
        pieces = self.pieces[which.start : which.stop]
        for group in _alike(self.quantizer, self.pieces, self._table.left(which), self.side.device):
            if len(group) > 1:
                self._write_together(group)
            else:
                piece = self.pieces[group[0]]
                pack(self.symbols(group[0]), piece.bits, out=_cut(self.packed, piece))
        _zero_gaps(self.side, [piece.side_at + piece.side_bytes for piece in pieces])
        _zero_gaps(self.packed, [piece.symbols_at + piece.symbol_bytes for piece in pieces])

    def symbols(self, i: int) -> Tensor:
        """A part's symbols before they are packed; its side information is written."""
        piece = self.pieces[i]
        symbols, numbers = self.quantizer.encode(piece.part, self._values[i])
        if numbers is not None and piece.side_bytes:
            import torch

            end = piece.side_at + piece.side_bytes
            self.side[piece.side_at : end] = numbers.contiguous().flatten().view(torch.uint8)
        return symbols

    def _write_together(self, group: list[int]) -> None:
        import torch

        integer, part = _as_one(self.quantizer, [self.pieces[i] for i in group])
        try:
            symbols, numbers = integer.encode(part, torch.cat([self._values[i] for i in group]))
        except CodecError:
            self._refuse(group)
            raise
        assert numbers is not None
        packed = pack_rows(symbols.view(len(group), -1), integer.width)
        side = numbers.contiguous().view(len(group), -1).view(torch.uint8)
        for row, i in enumerate(group):
            piece = self.pieces[i]
            self.side[piece.side_at : piece.side_at + piece.side_bytes] = side[row]
            _cut(self.packed, piece).copy_(packed[row])

    def _refuse(self, which: Sequence[int]) -> None:
        """Raises CodecError for the first of these parts that cannot be quantized, which says what is wrong where."""
        for i in which:
            self.quantizer.encode(self.pieces[i].part, self._values[i])

    def _write_fitting(self, which: range) -> None:
        import torch

        rows = self._table.of(which)
        if not len(rows):
            return
        from testbed.codecs.fast import batch

        dtype = self.pieces[which[0]].part.dtype
        worst = batch.encode(dtype, rows)
        if not worst.max() <= torch.finfo(getattr(torch, dtype)).max:  # NaN is not, either
            self._refuse(which)


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
        rows = self._table.of(which)
        if len(rows):
            from testbed.codecs.fast import batch

            own = [found[i - which.start] for i in self._table.fitting(which)]
            rows[:, batch.PACKED] = [data.data_ptr() for data, _ in own]
            rows[[not packed for _, packed in own], batch.BITS] = 8  # a byte a symbol
        self._read(which, rows, lambda i: found[i - which.start])

    def read_packed(self, which: range, packed: Tensor) -> None:
        """The same from the whole section of packed symbols, uint8, on the targets' device."""
        rows = self._table.of(which)
        if len(rows):
            from testbed.codecs.fast import batch

            begins = [self.pieces[i].symbols_at for i in self._table.fitting(which)]
            rows[:, batch.PACKED] = np.array(begins) + packed.data_ptr()
        self._read(which, rows, lambda i: (_cut(packed, self.pieces[i]), True))

    def _read(self, which: range, rows: Table, symbols_of: Callable[[int], tuple[Tensor, bool]]) -> None:
        """Those of the pieces that fit by the loops; those that do not, or could not be decoded so, one by one."""
        done: set[int] = set()
        if len(rows):
            from testbed.codecs.fast import batch

            whole = batch.decode(self.pieces[which[0]].part.dtype, rows)
            fitting = self._table.fitting(which)
            done = set(fitting if whole.all() else itertools.compress(fitting, whole))
        left = [i for i in which if i not in done]
        for group in _alike(self.quantizer, self.pieces, left, self._numbers.device):
            if len(group) == 1 or not self._read_together(group, symbols_of):
                for i in group:
                    symbols = self._unpacked(i, symbols_of)
                    self.quantizer.decode_into(self.pieces[i].part, symbols, self._side(i), self.targets[i])

    def _side(self, i: int) -> Tensor:
        piece = self.pieces[i]
        return self._numbers[piece.side_at : piece.side_at + piece.side_bytes]

    def _unpacked(self, i: int, symbols_of: Callable[[int], tuple[Tensor, bool]]) -> Tensor:
        data, packed = symbols_of(i)
        return unpack(data, self.pieces[i].symbols, self.pieces[i].bits) if packed else data

    def _read_together(self, group: list[int], symbols_of: Callable[[int], tuple[Tensor, bool]]) -> bool:
        """Whether these parts' values are written: not where those of one are beyond 16 bits, which is then its alone."""
        import torch

        integer, part = _as_one(self.quantizer, [self.pieces[i] for i in group])
        side = torch.cat([self._side(i) for i in group])
        if not integer.fits(part, side):
            return False
        data, packed = zip(*map(symbols_of, group), strict=True)
        if all(packed):
            symbols = unpack(torch.stack(data), self.pieces[group[0]].symbols, integer.width)
        else:
            symbols = torch.stack([self._unpacked(i, symbols_of) for i in group])
        values = integer.decode(part, symbols.flatten(), side).unflatten(0, (len(group), -1))
        for row, i in enumerate(group):
            self.targets[i].copy_(values[row])
        return True


def _alike(
    quantizer: Quantizer, pieces: Sequence[Piece], which: Sequence[int], device: torch.device
) -> Iterator[list[int]]:
    """These parts by what is quantized together. Threads of the processor take them one by one, close to their cores."""
    groups: dict[object, list[int]] = {}
    for i in which:
        part = pieces[i].part
        integer = quantizer.uniform(part) if device.type != "cpu" and part.elements else None
        groups.setdefault(i if integer is None else (integer, part.shape), []).append(i)
    for group in groups.values():
        size = max(1, _TOGETHER // max(1, pieces[group[0]].part.elements))
        yield from (group[at : at + size] for at in range(0, len(group), size))


def _as_one(quantizer: Quantizer, pieces: Sequence[Piece]) -> tuple[Integer, Part]:
    """Parts of one shape as one that has all their heads, and the integers that it is quantized to, token by token."""
    part = pieces[0].part
    integer = quantizer.uniform(part)
    assert integer is not None
    return integer, replace(part, kv_heads=len(pieces) * part.kv_heads)


class _Table:
    """Addresses and settings of those parts of a layout that the processor's loops take."""

    def __init__(self, quantizer: Quantizer, layout: Layout, values: Sequence[Tensor]) -> None:
        self._pieces = layout.pieces
        self._row = [-1] * len(layout.pieces)
        self._kept: list[Tensor] = []  # alive while their addresses are in use
        rows: list[list[int]] = []
        if values and values[0].device.type == "cpu":
            from testbed.codecs.fast import batch

            dtype = str(values[0].dtype).removeprefix("torch.")  # a cache has one
            before: tuple[tuple[int, int, int], Integer] | None = None
            for i, piece in enumerate(layout.pieces):
                integer = quantizer.uniform(piece.part) if piece.part.elements else None
                if integer is not None and piece.part.dtype == dtype:
                    if before is None or before[0] != piece.part.shape or before[1] is not integer:
                        row, before = batch.row_of(piece, integer), (piece.part.shape, integer)
                    self._row[i] = len(rows)
                    rows.append(row)
        self._rows = np.array(rows, dtype=np.int64)
        self._fitting = [i for i, at in enumerate(self._row) if at >= 0]

    def set_addresses(self, values: Sequence[Tensor], side: Tensor, packed: Tensor | None = None) -> None:
        """Where the parts' values lie, and the sections."""
        if not len(self._rows):
            return
        from testbed.codecs.fast import batch

        pieces = [self._pieces[i] for i in self._fitting]
        self._kept = [values[i].contiguous() for i in self._fitting]
        self._rows[:, batch.VALUES] = [own.data_ptr() for own in self._kept]
        self._rows[:, batch.SIDE] = np.array([piece.side_at for piece in pieces]) + side.data_ptr()
        if packed is not None:
            self._rows[:, batch.PACKED] = np.array([piece.symbols_at for piece in pieces]) + packed.data_ptr()

    def left(self, which: range) -> list[int]:
        """Those of these parts that the loops do not take."""
        return [i for i in which if self._row[i] < 0]

    def of(self, which: range) -> Table:
        """The rows of those of these parts that fit, to be changed at will."""
        return self._rows[[at for at in self._row[which.start : which.stop] if at >= 0]]

    def fitting(self, which: range) -> list[int]:
        """Those of these parts that fit."""
        return self._fitting if len(which) == len(self._row) else [i for i in which if self._row[i] >= 0]


def _targets(layout: Layout, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Memory for each part's values, many parts side by side in a block, each at a cache line's start."""
    line = 64 // dtype.itemsize
    shapes = [piece.part.shape for piece in layout.pieces]
    sizes = [-(-piece.part.elements // line) * line for piece in layout.pieces]
    targets: list[Tensor] = []
    while len(targets) < len(sizes):
        most = _BLOCK // dtype.itemsize if device.type == "cpu" else sum(sizes)
        together = _together(sizes[len(targets) :], most)
        own = shapes[len(targets) : len(targets) + len(together)]
        block = _block(sum(together) or line, dtype, device)[: sum(together)]
        if len(set(own)) == 1 and math.prod(own[0]) == together[0] > 0:
            targets += block.view(
                len(own), *own[0]
            ).unbind()  # a call for all, where each costs as much as quantizing
        else:
            rooms = block.split(together)
            targets += [room[: math.prod(shape)].view(shape) for room, shape in zip(rooms, own, strict=True)]
    return targets


def _together(sizes: Sequence[int], most: int) -> list[int]:
    """The parts, from the first on, that share a block: at least one."""
    ends = itertools.takewhile(lambda end: end <= most, itertools.accumulate(sizes))
    return list(sizes[: max(1, sum(1 for _ in ends))])


def _block(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `size` numbers."""
    import torch

    if device.type == "cpu":
        return torch.from_numpy(bytes_for(size * dtype.itemsize)).view(dtype)
    return torch.empty(size, dtype=dtype, device=device)


def _zero_gaps(section: Tensor, ends: list[int]) -> None:
    """Zeros behind pieces, up to the next multiple of the alignment."""
    gaps = [at for end in ends if end % ALIGNMENT for at in range(end, aligned(end))]
    if gaps:
        section[gaps] = 0


def _cut(section: Tensor, piece: Piece) -> Tensor:
    """A piece's packed symbols."""
    return section[piece.symbols_at : piece.symbols_at + piece.symbol_bytes]


def as_tensor(view: memoryview) -> Tensor:
    """Bytes as a tensor that shares them; nothing here writes to it."""
    import torch

    if len(view) == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only bytes; they stay unwritten
        return torch.frombuffer(view, dtype=torch.uint8)
