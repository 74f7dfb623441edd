"""Frames: what crosses the link between edge and cloud. Bounded, versioned, checked, and never pickled.

    0      4        5       6        8               12             20            24
    | TBED | version | kind | flags 0 | header length | payload length | header CRC | header | payload |

Integers are big-endian. The header is a MessagePack map that decodes into one of the structs below and nothing else;
the CRC-32 covers the fixed
part before it and the header. The payload follows as it is, so it can be sent from where it lies.

    edge → cloud    Request · Chunk · Chunk · … · End
    cloud → edge    Receipt for each chunk, where they are wanted · Enough · FirstToken · Answer · Verdict on it, or Failure

A request's context (a codec's bytes, or the prompt's text) comes in chunks, whose number and length nobody need know beforehand:
each is at most what is still allowed to come, and the end says what there was. Of a delivery in parts each chunk is a payload
that stands by itself, of the part and at the level that it names.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from testbed.errors import WireError

VERSION = 5
MAGIC = b"TBED"
PREFIX = struct.Struct("!4sBBHIQI")
MAX_HEADER = 64 * 1024
MAX_CHUNKS = 1 << 16
MAX_PARTS = 256  #: chunks of a delivery in parts, whose times an answer has to tell

Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Instant = Annotated[float, Meta(ge=0, le=1e10)]  #: seconds of the host's monotonic clock, never NaN
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Tokens = Annotated[int, Meta(ge=0, le=65536)]
Index = Annotated[int, Meta(ge=0, lt=MAX_CHUNKS)]
Planes = Annotated[int, Meta(ge=0, le=16)]
Text = Annotated[str, Meta(max_length=32 * 1024)]
Name = Annotated[str, Meta(max_length=512)]


class Request(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Edge to cloud: answer this. Its context follows: a codec's bytes (`split`) or its text (`cloud`)."""

    id: Count
    placement: Name
    codec: Name
    prefix: Name  #: digest of the prefix both sides must share
    question: Text
    stop: Name
    max_new_tokens: Annotated[int, Meta(ge=1, le=65536)]
    choices: Annotated[
        tuple[Text, ...], Meta(max_length=64)
    ] = ()  #: answer with the likeliest of these; none: decode freely
    same_as: Count = (
        0  #: an earlier request, equal to the last byte, whose answer may be given again; 0: none
    )
    replay: bool = False  #: such an answer comes as late as it was computed, even where nobody could tell
    delivery: Name = "whole"  #: how the context comes: what its chunks are
    client: Name = ""  #: whose request it is; its `id` and `same_as` are that client's numbers
    levels: Annotated[
        tuple[Name, ...], Meta(max_length=64)
    ] = ()  #: what chunks of a delivery in parts may be
    tokens: Count = 0  #: of the context, where it comes in parts
    receipts: bool = False  #: each chunk's arrival is to be told


