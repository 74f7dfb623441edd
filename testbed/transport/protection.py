"""A chunk's frame in datagrams of which any may be lost: cut into blocks of symbols, each with symbols of repair behind it.

Of a block of k symbols and r of repair, any k give it back (Reed-Solomon, by zfec). How many r there are follows from a rate of
loss that they are to make up for, and from how sure that has to be: the more a chunk is needed, the surer.

    0            8       10       14      16       17
    | request id | chunk | length | block | symbol | symbol's bytes |

Integers are big-endian. `length` is the frame's; the size of symbols and blocks follows from it.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import zfec

from testbed.errors import WireError
from testbed.transport import wire

HEADER = struct.Struct("!QHIHB")
#: Of a symbol, at most: with all that goes before it, and some acknowledgements, it fits a QUIC packet of 1,200 bytes, to which
#: qh3 falls back where a first packet is lost; it fails on a datagram that does not fit.
SYMBOL = 1100
_MOST_OF_BLOCK = 128  #: symbols without repair: twice as many would save 2 % of all, and take twice as long
_MOST = 256  #: symbols of a block, with repair: zfec counts in bytes
#: By priority: of how many blocks one may be lost for good, where datagrams are lost at the rate that is made up for.
_FAILURES = (1e-4, 1e-2, 1e-1)


@dataclass(frozen=True)
class Layout:
    """How a frame of that length is cut: symbols' `size`, and of each block the first symbol and their number."""

    length: int

    @property
    def symbols(self) -> int:
        """Of all blocks, without repair."""
        return max(1, -(-self.length // SYMBOL))

    @property
    def size(self) -> int:
        """The smallest with which so many symbols hold the frame."""
        return max(1, -(-self.length // self.symbols))

    @property
    def blocks(self) -> int:
        """How many."""
        return -(-self.symbols // _MOST_OF_BLOCK)

    def block(self, number: int) -> tuple[int, int]:
        """A block's first symbol, and how many there are: as many as in the others, or one less."""
        each, more = divmod(self.symbols, self.blocks)
        return number * each + min(number, more), each + (number < more)


@functools.lru_cache(maxsize=1024)
def repairs(symbols: int, loss: float, priority: int) -> int:
    """How many symbols of repair a block gets, so that more than those are lost seldom enough, where each symbol is lost with
    that probability, independently of others."""
    if loss <= 0:
        return 0
    allowed = _FAILURES[min(priority, len(_FAILURES) - 1)]
    for more in range(_MOST - symbols):
        sent = symbols + more
        kept = sum(
            math.comb(sent, lost) * loss**lost * (1 - loss) ** (sent - lost) for lost in range(more + 1)
        )
        if 1 - kept <= allowed:
            return more
    return _MOST - symbols


def protect(id: int, chunk: int, frame: bytes, loss: float, priority: int) -> list[bytes]:
    """The datagrams of a chunk's frame, its blocks taking turns, so that losses in a row are shared by them."""
    layout = Layout(len(frame))
    size = layout.size
    padded = frame.ljust(layout.symbols * size, b"\0")
    made: list[tuple[float, bytes]] = []
    for number in range(layout.blocks):
        first, count = layout.block(number)
        source = [padded[i * size : (i + 1) * size] for i in range(first, first + count)]
        more = repairs(count, loss, priority)
        repair = zfec.Encoder(count, count + more).encode(source, range(count, count + more)) if more else ()
        for symbol, data in enumerate((*source, *repair)):
            header = HEADER.pack(id, chunk, len(frame), number, symbol)
            made.append((symbol / (count + more), header + data))
    return [datagram for _, datagram in sorted(made, key=lambda pair: pair[0])]


def again(datagrams: Sequence[bytes], held: Sequence[bytes], loss: float) -> list[bytes]:
    """Of a chunk's datagrams, as `protect` made them, those to be sent once more: of each block that is not whole as many as it
    lacks, and repair for these.

    held: by block, as `wire.Lack` tells it; what no block has is passed over.
    """
    _, _, length, _, _ = HEADER.unpack_from(datagrams[0])
    layout = Layout(length)
    there = [int.from_bytes(held[n], "little") if n < len(held) else 0 for n in range(layout.blocks)]
    wanted = []
    for number, bits in enumerate(there):
        short = layout.block(number)[1] - bits.bit_count()
        wanted.append(short + repairs(short, loss, 0) if short > 0 else 0)
    chosen = []
    for datagram in datagrams:
        _, _, _, number, symbol = HEADER.unpack_from(datagram)
        if wanted[number] and not there[number] >> symbol & 1:
            wanted[number] -= 1
            chosen.append(datagram)
    return chosen


@dataclass
class _Chunk:
    """What has come of one: symbols by block, until the block is whole."""

    layout: Layout
    symbols: dict[int, dict[int, bytes]] = field(default_factory=dict)
    whole: dict[int, bytes] = field(default_factory=dict)

    def held(self) -> tuple[bytes, ...]:
        """By block, as `wire.Lack` tells it; of a whole one all."""
        every = [
            range(_MOST) if number in self.whole else self.symbols.get(number, ())
            for number in range(self.layout.blocks)
        ]
        return tuple(sum(1 << symbol for symbol in symbols).to_bytes(32, "little") for symbols in every)


class Gathering:
    """The chunks of one request's context, from datagrams in any order; memory is bounded by what `take` is given as bound."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.whole: set[int] = set()  #: chunks
        self._chunks: dict[int, _Chunk] = {}
        self._held = 0

    def take(self, datagram: bytes, bound: int) -> tuple[int, bytes] | None:
        """One more; returns a chunk's number and its frame when it is whole. What is late or of another request is passed over.

        bound: the largest frame that may come. Raises WireError where a datagram is none of an honest sender's.
        """
        if len(datagram) <= HEADER.size:
            raise WireError(f"a datagram of {len(datagram)} bytes, in which there is no symbol")
        id, index, length, number, symbol = HEADER.unpack_from(datagram)
        if id != self.id or index in self.whole:
            return None
        if length > bound:
            raise WireError(f"a chunk of {length} bytes; at most {bound} are accepted here")
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self._chunks[index] = _Chunk(Layout(length))
        layout, data = chunk.layout, datagram[HEADER.size :]
        if layout.length != length or number >= layout.blocks or len(data) != layout.size:
            raise WireError(f"a datagram of chunk {index} that does not fit its others")
        symbols = chunk.symbols.setdefault(number, {})
        if number in chunk.whole or symbol in symbols:
            return None
        self._held += len(data)
        if self._held > 2 * bound + _MOST * SYMBOL:
            raise WireError("more datagrams of chunks that are not whole than are accepted here")
        symbols[symbol] = data
        count = layout.block(number)[1]
        if len(symbols) < count:
            return None
        chunk.whole[number] = b"".join(_recovered(symbols, count))
        symbols.clear()
        if len(chunk.whole) < layout.blocks:
            return None
        del self._chunks[index]
        self._held -= layout.symbols * layout.size
        self.whole.add(index)
        return index, b"".join(chunk.whole[n] for n in range(layout.blocks))[:length]

    def lacks(self, chunks: int) -> tuple[wire.Lack, ...]:
        """What of so many chunks is missing, as far as a frame's header can tell it."""
        found, room = [], wire.MAX_HEADER // 2
        for index in range(chunks):
            if index in self.whole:
                continue
            held = self._chunks[index].held() if index in self._chunks else ()
            room -= 16 + sum(map(len, held)) + 2 * len(held)
            if room < 0:
                break
            found.append(wire.Lack(index, held))
        return tuple(found)


def _recovered(symbols: dict[int, bytes], count: int) -> list[bytes]:
    """A block's first `count` symbols, from as many of any."""
    if all(number in symbols for number in range(count)):
        return [symbols[number] for number in range(count)]
    numbers = sorted(symbols)
    return list(_decoder(count).decode([symbols[number] for number in numbers], numbers))


@functools.lru_cache(maxsize=_MOST_OF_BLOCK)
def _decoder(count: int) -> zfec.Decoder:
    """For however many symbols of repair: what one is does not depend on how many follow."""
    return zfec.Decoder(count, _MOST)
