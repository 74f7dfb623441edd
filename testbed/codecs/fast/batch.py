"""All parts of a cache through a quantizer: to side information and packed symbols where they lie in the payload, and back.

Parts that are quantized token by token in equal groups go through compiled loops on the processor, many at once (`uniform`). On
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
import numpy.typing as npt

from testbed.codecs import CodecError
from testbed.codecs.entropy import pack, pack_rows, unpack
from testbed.codecs.fast.threads import bytes_for
from testbed.codecs.layout import ALIGNMENT, Layout, aligned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.steps import Grid, Part, Piece, Quantizer
    from testbed.models.kvcache import KVCache


#: Bytes of a block of decoded values. The C library gives larger ones back to the kernel when they are freed (`threads`), and
#: the next ones are cleared page by page, which takes as long as decoding.
_BLOCK = 16 << 20
_TOGETHER = 1 << 26  #: elements that torch is given at once; it holds them in float32 several times


class _Table:
    """The rows of those parts of a layout that the processor's loops take; `values` are where they are read or written."""

    def __init__(
        self, quantizer: Quantizer, layout: Layout, values: Sequence[Tensor], side: Tensor, packed_at: int
    ) -> None:
        self.takes = [False] * len(layout.pieces)
        self._kept: list[Tensor] = []  # alive while their addresses are in use
        if not values or values[0].device.type != "cpu":
            return
        from testbed.codecs.fast import uniform

        self._dtype = str(values[0].dtype).removeprefix("torch.")  # a cache has one
        self._rows = np.zeros((len(values), uniform.COLUMNS), dtype=np.int64)
        known: dict[tuple[Grid, tuple[int, int, int]], tuple[int, ...]] = {}
        rows = []
        for i, piece in enumerate(layout.pieces):
            part = piece.part
            grid = quantizer.uniform(part) if part.elements else None
            if grid is not None and part.dtype == self._dtype:
                self.takes[i], shape = True, part.shape
                if (grid, shape) not in known:
                    known[grid, shape] = uniform.settings(grid, part)
                self._kept.append(values[i].contiguous())
                addresses = self._kept[-1].data_ptr(), piece.side_at, piece.symbols_at
                rows.append((*addresses, *known[grid, shape]))
        if rows:
            self._rows[self.takes] = rows
            self._rows[:, uniform.SIDE] += side.data_ptr()
            self._rows[:, uniform.SYMBOLS] += packed_at

    def taken(self, which: range) -> list[int]:
        """Those of these parts that the loops take."""
        return [i for i in which if self.takes[i]]

    def encode(self, parts: list[int]) -> npt.NDArray[np.float32]:
        """`uniform.encode` of these parts."""
        from testbed.codecs.fast import uniform

        return uniform.encode(self._dtype, self._rows[parts])

    def decode(self, parts: list[int], addresses: list[int], packed: list[bool]) -> list[int]:
        """Decodes these parts, whose symbols lie at `addresses`, packed or a byte each; returns which it could not."""
        if not parts:
            return []
        from testbed.codecs.fast import uniform

        rows = self._rows[parts]
        rows[:, uniform.SYMBOLS] = addresses
        if not all(packed):
            rows[~np.array(packed), uniform.PACKED] = 8
        fits = uniform.decode(self._dtype, rows)
        return [] if fits.all() else list(itertools.compress(parts, ~fits))


