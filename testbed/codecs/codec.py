"""A codec at work: selects, encodes to true bytes, decodes on another machine."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from testbed.codecs import container, progressive, ragged
from testbed.codecs.container import Header
from testbed.codecs.entropy import MOST_EXPANSION, Coder, pack, unpack, worth_coding
from testbed.codecs.evidence import Evidence, Needs
from testbed.codecs.kept import Kept
from testbed.codecs.layout import ALIGNMENT, Layout, Piece, lay_out
from testbed.codecs.parallel import bytes_for, each
from testbed.codecs.progressive import Planes
from testbed.codecs.shapes import describe, dtype_name, layer_positions, torch_dtype
from testbed.codecs.spec import CodecSpec, parse
from testbed.errors import PayloadError, SpecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.quantize import Quantizer
    from testbed.codecs.select import Selector
    from testbed.codecs.transform import Transform
    from testbed.models.kvcache import KVCache

Result = TypeVar("Result")


class Codec:
    """Runs the stages of a spec (or of its text; raises SpecError). model: whose caches; codecs that refer to it need it."""

    def __init__(self, spec: CodecSpec | str, model: str | None = None) -> None:
        self.spec = (parse(spec) if isinstance(spec, str) else spec).bound(model)
        self.selector = cast("Selector | None", self.spec.selector)
        self.quantizer = cast("Quantizer", self.spec.quantizer)
        self.transform = cast("Transform | None", self.spec.transform) or self.quantizer.own_transform
        self.coder = cast(Coder | None, self.spec.coder) or self.quantizer.own_coder

    def __str__(self) -> str:
        return str(self.spec)

    @property
    def needs(self) -> Needs:
        """Which queries the edge must keep for `select`."""
        return self.selector.needs() if self.selector else Needs()

    @property
    def undoes_rope(self) -> bool:
        """Whether `encode` makes use of a cache that knows its rotary embedding."""
        return self.transform is not None and self.transform.undoes_rope

    def select(self, evidence: Evidence) -> Kept:
        """The context tokens to send. Raises CodecError where the evidence lacks what the selector needs."""
        return self.selector.select(evidence) if self.selector else Kept.everything(evidence.cache)

    def encode(self, cache: KVCache, kept: Kept | None = None) -> memoryview:
        """The payload of the kept tokens (None: all) of a context's cache, which is in 16 bits. Its length is what crosses.

        Equal caches give equal bytes. Raises CodecError for a cache that the format or the quantizer cannot hold.
        """
        import torch

        held = kept.apply(cache) if kept else cache
        dtype = dtype_name(held)
        groups, lists, position_bytes = describe(held)
        held = ragged.flatten(held)
        extra = b""
        if self.transform:
            held, extra = self.transform.encode(held, self.quantizer)
        header = Header(str(self.spec), cache.length, dtype, groups, lists, [], len(extra))
        layout = lay_out(header.parts(), self.quantizer)
        if self.quantizer.embedded:
            return self._encode_planes(held, header, layout, position_bytes + extra)
        if self.coder:
            return self._encode_coded(self.coder, held, header, layout, position_bytes + extra)
        body_bytes = layout.side_bytes + layout.symbol_bytes
        payload, at = container.allocate(header, body_bytes + len(position_bytes) + len(extra))
        body = torch.from_numpy(payload[at : at + body_bytes])
        target = body if held.device.type == "cpu" else torch.empty_like(body, device=held.device)
        side, packed = target[: layout.side_bytes], target[layout.side_bytes :]

        def quantize(piece: Piece) -> None:
            end = piece.symbols_at + piece.symbol_bytes
            pack(self._symbols(held, piece, side), piece.bits, out=packed[piece.symbols_at : end])
            _zero_gap(packed, end)

        for _ in _each(held.device, quantize, layout.pieces):
            pass
        if target is not body:
            body.copy_(target)
        payload[at + body_bytes :] = np.frombuffer(position_bytes + extra, dtype=np.uint8)
        return container.seal(payload)

    def _symbols(self, cache: KVCache, piece: Piece, side: Tensor) -> Tensor:
        """A part's symbols; its side information is written to the side section."""
        layer = cache.layers[piece.part.layer]
        symbols, numbers = self.quantizer.encode(
            piece.part, layer.keys if piece.part.kind == "keys" else layer.values
        )
        _write(side, piece.side_at, piece.side_bytes, numbers)
        return symbols

    def _encode_coded(
        self, coder: Coder, cache: KVCache, header: Header, layout: Layout, behind: bytes
    ) -> memoryview:
        import msgspec
        import torch

        side = torch.zeros(layout.side_bytes, dtype=torch.uint8, device=cache.device)

        def quantize(piece: Piece) -> tuple[Piece, Tensor, Tensor]:
            symbols = self._symbols(cache, piece, side)
            packed = pack(symbols, piece.bits).cpu()
            return piece, packed, packed if coder.packed else symbols.flatten().view(torch.uint8).cpu()

        def code(quantized: tuple[Piece, Tensor, Tensor]) -> bytes | memoryview:
            piece, packed, plain = quantized
            coded = coder.compress(piece, plain.numpy().data)
            return coded if worth_coding(piece, coded) else packed.numpy().data

        if cache.device.type == "cpu":
            chosen = list(each(lambda piece: code(quantize(piece)), layout.pieces))
        else:
            chosen = list(each(code, [quantize(piece) for piece in layout.pieces]))
        header = msgspec.structs.replace(header, coded=[len(part) for part in chosen])
        sections = [side.cpu().numpy().data, *chosen, behind]
        payload, at = container.allocate(header, sum(len(section) for section in sections))
        for section in sections:
            payload[at : at + len(section)] = np.frombuffer(section, dtype=np.uint8)
            at += len(section)
        return container.seal(payload)

    def _encode_planes(self, cache: KVCache, header: Header, layout: Layout, behind: bytes) -> memoryview:
        """A payload of all but the symbols, and the symbols behind it, plane by plane."""
        import torch

        base, at = container.allocate(header, layout.side_bytes + len(behind))
        side = torch.zeros(layout.side_bytes, dtype=torch.uint8, device=cache.device)

        def symbols() -> Iterator[tuple[Piece, Tensor]]:
            for piece in layout.pieces:
                yield piece, self._symbols(cache, piece, side).flatten()

        chunks = progressive.write(symbols(), self.coder)
        base[at : at + layout.side_bytes] = side.cpu().numpy()
        base[at + layout.side_bytes :] = np.frombuffer(behind, dtype=np.uint8)
        return memoryview(b"".join([container.seal(base), *chunks]))

    @staticmethod
    def decode(payload: bytes | bytearray | memoryview, device: str | torch.device = "cpu") -> KVCache:
        """See `decode`."""
        return decode(payload, device)


