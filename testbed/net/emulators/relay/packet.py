"""Packets as a packet socket with PACKET_VNET_HDR gives and takes them: struct virtio_net_hdr, Ethernet header, IP packet.

A "packet" may be a super-packet, several TCP segments or UDP datagrams that share one header (generic segmentation offload):
`measure` says what they would take on a wire, `cut` makes a smaller one of some of them. See packet(7), udp(7) (UDP_SEGMENT) and
linux/virtio_net.h.
"""

from __future__ import annotations

import struct

VNET_HEADER = 10  # flags, gso_type (bytes), hdr_len, gso_size, csum_start, csum_offset
ETHERNET_HEADER = 14
HEADERS = VNET_HEADER + ETHERNET_HEADER

_VNET = struct.Struct("=BBHHHH")
_NEEDS_CHECKSUM = 1
_UDP = 5  # VIRTIO_NET_HDR_GSO_UDP_L4; the other kinds are TCP's
_UDP_HEADER, _TCP_HEADER = 8, 20  # bytes, without options
_ECT = (1, 2)
_FIN_PSH, _CWR = 0x09, 0x80


def measure(frame: bytes) -> tuple[int, int]:
    """Bytes of the network layer and packets that a super-packet amounts to on a wire."""
    segments, headers, payload, _ = _layout(frame)
    return payload + segments * (headers - ETHERNET_HEADER), segments


def _layout(frame: bytes) -> tuple[int, int, int, int]:
    # segments, bytes of all headers (without struct virtio_net_hdr), payload, bytes of payload in a segment
    _, kind, _, gso_size, start, _ = _VNET.unpack_from(frame)
    transport = VNET_HEADER + start
    least = _UDP_HEADER if kind == _UDP else _TCP_HEADER
    if not gso_size or len(frame) < transport + least:
        return 1, ETHERNET_HEADER, len(frame) - HEADERS, max(1, len(frame) - HEADERS)
    headers = start + (least if kind == _UDP else (frame[transport + 12] >> 4) * 4)
    payload = len(frame) - VNET_HEADER - headers
    return max(1, -(-payload // gso_size)), headers, payload, gso_size


def cut(frame: bytes, first: int, count: int) -> bytes:
    """The segments or datagrams from *first* on, *count* of them, as a packet of their own. RFC 9293, RFC 768; the kernel's
    tcp_gso_segment and __udp_gso_segment."""
    flags, kind, _, _, start, offset = _VNET.unpack_from(frame)
    segments, headers, payload, size = _layout(frame)
    body = frame[
        VNET_HEADER + headers + first * size : VNET_HEADER + headers + min(payload, (first + count) * size)
    ]
    head = bytearray(frame[VNET_HEADER : VNET_HEADER + headers])
    _set_ip(head, first, headers - ETHERNET_HEADER + len(body), start)
    if kind == _UDP:
        struct.pack_into("!H", head, start + 4, _UDP_HEADER + len(body))
    else:
        _set_tcp(head, start, first * size, bool(first), first + count >= segments)
    # What is there is the sum over the pseudo-header, which has the length in it; the kernel adds the rest.
    (partial,) = struct.unpack_from("!H", head, start + offset)
    change = (headers - start + len(body)) - (headers - start + payload)
    struct.pack_into("!H", head, start + offset, _fold(partial + (change % 0xFFFF)))
    kind, size = (kind, size) if len(body) > size else (0, 0)
    return _VNET.pack(flags, kind, headers, size, start, offset) + bytes(head) + body


def split(frame: bytes) -> list[bytes]:
    """A super-packet's segments, each a packet."""
    return [cut(frame, number, 1) for number in range(_layout(frame)[0])]


def _set_tcp(head: bytearray, start: int, before: int, later: bool, last: bool) -> None:
    (sequence,) = struct.unpack_from("!I", head, start + 4)
    struct.pack_into("!I", head, start + 4, (sequence + before) & 0xFFFFFFFF)
    if not last:
        head[start + 13] &= ~_FIN_PSH & 0xFF
    if later:
        head[start + 13] &= ~_CWR & 0xFF


def _set_ip(head: bytearray, first: int, length: int, start: int) -> None:
    at = ETHERNET_HEADER
    if head[at] >> 4 == 4:
        (identity,) = struct.unpack_from("!H", head, at + 4)
        struct.pack_into("!H", head, at + 2, length)
        struct.pack_into("!H", head, at + 4, (identity + first) & 0xFFFF)
        _checksum_ip(head, at)
    else:
        struct.pack_into("!H", head, at + 4, length - 40)


def mark_congestion(frame: bytes) -> bytes | None:
    """The packet with "congestion experienced" where its sender understands that, else None. RFC 3168."""
    at = HEADERS
    if len(frame) < at + 20:
        return None
    version = frame[at] >> 4
    kind = frame[at - 2 : at]
    if version == 4 and kind == b"\x08\x00":
        codepoint = frame[at + 1] & 3
    elif version == 6 and kind == b"\x86\xdd":
        codepoint = frame[at + 1] >> 4 & 3
    else:
        return None
    if codepoint == 3:
        return frame
    if codepoint not in _ECT:
        return None
    marked = bytearray(frame)
    marked[at + 1] |= 3 if version == 4 else 3 << 4
    if version == 4:
        _checksum_ip(marked, at)
    return bytes(marked)


def corrupt(frame: bytes, bit: int) -> bytes:
    """An ordinary packet with one bit behind the Ethernet header flipped, *bit* modulo their number.

    Its checksum is finished before, so that the receiver's kernel finds the error.
    """
    damaged = bytearray(finish_checksum(frame))
    if len(damaged) > HEADERS:
        bit %= 8 * (len(damaged) - HEADERS)
        damaged[HEADERS + bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def finish_checksum(frame: bytes) -> bytes:
    """The packet with the transport checksum that its sender had left to the network card."""
    flags, _, _, _, start, offset = _VNET.unpack_from(frame)
    at = VNET_HEADER + start + offset
    if not flags & _NEEDS_CHECKSUM or len(frame) < at + 2:
        return frame
    done = bytearray(frame)
    done[:VNET_HEADER] = bytes(VNET_HEADER)
    total = 0xFFFF & ~_sum(done[VNET_HEADER + start :])
    struct.pack_into("!H", done, at, total or 0xFFFF)
    return bytes(done)


def _checksum_ip(data: bytearray, at: int) -> None:
    end = at + (data[at] & 15) * 4
    data[at + 10 : at + 12] = b"\0\0"
    struct.pack_into("!H", data, at + 10, 0xFFFF & ~_sum(data[at:end]))


def _sum(data: bytes | bytearray) -> int:
    if len(data) % 2:
        data = bytes(data) + b"\0"
    return _fold(sum(struct.unpack(f"!{len(data) // 2}H", data)))


def _fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
