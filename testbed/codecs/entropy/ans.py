"""Asymmetric numeral systems over symbols, with a frequency table for each channel where that pays for itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from testbed import lookup
from testbed.codecs.entropy import tables
from testbed.codecs.kept import is_name
from testbed.codecs.steps import Coder, Piece
from testbed.errors import PayloadError, SpecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Symbols = npt.NDArray[np.uint8]
    Counts = npt.NDArray[np.int64]

#: What shares a table: a part, a channel, one of a number's two bytes, a channel by tables that both sides have, a head.
_PART, _CHANNEL, _BYTES, _KNOWN, _HEAD = 0, 1, 2, 3, 4
_CUT = 8  #: added where tables are sent from the first symbol that occurs to the last, which two bytes tell


@dataclass(frozen=True)
class ANS(Coder):
    """Range asymmetric numeral systems (constriction), each layer's keys and values by themselves, one symbol at a time.

    tables: a frequency table for each channel of a head, for the whole part, or whichever makes fewer bytes (auto; one for each
    head is a choice, too). A table takes a byte a symbol from the first that occurs to the last: frequencies relative to the
    most frequent one, which has 255. Values of 16 bits are coded as two bytes with a table each.
    table: a file of tables by channel that were counted beforehand (``python -m testbed.diagnosis.tables``), or the hash that
    names them: they take no bytes, and are used for each part that they suit better than its own. The payload names the hash,
    and a machine that has no such tables refuses it.
    """

    name: ClassVar[str] = "ans"
    source: ClassVar[str] = "Duda (arXiv:1311.2540); constriction (arXiv:2201.01741)"
    packed: ClassVar[bool] = False

    tables: Literal["auto", "part", "channel"] = "auto"
    table: str = "none"

    @property
    def refers(self) -> bool:
        return self.table != "none" and not is_name(self.table)

    def bound(self, model: str | None) -> ANS:
        if not self.refers:
            return self
        path = Path(lookup.find(self.table) or self.table).expanduser()
        return replace(self, table=tables.KEPT.save(tables.KEPT.load(path)[1])[0])

    @property
    def shared_bytes(self) -> int:
        return 0 if self.table == "none" else tables.KEPT.size(self.table)

    def _known(self, piece: Piece) -> Symbols | None:
        """Frequencies that both sides have for a part's channels, where they do."""
        if self.table == "none" or _CHANNEL not in _modes(piece):
            return None
        return tables.KEPT.known(self.table).rows(piece)

    def compress(self, piece: Piece, data: memoryview) -> bytes:
        import numpy as np

        symbols: Symbols = np.frombuffer(data, dtype=np.uint8)
        if not len(symbols):
            return b""
        width, modes = _widths(piece), _modes(piece)
        if self.tables != "auto" and _CHANNEL in modes:
            modes = [_CHANNEL if self.tables == "channel" else _PART]
        costs = {}
        first, last = int(symbols.min()), int(symbols.max())
        sent = slice(0, width) if last - first + 3 > width or _BYTES in modes else slice(first, last + 1)
        for mode in modes:
            rows = _rows(piece, mode, symbols)
            counts = np.stack([np.bincount(row, minlength=width) for row in rows])
            costs[mode] = (_bits(counts) + 8 * counts[:, sent].size, rows, counts)
        known = self._known(piece)
        if known is not None:
            rows = _rows(piece, _CHANNEL, symbols)
            counts = np.stack([np.bincount(row, minlength=width) for row in rows])
            costs[_KNOWN] = (_cross_bits(counts, known), rows, counts)
        mode = min(costs, key=lambda mode: costs[mode][0])
        _, rows, counts = costs[mode]
        table = known if known is not None and mode == _KNOWN else _rounded(counts)
        coder = _ans().AnsCoder()
        for row, frequencies in zip(rows[::-1], table[::-1], strict=True):
            coder.encode_reverse(row.astype(np.int32), _model(frequencies))
        words = coder.get_compressed().astype("<u4")
        told = bytes([mode])
        if mode != _KNOWN:
            cut = b"" if sent == slice(0, width) else bytes([first, last])
            told = bytes([mode + (_CUT if cut else 0)]) + cut + table[:, sent].tobytes()
        return told + words.tobytes()

    def expand(self, piece: Piece, data: memoryview) -> bytes:
        import numpy as np

        size = self.input_bytes(piece)
        if not size:
            raise PayloadError("ans: bytes for a part without symbols")
        mode, width = data[0] if len(data) else -1, _widths(piece)
        known = self._known_here(piece) if mode == _KNOWN else None
        at, sent = 1, slice(0, width)
        if mode >= _CUT and len(data) > 2 and _BYTES not in _modes(piece):
            mode, at, sent = mode - _CUT, 3, slice(data[1], data[2] + 1)
        if mode not in _modes(piece) and known is None:
            raise PayloadError(f"ans: a part whose tables are of kind {mode}")
        if not sent.start < sent.stop <= width:
            raise PayloadError("ans: a table of symbols that there are not")
        shared = _CHANNEL if mode == _KNOWN else mode
        rows = _rows(piece, shared, np.empty(size, dtype=np.uint8))
        begin = at + (0 if known is not None else rows.shape[0] * (sent.stop - sent.start))
        if (len(data) - begin) % 4 or len(data) < begin:
            raise PayloadError(f"ans: {len(data)} bytes do not hold {rows.shape[0]} tables and words")
        table = known
        if table is None:
            table = np.zeros((rows.shape[0], width), dtype=np.uint8)
            table[:, sent] = np.frombuffer(data[at:begin], dtype=np.uint8).reshape(rows.shape[0], -1)
        if not (table.max(1) == 255).all():
            raise PayloadError("ans: a table that no encoder writes")
        words = np.frombuffer(data[begin:], dtype="<u4").astype(np.uint32)
        try:
            coder = _ans().AnsCoder(words)
            for row, frequencies in zip(rows, table, strict=True):
                row[:] = coder.decode(_model(frequencies), len(row))
        except (ValueError, AssertionError) as error:
            raise PayloadError(f"ans: {str(error)[:80]}") from None
        if not coder.is_empty():
            raise PayloadError("ans: bytes behind the last symbol")
        return _unrowed(piece, shared, rows).tobytes()

    def _known_here(self, piece: Piece) -> Symbols | None:
        """`_known` of a payload's part; PayloadError where this machine lacks the tables that it names."""
        try:
            return self._known(piece)
        except SpecError as error:
            raise PayloadError(f"ans: {error}") from None