class Writer:
    """Writes parts of a cache to `side` and `packed`: uint8, as long as the layout's sections, on the cache's device."""

    def __init__(
        self, quantizer: Quantizer, cache: KVCache, layout: Layout, side: Tensor, packed: Tensor
    ) -> None:
        self.quantizer, self.pieces, self.side, self.packed = quantizer, layout.pieces, side, packed
        self._values = [
            values for layer in cache.layers for values in (layer.keys, layer.values)
        ]  # in the layout's order
        self._table = _Table(quantizer, layout, self._values, side, packed.data_ptr())

    def write(self, which: range) -> None:
        """Side information and packed symbols of these pieces. Raises CodecError where one cannot be quantized."""
        taken = self._table.taken(which)
        if taken:
            self._write_compiled(taken)
        left = [i for i in which if not self._table.takes[i]]
        for group in _alike(self.quantizer, self.pieces, left, self.side.device):
            if len(group) > 1:
                self._write_together(group)
            else:
                piece = self.pieces[group[0]]
                pack(self.symbols(group[0]), piece.bits, out=_cut(self.packed, piece))
        pieces = self.pieces[which.start : which.stop]
        _zero_gaps(self.side, [piece.side_at + piece.side_bytes for piece in pieces])
        _zero_gaps(self.packed, [piece.symbols_at + piece.symbol_bytes for piece in pieces])

    def symbols(self, i: int) -> Tensor:
        """A part's symbols before they are packed; its side information is written."""
        piece = self.pieces[i]
        symbols, numbers = self.quantizer.encode(piece.part, self._values[i])
        if numbers is not None and piece.side_bytes:
            self.side[piece.side_at : piece.side_at + piece.side_bytes] = _as_bytes(numbers)
        return symbols

    def _write_compiled(self, parts: list[int]) -> None:
        import torch

        worst = self._table.encode(parts)
        if not worst.max() <= torch.finfo(self._values[0].dtype).max:  # NaN is not, either
            self._refuse(parts)

    def _write_together(self, group: list[int]) -> None:
        import torch

        try:
            symbols, numbers = self.quantizer.encode(
                _as_one(self.pieces, group), torch.cat([self._values[i] for i in group])
            )
        except CodecError:
            self._refuse(group)
            raise
        assert numbers is not None
        packed = pack_rows(symbols.view(len(group), -1), self.pieces[group[0]].bits)
        side = _as_bytes(numbers).view(len(group), -1)
        for row, i in enumerate(group):
            piece = self.pieces[i]
            self.side[piece.side_at : piece.side_at + piece.side_bytes] = side[row]
            _cut(self.packed, piece).copy_(packed[row])

    def _refuse(self, which: Sequence[int]) -> None:
        """Raises CodecError for the first of these parts that cannot be quantized, which says what is wrong where."""
        for i in which:
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
        self._table = _Table(quantizer, layout, self.targets, self._numbers, 0)

    def read(self, which: range, symbols_of: Callable[[int], tuple[Tensor, bool]]) -> None:
        """Fills these pieces' targets. symbols_of: a part's uint8 bytes, and whether they are packed to the symbols' width."""
        symbols = {i: symbols_of(i) for i in which}
        taken = self._table.taken(which)
        own = [symbols[i] for i in taken]
        left = self._table.decode(taken, [data.data_ptr() for data, _ in own], [packed for _, packed in own])
        self._read(which, left, symbols.__getitem__)

    def read_packed(self, which: range, packed: Tensor) -> None:
        """The same from the whole section of packed symbols, uint8, on the targets' device."""
        taken = self._table.taken(which)
        begin = packed.data_ptr()
        begins = [begin + self.pieces[i].symbols_at for i in taken]
        left = self._table.decode(taken, begins, [True] * len(taken))
        self._read(which, left, lambda i: (_cut(packed, self.pieces[i]), True))

    def _read(
        self, which: range, failed: list[int], symbols_of: Callable[[int], tuple[Tensor, bool]]
    ) -> None:
        """Those of the pieces that the loops do not take, and those that they could not decode."""
        left = [*failed, *(i for i in which if not self._table.takes[i])]
        for group in _alike(self.quantizer, self.pieces, left, self._numbers.device):
            if len(group) > 1:
                self._read_together(group, symbols_of)
            else:
                [i] = group
                symbols = self._unpacked(i, symbols_of)
                self.targets[i].copy_(self.quantizer.decode(self.pieces[i].part, symbols, self._side(i)))

    def _side(self, i: int) -> Tensor:
        piece = self.pieces[i]
        return self._numbers[piece.side_at : piece.side_at + piece.side_bytes]

    def _unpacked(self, i: int, symbols_of: Callable[[int], tuple[Tensor, bool]]) -> Tensor:
        data, packed = symbols_of(i)
        return unpack(data, self.pieces[i].symbols, self.pieces[i].bits) if packed else data

    def _read_together(self, group: list[int], symbols_of: Callable[[int], tuple[Tensor, bool]]) -> None:
        import torch

        piece = self.pieces[group[0]]
        data, packed = zip(*map(symbols_of, group), strict=True)
        if all(packed):
            symbols = unpack(torch.stack(data), piece.symbols, piece.bits)
        else:
            symbols = torch.stack([self._unpacked(i, symbols_of) for i in group])
        side = torch.cat([self._side(i) for i in group])
        values = self.quantizer.decode(_as_one(self.pieces, group), symbols.flatten(), side)
        for own, i in zip(values.unflatten(0, (len(group), -1)), group, strict=True):
            self.targets[i].copy_(own)


def _alike(
    quantizer: Quantizer, pieces: Sequence[Piece], which: Sequence[int], device: torch.device
) -> Iterator[list[int]]:
    """These parts by what is quantized together. Threads of the processor take them one by one, close to their cores."""
    groups: dict[object, list[int]] = {}
    for i in which:
        part = pieces[i].part
        grid = quantizer.uniform(part) if device.type != "cpu" and part.elements else None
        groups.setdefault(i if grid is None else (grid, part.shape), []).append(i)
    for group in groups.values():
        size = max(1, _TOGETHER // max(1, pieces[group[0]].part.elements))
        yield from (group[at : at + size] for at in range(0, len(group), size))


def _as_one(pieces: Sequence[Piece], group: list[int]) -> Part:
    """Parts of one shape and grid, which are quantized token by token, as one that has all their heads."""
    part = pieces[group[0]].part
    return replace(part, kv_heads=len(group) * part.kv_heads)


def _as_bytes(numbers: Tensor) -> Tensor:
    import torch

    return numbers.contiguous().flatten().view(torch.uint8)


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