def decode(payload: bytes | bytearray | memoryview, device: str | torch.device = "cpu") -> KVCache:
    """The cache that a payload holds: what was kept, with its positions, in the 16-bit format it had.

    Self-describing: any codec's payload is decoded. Raises PayloadError for bytes that `encode` did not write;
    allocates nothing that the payload's checked sizes do not justify.
    """
    beginning = decode_beginning(payload, device)
    if beginning.missing:
        raise PayloadError(beginning.missing)
    return beginning.cache


@dataclass(frozen=True)
class Beginning:
    """What the beginning of a payload decodes to. `missing` says what did not arrive; empty where nothing is missing."""

    cache: KVCache
    planes: int = 1  #: bit planes that are whole
    of: int = 1
    missing: str = ""


def decode_beginning(
    payload: bytes | bytearray | memoryview, device: str | torch.device = "cpu"
) -> Beginning:
    """As `decode`, but of a payload of bit planes that may be cut off anywhere: the best cache that its bytes allow.

    Raises PayloadError as `decode` does, and where header, scales, positions and the first plane are not all there.
    """
    whole, behind = container.split(payload)
    header, body = container.unseal(whole)
    codec = _codec_of(header)
    layout = lay_out(header.parts(), codec.quantizer)
    side, symbols, position_bytes, extra = _sections(header, layout, body, codec)
    if len(behind) and not codec.quantizer.embedded:
        raise PayloadError(f"the payload says {len(whole)} bytes, but {len(whole) + len(behind)} arrived")
    planes = progressive.read(behind, layout.pieces, codec.coder) if codec.quantizer.embedded else None
    held = layer_positions(header, position_bytes, device)
    decoded = _dequantize(codec, header, layout, side, planes or symbols, device)
    cache = _assemble(header, held, decoded)
    if codec.transform:
        cache = codec.transform.decode(cache, bytes(extra))
    elif len(extra):
        raise PayloadError("bytes of a transform in a payload without one")
    cache = ragged.restore(cache, held)
    cache = cache.to(dtype=torch_dtype(header.dtype))
    return Beginning(cache, planes.complete, planes.of, planes.missing) if planes else Beginning(cache)


