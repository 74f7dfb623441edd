"""A codec at work: selects, encodes to true bytes, decodes on another machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from testbed.codecs import CodecError, cache_format, progressive, ragged, transform
from testbed.codecs.cache_format import (
    CacheShape,
    Header,
    check_fits,
    check_positions,
    describe,
    dtype_name,
    layer_positions,
    torch_dtype,
)
from testbed.codecs.entropy import MOST_EXPANSION, compressed
from testbed.codecs.evidence import Evidence, Kept, Needs
from testbed.codecs.fast.batch import Reader, Writer, as_tensor
from testbed.codecs.fast.pinned import is_gpu, on_host
from testbed.codecs.fast.threads import runs
from testbed.codecs.layout import Layout, lay_out
from testbed.codecs.progressive import Planes
from testbed.codecs.spec import CodecSpec, parse
from testbed.codecs.steps import Coder, Piece, Quantizer
from testbed.errors import PayloadError, SpecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.select import Selector
    from testbed.codecs.steps import Transform
    from testbed.models.kvcache import KVCache

Bytes = bytes | bytearray | memoryview


def sections(header: Header, layout: Layout, body: memoryview, codec: Codec) -> tuple[memoryview, ...]:
    """The four sections, whose lengths must fill the body. Those of an embedded code hold no symbols."""
    coded = codec.coder is not None and not codec.quantizer.planes
    if len(header.coded) != (len(layout.pieces) if coded else 0):
        raise PayloadError(f"{len(header.coded)} coded parts in a payload of {len(layout.pieces)} parts")
    lengths = [
        layout.side_bytes,
        sum(header.coded) if coded else 0 if codec.quantizer.planes else layout.symbol_bytes,
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
            expanded = _expanded(codec.coder, header, layout, symbols, device)
            # Expanded and read while it is close to the core; a GPU is given all parts at once.
            for own in [range(i, i + 1) for i in which] if device.type == "cpu" else [which]:
                reader.read(own, expanded)

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


class Codec:
    """Runs the stages of a spec (or of its text; raises SpecError). model: whose caches; codecs that refer to it need it."""

    def __init__(self, spec: CodecSpec | str, model: str | None = None) -> None:
        self.spec = (parse(spec) if isinstance(spec, str) else spec).bound(model)
        self.selector = cast("Selector | None", self.spec.selector)
        self.quantizer = self.spec.quantizer
        self.transform = cast("Transform | None", self.spec.transform) or self.quantizer.own_transform
        self.coder = cast(Coder | None, self.spec.coder) or self.quantizer.own_coder

    def __str__(self) -> str:
        return str(self.spec)

    @property
    def needs(self) -> Needs:
        """Which queries the edge must keep for `select`."""
        return Needs.of_all([self.selector.needs() if self.selector else Needs(), self.quantizer.needs()])

    @property
    def selects(self) -> bool:
        """Whether `select` decides anything, for which the whole context must be there."""
        return self.selector is not None or self._prunes

    @property
    def _prunes(self) -> bool:
        """Whether the quantizer chooses channels by the evidence."""
        return type(self.quantizer).channels is not Quantizer.channels

    @property
    def asks(self) -> bool:
        """Whether what `select` keeps depends on the request: its question, or its answer."""
        return self.needs.question or self.needs.answer

    @property
    def undoes_rope(self) -> bool:
        """Whether `encode` makes use of a cache that knows its rotary embedding."""
        turns = self.selector is not None and self.selector.together
        return turns or (self.transform is not None and self.transform.undoes_rope)

    def select(self, evidence: Evidence) -> Kept:
        """The context tokens to send, and the channels. Raises CodecError where the evidence lacks what that needs."""
        kept = self.selector.select(evidence) if self.selector else Kept.everything(evidence.cache)
        if not self._prunes:
            return kept
        channels = [
            self.quantizer.channels(evidence, i, together=index is not None and bool((index < 0).any()))
            for i, index in enumerate(kept.layers)
        ]
        return replace(kept, channels=tuple(each for each in channels if each is not None))

    def encode(self, cache: KVCache, kept: Kept | None = None) -> memoryview:
        """The payload of the kept tokens (None: all) of a context's cache, which is in 16 bits. Its length is what crosses.

        Equal caches give equal bytes. Raises CodecError for a cache that the format or the quantizer cannot hold.
        """
        return _joined(self.chunks(cache, kept))

    def chunks(self, cache: KVCache, kept: Kept | None = None) -> list[memoryview]:
        """The same, in the pieces of which a decoder can make something: bit planes one by one, behind what they are read with;
        else all in one. Raises as `encode` does.
        """
        held, header, layout, behind = self._prepared(cache, kept)
        if self.quantizer.planes:
            chunks = self._encode_planes(held, header, layout, behind)
        elif self.coder:
            chunks = [self._encode_coded(self.coder, held, header, layout, behind)]
        else:
            chunks = [self._encode_packed(held, header, layout, behind)]
        check_positions(header.groups, sum(map(len, chunks)))
        return chunks

    def _encode_packed(self, held: KVCache, header: Header, layout: Layout, behind: bytes) -> memoryview:
        import torch

        body_bytes = layout.side_bytes + layout.symbol_bytes
        payload, at = cache_format.allocate(header, body_bytes + len(behind), is_gpu(held.device))
        body = torch.from_numpy(payload[at : at + body_bytes])
        target = body if held.device.type == "cpu" else torch.empty_like(body, device=held.device)
        side, packed = target[: layout.side_bytes], target[layout.side_bytes :]
        writer = Writer(self.quantizer, held, layout, side, packed)
        runs(writer.write, len(layout.pieces), held.device, even=True)
        if target is not body:
            body.copy_(target)
        payload[at + body_bytes :] = np.frombuffer(behind, dtype=np.uint8)
        return cache_format.seal(payload)

    def symbols(self, cache: KVCache, kept: Kept | None = None) -> Iterator[tuple[Piece, Tensor]]:
        """Each part's uint8 symbols as the quantizer makes them, before they are packed or coded. Raises as `encode` does."""
        import torch

        held, _, layout, _ = self._prepared(cache, kept)
        side = torch.empty(layout.side_bytes, dtype=torch.uint8, device=cache.device)
        writer = Writer(self.quantizer, held, layout, side, side.new_empty(0))
        for i, piece in enumerate(layout.pieces):
            yield piece, writer.symbols(i).flatten()

    def _prepared(self, cache: KVCache, kept: Kept | None) -> tuple[KVCache, Header, Layout, bytes]:
        """What is to be quantized, what the payload says of it, and the bytes behind the symbols."""
        held = ragged.without_empty_places(kept.apply(cache) if kept else cache)
        dtype = dtype_name(held)
        groups, lists, position_bytes = describe(held)
        held = ragged.flatten(held)
        extra = b""
        if self.transform:
            held, extra = transform.encode(self.transform, held, self.quantizer)
        header = Header(str(self.spec), cache.length, dtype, groups, lists, [], len(extra))
        return held, header, lay_out(header.parts(), self.quantizer), position_bytes + extra

    def _encode_coded(
        self, coder: Coder, cache: KVCache, header: Header, layout: Layout, behind: bytes
    ) -> memoryview:
        import msgspec
        import torch

        side = torch.empty(layout.side_bytes, dtype=torch.uint8, device=cache.device)
        packed = torch.empty(layout.symbol_bytes, dtype=torch.uint8, device=cache.device)
        writer = Writer(self.quantizer, cache, layout, side, packed)

        def code(which: range) -> list[bytes | memoryview]:
            chosen = []
            for i in which:
                if packed is host:
                    writer.write(range(i, i + 1))
                piece = layout.pieces[i]
                chosen.append(
                    compressed(coder, piece, host[piece.symbols_at : piece.symbols_at + piece.symbol_bytes])
                )
            return chosen

        host = packed
        if cache.device.type != "cpu":
            writer.write(range(len(layout.pieces)))
            host = on_host(packed)
        chosen = [part for run in runs(code, len(layout.pieces), host.device) for part in run]
        header = msgspec.structs.replace(header, coded=[len(part) for part in chosen])
        sections = [on_host(side).numpy().data, *chosen, behind]
        payload, at = cache_format.allocate(header, sum(len(section) for section in sections))
        for section in sections:
            payload[at : at + len(section)] = np.frombuffer(section, dtype=np.uint8)
            at += len(section)
        return cache_format.seal(payload)

    def _encode_planes(
        self, cache: KVCache, header: Header, layout: Layout, behind: bytes
    ) -> list[memoryview]:
        """A payload of all but the symbols, and the symbols behind it, plane by plane."""
        import torch

        base, at = cache_format.allocate(header, layout.side_bytes + len(behind))
        side = torch.zeros(layout.side_bytes, dtype=torch.uint8, device=cache.device)

        writer = Writer(self.quantizer, cache, layout, side, side.new_empty(0))
        symbols = ((piece, writer.symbols(i).flatten()) for i, piece in enumerate(layout.pieces))
        planes = progressive.write(symbols, self.coder)
        base[at : at + layout.side_bytes] = on_host(side).numpy()
        base[at + layout.side_bytes :] = np.frombuffer(behind, dtype=np.uint8)
        return [cache_format.seal(base), *(memoryview(plane) for plane in planes)]