class Chunk(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Edge to cloud: the next piece of a request's context, as the payload."""

    id: Count
    index: Count  #: 0, 1, …
    last: bool  #: nothing but the `End` follows; where the sender does not know yet, it says no
    crc: Count | None  #: of the payload; None: what it holds has a checksum of its own
    level: Index = 0  #: which of the request's levels
    start: Count = 0  #: the part: tokens of the context, or layers, from here …
    stop: Count = 0  #: … up to here


class End(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Edge to cloud: the request is whole, of so many chunks and bytes."""

    id: Count
    chunks: Count
    length: Count


class Receipt(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge: a chunk is there."""

    id: Count
    index: Index
    at: Instant


class Enough(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge: no further chunks are needed."""

    id: Count


class Clock(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Edge to cloud, between requests: what does your clock say?"""

    id: Count


class Clocked(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge: when that was received and answered. By the cloud's clock."""

    id: Count
    received: Instant
    answered: Instant


class Lack(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A chunk of which datagrams are missing. held: by block, its symbols that are there, a bit each, the first one lowest; for
    blocks behind these none is."""

    chunk: Index
    held: Annotated[tuple[Annotated[bytes, Meta(max_length=32)], ...], Meta(max_length=4096)] = ()


class Missing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge, behind a request's end: what of its chunks has not come, to be sent once more, and the end behind it."""

    id: Count
    lacks: Annotated[tuple[Lack, ...], Meta(max_length=MAX_CHUNKS)]


class FirstToken(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge, as soon as the first token is known."""

    id: Count
    token: Count
    sent_at: Instant


class Worked(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A stage at work at the cloud. chunk: on which one; tokens: of a text that came in part, prefilled."""

    stage: Literal["queue", "decode", "prefill", "first_token", "generate"]
    start: Instant
    end: Instant
    chunk: Index = 0
    tokens: Count = 0


class Answer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge, when the last token is known. Times are the cloud's, on the host's monotonic clock."""

    id: Count
    text: Text
    tokens: Tokens
    received_at: Instant  #: last byte of the request
    arrived: Annotated[
        tuple[Instant, ...], Meta(max_length=MAX_PARTS)
    ]  #: of a delivery in parts, each chunk's last byte
    worked: Annotated[tuple[Worked, ...], Meta(max_length=4 * MAX_PARTS)]  #: up to the first token, in order
    generate_s: Seconds  #: computing the others
    token_s: Seconds | None  #: computing one of the others, in the mean; None: there were none
    skipped_s: Seconds  #: of `generate_s`, what a reused answer did not wait for
    sent_at: Instant
    reused: bool
    retransmits: Count
    left_out: Count = 0  #: context tokens that the answer was given without
    planes: Planes = 0  #: bit planes that it was given from; 0: the context did not come in any


class Verdict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge, behind an answer from the first bit planes: what the answer is from all of them. Times as the answer's."""

    id: Count
    text: Text
    tokens: Tokens
    agreed: Tokens  #: of them, from the first one on, those that were the answer's
    arrived: Annotated[
        tuple[Instant, ...], Meta(max_length=MAX_PARTS)
    ]  #: last byte of each chunk behind those that the answer was given from
    worked: Annotated[
        tuple[Worked, ...], Meta(max_length=3)
    ]  #: behind the answer, in order; none: it had all planes
    sent_at: Instant


class Failure(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Cloud to edge: why there is no answer. refused: there was no room for the request."""

    id: Count
    message: Text
    refused: bool = False


Header = (
    Request
    | FirstToken
    | Answer
    | Failure
    | Chunk
    | End
    | Receipt
    | Enough
    | Verdict
    | Missing
    | Clock
    | Clocked
)
KINDS: dict[int, type[Header]] = {
    1: Request,
    2: FirstToken,
    3: Answer,
    4: Failure,
    5: Chunk,
    6: End,
    7: Receipt,
    8: Enough,
    9: Verdict,
    10: Missing,
    11: Clock,
    12: Clocked,
}
_KIND_OF = {struct_type: kind for kind, struct_type in KINDS.items()}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {kind: msgspec.msgpack.Decoder(struct_type) for kind, struct_type in KINDS.items()}


class Prefix(msgspec.Struct, frozen=True):
    """A frame's fixed part, checked: what is to be read next, and how much of it."""

    kind: int
    header_length: int
    payload_length: int
    crc: int
    raw: bytes


def pack(header: Header, payload_length: int = 0) -> bytes:
    """The frame up to its payload. Raises WireError where the header is larger than the format allows."""
    body = _ENCODER.encode(header)
    if len(body) > MAX_HEADER:
        raise WireError(f"header of {len(body)} bytes; at most {MAX_HEADER} fit a frame")
    kind = _KIND_OF[type(header)]
    fixed = PREFIX.pack(MAGIC, VERSION, kind, 0, len(body), payload_length, 0)[:-4]
    return fixed + struct.pack("!I", zlib.crc32(body, zlib.crc32(fixed))) + body


def unpack_prefix(data: bytes, max_payload: int) -> Prefix:
    """Check a frame's fixed part (`PREFIX.size` bytes). Raises WireError; nothing is allocated by what it claims."""
    if len(data) != PREFIX.size:
        raise WireError(f"truncated frame: {len(data)} of {PREFIX.size} bytes of its fixed part")
    magic, version, kind, flags, header_length, payload_length, crc = PREFIX.unpack(data)
    if magic != MAGIC:
        raise WireError(f"not a frame: it starts with {magic!r}")
    if version != VERSION:
        raise WireError(f"frame version {version}; this side speaks {VERSION}")
    if kind not in KINDS or flags != 0:
        raise WireError(f"unknown frame kind {kind} or flags {flags}")
    if header_length > MAX_HEADER:
        raise WireError(f"header of {header_length} bytes; at most {MAX_HEADER} are accepted")
    if payload_length > max_payload:
        raise WireError(f"payload of {payload_length} bytes; at most {max_payload} are accepted here")
    return Prefix(kind, header_length, payload_length, crc, data[:-4])


def unpack_header(prefix: Prefix, body: bytes) -> Header:
    """The header of a frame whose fixed part was accepted. Raises WireError."""
    if len(body) != prefix.header_length:
        raise WireError(f"truncated frame: {len(body)} of {prefix.header_length} header bytes")
    if zlib.crc32(body, zlib.crc32(prefix.raw)) != prefix.crc:
        raise WireError("a frame's header does not match its checksum")
    try:
        header: Header = _DECODERS[prefix.kind].decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"malformed frame header: {str(error)[:200]}") from error
    return header


class Assembly:
    """What may come of a request's context: chunks in order and complete, and never more of them than its bounds.

    lossy: in any order, each once, and some perhaps never.
    """

    def __init__(self, request: Request, bound: int, lossy: bool = False) -> None:
        self.request, self.lossy = request, lossy
        self.room = bound  #: bytes that may still come
        self._most = MAX_PARTS if request.levels else MAX_CHUNKS
        self._came: set[int] = set()
        self._length = 0
        self._last: int | None = None  #: the chunk that was said to be the last

    def take(self, header: Header, payload: memoryview) -> bool:
        """The next frame; returns whether nothing more comes. Raises WireError where it is not what has to come now."""
        if isinstance(header, End) and header.id == self.request.id:
            self._end(header)
            return True
        if not isinstance(header, Chunk) or header.id != self.request.id:
            raise WireError(f"a {type(header).__name__} frame inside another request's chunks")
        self._check_turn(header)
        if len(self._came) == self._most or len(payload) > self.room:
            raise WireError(
                f"a request of more than {self._most} chunks, or of more bytes than are accepted here"
            )
        if header.crc is not None and zlib.crc32(payload) != header.crc:
            raise WireError(f"chunk {header.index} of a request does not match its checksum")
        if self.request.levels and not (
            header.level < len(self.request.levels) and header.start <= header.stop
        ):
            raise WireError(
                f"chunk {header.index} of a request is at a level, or of a part, that there is not"
            )
        self._came.add(header.index)
        self._length += len(payload)
        self.room -= len(payload)
        self._last = header.index if header.last else self._last
        return False

    def _check_turn(self, header: Chunk) -> None:
        came, last = self._came, self._last
        if self.lossy and header.index not in came and header.index < self._most:
            if last is None or header.index < last:
                return
        elif not self.lossy and last is None and header.index == len(came):
            return
        expected = "nothing but its end" if last is not None else f"chunk {len(came)}"
        expected = "one that has not come" if self.lossy else expected
        raise WireError(f"chunk {header.index} of a request where {expected} was expected")

    def _end(self, header: End) -> None:
        came, beyond = len(self._came), max(self._came, default=-1) >= header.chunks
        missing = self.lossy and came < header.chunks <= self._most and not beyond
        if missing and header.length >= self._length:
            return
        if beyond or (header.chunks, header.length) != (came, self._length):
            raise WireError(
                f"a request ends with {header.chunks} chunks of {header.length} bytes; "
                f"{came} of {self._length} have come"
            )