def _ans() -> Any:
    import constriction

    return constriction.stream.stack


def _model(frequencies: Symbols) -> Any:
    import constriction
    import numpy as np

    share = frequencies / frequencies.sum(dtype=np.float64)
    return constriction.stream.model.Categorical(share, perfect=False)


def _widths(piece: Piece) -> int:
    """How many symbols there are: 256 for the bytes of 16 bits."""
    return 1 << min(piece.bits, 8)


def _modes(piece: Piece) -> list[int]:
    """How symbols may share tables: by channel only where each of some tokens has a symbol for each channel."""
    if piece.bits == 16:
        return [_BYTES]
    channels = piece.part.kv_heads * piece.part.head_dim
    return [_PART, _CHANNEL, _HEAD] if piece.symbols % channels == 0 else [_PART]


def _shape(piece: Piece) -> tuple[int, int, int]:
    """KV heads, tokens that have symbols, and channels of a head."""
    heads, _, channels = piece.part.shape
    return heads, piece.symbols // (heads * channels), channels


def _rows(piece: Piece, mode: int, symbols: Symbols) -> Symbols:
    """Symbols that share a table, a row a table."""
    import numpy as np

    if mode in (_PART, _HEAD):
        return symbols.reshape(1 if mode == _PART else piece.part.kv_heads, -1)
    if mode == _BYTES:
        return np.ascontiguousarray(symbols.reshape(-1, 2).T)
    heads, tokens, channels = _shape(piece)
    by_channel = symbols.reshape(heads, tokens, channels).transpose(0, 2, 1)
    return np.ascontiguousarray(by_channel).reshape(heads * channels, tokens)


def _unrowed(piece: Piece, mode: int, rows: Symbols) -> Symbols:
    """The inverse of `_rows`."""
    import numpy as np

    if mode in (_PART, _HEAD):
        return rows
    if mode == _BYTES:
        return np.ascontiguousarray(rows.T)
    heads, tokens, channels = _shape(piece)
    return np.ascontiguousarray(rows.reshape(heads, channels, tokens).transpose(0, 2, 1))


def _bits(counts: Counts) -> float:
    """What the symbols of these counts take by their entropy, a row a distribution."""
    import numpy as np

    totals = counts.sum(1, keepdims=True)
    return float(-(counts * np.log2(np.maximum(counts, 1) / totals)).sum())


def _cross_bits(counts: Counts, known: Symbols) -> float:
    """What symbols of these counts take by tables that were not counted of them."""
    import numpy as np

    share = known / known.sum(1, keepdims=True, dtype=np.float64)
    return float(-(counts * np.log2(share)).sum())


def _rounded(counts: Counts) -> Symbols:
    """Frequencies in a byte: 255 for the most frequent symbol, at least 1 for one that occurs."""
    import numpy as np

    scaled = np.rint(counts * (255 / counts.max(1, keepdims=True)))
    return np.where(counts > 0, np.maximum(scaled, 1), 0).astype(np.uint8)


def entropy_bits(symbols: Symbols) -> float:
    """About what flat symbols take with a table of their own, the table included."""
    import numpy as np

    first, last = (int(symbols.min()), int(symbols.max())) if len(symbols) else (0, 0)
    return _bits(np.bincount(symbols, minlength=1)[None]) + 8 * (last - first + 1)


def rows_by_channel(piece: Piece, symbols: Symbols) -> Symbols | None:
    """A part's flat symbols, [kv_heads · channels, tokens]; None where they are not an element each."""
    return _rows(piece, _CHANNEL, symbols) if _CHANNEL in _modes(piece) and len(symbols) else None