def _joined(chunks: Sequence[Bytes]) -> memoryview:
    """The chunks in one; a single one stays where it lies."""
    return memoryview(chunks[0] if len(chunks) == 1 else b"".join(chunks))


@dataclass(frozen=True)
class Beginning:
    """What the beginning of a payload decodes to. `missing` says what did not arrive; empty where nothing is missing."""

    cache: KVCache
    planes: int = 1  #: bit planes that are whole
    of: int = 1
    missing: str = ""


class Decoder:
    """Takes a payload in chunks, cut anywhere, and makes of them the cache that it holds: what was kept, with its positions, in
    the 16-bit format it had.

    Self-describing: any codec's payload is decoded. PayloadError is raised for bytes that `encode` did not write, and for a
    cache of another `shape` than the model's, where that is given; nothing is allocated that the payload's checked sizes do
    not justify.
    """

    def __init__(self, device: str | torch.device = "cpu", shape: CacheShape | None = None) -> None:
        self._device, self._shape = device, shape
        self._chunks: list[Bytes] = []

    def feed(self, chunk: Bytes) -> None:
        """What comes next."""
        self._chunks.append(chunk)

    def finish(self) -> KVCache:
        """The cache, now that all has come. Raises PayloadError."""
        ready = self.ready()
        if ready.missing:
            raise PayloadError(ready.missing)
        return ready.cache

    def ready(self) -> Beginning:
        """The best cache that what has come so far allows: of bit planes, though they be cut off anywhere; of others, the whole.

        Raises PayloadError where header, scales, positions and the first plane are not all there.
        """
        self._chunks = [_joined(self._chunks or [b""])]
        whole, behind = cache_format.split(self._chunks[0])
        header, body = cache_format.unseal(whole)
        if self._shape is not None:
            check_fits(header, self._shape)
        codec = _codec_of(header)
        try:
            layout = lay_out(header.parts(), codec.quantizer)
        except SpecError as error:  # it lacks what its sizes follow from
            raise PayloadError(str(error)) from None
        side, symbols, position_bytes, extra = sections(header, layout, body, codec)
        if len(behind) and not codec.quantizer.planes:
            raise PayloadError(f"the payload says {len(whole)} bytes, but {len(whole) + len(behind)} arrived")
        planes = progressive.read(behind, layout.pieces, codec.coder) if codec.quantizer.planes else None
        try:
            check_positions(header.groups, len(whole) + len(behind))
        except CodecError as error:
            raise PayloadError(str(error)) from None
        held = layer_positions(header, position_bytes, self._device)
        decoded = dequantize(codec, header, layout, side, planes or symbols, self._device)
        cache = assemble(header, held, decoded)
        if codec.transform:
            cache = transform.decode(codec.transform, cache, bytes(extra), torch_dtype(header.dtype))
        elif len(extra):
            raise PayloadError("bytes of a transform in a payload without one")
        cache = ragged.restore(cache, held)
        return Beginning(cache, planes.complete, planes.of, planes.missing) if planes else Beginning(cache)


def decode(payload: Bytes, device: str | torch.device = "cpu", shape: CacheShape | None = None) -> KVCache:
    """The cache of a payload that is all there; see `Decoder`. Raises PayloadError."""
    decoder = Decoder(device, shape)
    decoder.feed(payload)
    return decoder.finish()


def _codec_of(header: Header) -> Codec:
    """The codec that a payload names. One that refers to a file is refused: bytes from the network choose no files."""
    try:
        spec = parse(header.codec)
        if spec.refers:
            raise SpecError(f"{header.codec[:60]!r} refers to something outside the payload")
        return Codec(spec)
    except SpecError as error:
        raise PayloadError(f"payload header: {error}") from None
