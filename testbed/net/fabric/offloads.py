"""Segmentation offloads of an interface, off: every packet on an emulated link is one that could be on a
wire.

With them on, TCP hands a veth "packets" of up to 64 kB, which a queue counts as one and a loss takes as a
whole. All features of that kind go off by name, also the ones ethtool's short names leave out
(``tx-udp-segmentation``, which QUIC stacks use). An emulator that sees through such packets may have TCP's, capped
to a fraction of a millisecond of the link's rate, where they spare much of its work. Checksums stay offloaded:
nobody needs them on a link inside one machine. See ethtool(8) and the kernel's
include/uapi/linux/ethtool.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import re
import socket
import struct
from collections.abc import Callable

from testbed.errors import NetworkError

_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _GFEATURES, _SFEATURES = 0x1B, 0x37, 0x3A, 0x3B
_FEATURE_STRINGS = 4
_NAME_BYTES = 32
_SEGMENTATION = re.compile(r"tx-.*segmentation|tx-gso-(partial|list)|rx-gro.*|rx-udp-gro-forwarding|rx-lro")
_TCP_SEGMENTATION = re.compile(r"tx-tcp6?-segmentation")
_NAMES: list[str] = []  # of features, in their order: the same for every interface of a kernel


class Ethtool:
    """The ethtool requests for interfaces of the namespace in which this is made. Close it, or use it in a
    ``with``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> Ethtool:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def features(self, interface: str) -> dict[str, bool]:
        """Feature -> whether it is active, under ethtool's long names."""
        active = self._bits(interface)[1]
        return {name: bool(active >> index & 1) for index, name in enumerate(self._features(interface))}

    def disable_segmentation(self, interface: str) -> None:
        """Turns every segmentation and coalescing feature off and reads back that it is. Raises
        NetworkError."""
        self._off(interface, _is_segmentation)

    def allow_tcp_segmentation_alone(self, interface: str) -> None:
        """Turns every such feature off but TCP's, which stays as it is: TCP may hand over several segments as one packet, for an
        emulator that knows what they are. Raises NetworkError."""
        self._off(interface, _is_not_tcps)

    def enable_tcp_segmentation(self, interface: str) -> None:
        """Lets TCP hand over several segments as one packet. Raises NetworkError."""
        changeable, _ = self._bits(interface)
        self._set(interface, changeable & self._mask(interface, _is_tcps), True)

    def _off(self, interface: str, chosen: Callable[[str], bool]) -> None:
        # Two questions an interface, and none for each feature: a network of a thousand nodes has four thousand interfaces.
        mask = self._mask(interface, chosen)
        self._set(interface, mask, False)
        if left := self._bits(interface)[1] & mask:
            names = ", ".join(
                name for index, name in enumerate(self._features(interface)) if left >> index & 1
            )
            raise NetworkError(
                f"{interface}: the kernel keeps {names} on; packets would be larger than the MTU"
            )

    def _mask(self, interface: str, chosen: Callable[[str], bool]) -> int:
        return _mask(tuple(self._features(interface)), chosen)

    def _set(self, interface: str, mask: int, on: bool) -> None:
        # What cannot be changed the kernel leaves as it is.
        blocks = -(-len(self._features(interface)) // 32)
        valid = [mask >> 32 * block & 0xFFFFFFFF for block in range(blocks)]
        pairs = [word for block in valid for word in (block, block if on else 0)]
        self._ask(interface, bytearray(struct.pack(f"=II{2 * blocks}I", _SFEATURES, blocks, *pairs)))

    def _bits(self, interface: str) -> tuple[int, int]:
        # which features can be changed, and which are active: bits in the kernel's order
        blocks = -(-len(self._features(interface)) // 32)
        answer = self._ask(
            interface, bytearray(struct.pack("=II", _GFEATURES, blocks)) + bytearray(16 * blocks)
        )
        changeable = active = 0
        for block, (available, _, on, never_changed) in enumerate(struct.iter_unpack("=4I", answer[8:])):
            changeable |= (available & ~never_changed) << 32 * block
            active |= on << 32 * block
        return changeable, active

    def _features(self, interface: str) -> list[str]:
        if not _NAMES:
            question = bytearray(struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _FEATURE_STRINGS, 0))
            (count,) = struct.unpack_from("=I", self._ask(interface, question), 16)
            question = bytearray(struct.pack("=III", _GSTRINGS, _FEATURE_STRINGS, count)) + bytearray(
                _NAME_BYTES * count
            )
            text = self._ask(interface, question)[12:]
            cells = [
                text[start : start + _NAME_BYTES] for start in range(0, _NAME_BYTES * count, _NAME_BYTES)
            ]
            _NAMES[:] = [cell.partition(b"\0")[0].decode("ascii", "replace") for cell in cells]
        return _NAMES

    def _ask(self, interface: str, data: bytearray) -> bytes:
        buffer = (ctypes.c_char * len(data)).from_buffer(data)
        request = struct.pack("16sQ16x", interface.encode(), ctypes.addressof(buffer))
        try:
            fcntl.ioctl(self._socket, _SIOCETHTOOL, request)
        except OSError as error:
            raise NetworkError(f"{interface}: cannot read or set its offloads: {error.strerror}") from None
        return bytes(data)


@functools.cache
def _mask(names: tuple[str, ...], chosen: Callable[[str], bool]) -> int:
    return sum(1 << index for index, name in enumerate(names) if chosen(name))


def _is_segmentation(name: str) -> bool:
    return bool(_SEGMENTATION.fullmatch(name))


def _is_not_tcps(name: str) -> bool:
    return _is_segmentation(name) and not _is_tcps(name)


def _is_tcps(name: str) -> bool:
    return bool(_TCP_SEGMENTATION.fullmatch(name))