def _codec_of(header: Header) -> Codec:
    """The codec that a payload names. One that refers to a file is refused: bytes from the network choose no files."""
    try:
        spec = parse(header.codec)
        if spec.refers:
            raise SpecError(f"{header.codec[:60]!r} refers to something outside the payload")
        return Codec(spec)
    except SpecError as error:
        raise PayloadError(f"payload header: {error}") from None


def _sections(header: Header, layout: Layout, body: memoryview, codec: Codec) -> tuple[memoryview, ...]:
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


def _dequantize(
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
    numbers = _tensor(side).to(device)
    read = _reader(codec.coder, header, layout, symbols, device)
    targets = _targets(layout, dtype, device)

    def dequantize(piece: Piece) -> Tensor:
        own = numbers[piece.side_at : piece.side_at + piece.side_bytes]
        return codec.quantizer.decode_into(piece.part, read(piece), own, targets[piece])

    return list(_each(torch.device(device), dequantize, layout.pieces))


def _targets(layout: Layout, dtype: torch.dtype, device: str | torch.device) -> dict[Piece, Tensor]:
    """Memory for each part's values, side by side in one block, each at a cache line's start."""
    import torch

    sizes = [-(-piece.part.elements * dtype.itemsize // 64) * 64 for piece in layout.pieces]
    if torch.device(device).type == "cpu":
        block = torch.from_numpy(bytes_for(sum(sizes)))
    else:
        block = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    targets, at = {}, 0
    for piece, size in zip(layout.pieces, sizes, strict=True):
        used = block[at : at + piece.part.elements * dtype.itemsize]
        typed = used.view(dtype) if len(used) else used.to(dtype)  # nothing has no stride to view it by
        targets[piece] = typed.view(piece.part.shape)
        at += size
    return targets


def _reader(
    coder: Coder | None,
    header: Header,
    layout: Layout,
    data: memoryview | Planes,
    device: str | torch.device,
) -> Callable[[Piece], Tensor]:
    """What gives a part's flat symbols. Expands where they are entropy-coded."""
    import torch

    if isinstance(data, Planes):
        known = dict(zip(layout.pieces, data.symbols, strict=True))
        return lambda piece: known[piece].to(device)
    if coder is None:
        packed = _tensor(data).to(device)

        def unpacked(piece: Piece) -> Tensor:
            own = packed[piece.symbols_at : piece.symbols_at + piece.symbol_bytes]
            return unpack(own, piece.symbols, piece.bits)

        return unpacked
    ends = itertools.accumulate(header.coded)
    coded = {
        piece: data[end - length : end]
        for piece, length, end in zip(layout.pieces, header.coded, ends, strict=True)
    }

    def expanded(piece: Piece) -> Tensor:
        part = coded[piece]
        if len(part) == piece.symbol_bytes:  # did not shrink, and was packed only
            return unpack(_tensor(part).to(device), piece.symbols, piece.bits)
        plain = _tensor(memoryview(coder.expand(piece, part))).to(device)
        if coder.packed:
            return unpack(plain, piece.symbols, piece.bits)
        return plain.view(torch.int16) if piece.bits == 16 else plain

    return expanded


def _each(device: torch.device, work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """Part by part; on several threads where the processor computes, and in order on a GPU, which has its own queue."""
    return each(work, pieces) if device.type == "cpu" else map(work, pieces)


def _assemble(header: Header, held: Sequence[Tensor], parts: Sequence[Tensor]) -> KVCache:
    from testbed.models.kvcache import KVCache, KVLayer

    layers = [
        KVLayer(keys, values, ragged.flat_positions(where), group.window)
        for keys, values, where, group in zip(parts[0::2], parts[1::2], held, header.layers, strict=True)
    ]
    return KVCache(layers, header.length)


def _write(section: Tensor, at: int, size: int, numbers: Tensor | None) -> None:
    """A part's side information, as bytes."""
    import torch

    if numbers is not None and size:
        section[at : at + size] = numbers.contiguous().flatten().view(torch.uint8)
        _zero_gap(section, at + size)


def _zero_gap(section: Tensor, end: int) -> None:
    """Zeros behind a piece, up to the next multiple of the alignment."""
    if end % ALIGNMENT:
        section[end : end + ALIGNMENT - end % ALIGNMENT] = 0


def _tensor(view: memoryview) -> Tensor:
    """Bytes as a tensor that shares them; nothing here writes to it."""
    import torch

    if len(view) == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only bytes; they stay unwritten
        return torch.frombuffer(view, dtype=torch.uint8)
