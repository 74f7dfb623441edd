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
import re
import socket
import struct

from testbed.errors import NetworkError

_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _GFEATURES, _SFEATURES = 0x1B, 0x37, 0x3A, 0x3B
_FEATURE_STRINGS = 4
_NAME_BYTES = 32
_SEGMENTATION = re.compile(r"tx-.*segmentation|tx-gso-(partial|list)|rx-gro.*|rx-udp-gro-forwarding|rx-lro")


class Ethtool:
    """The ethtool requests for interfaces of the namespace in which this is made. Close it, or use it in a
    ``with``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._names: list[str] = []

    def __enter__(self) -> Ethtool:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def features(self, interface: str) -> dict[str, bool]:
        """Feature -> whether it is active, under ethtool's long names."""
        return {name: bool(active) for name, _, active in self._read(interface)}

    def disable_segmentation(self, interface: str) -> None:
        """Turns every segmentation and coalescing feature off and reads back that it is. Raises
        NetworkError."""
        self._set(interface, _SEGMENTATION, False)
        left = [
            name
            for name, active in self.features(interface).items()
            if active and _SEGMENTATION.fullmatch(name)
        ]
        if left:
            raise NetworkError(
                f"{interface}: the kernel keeps {', '.join(left)} on; packets would be larger than the MTU"
            )

    def enable_tcp_segmentation(self, interface: str) -> None:
        """Lets TCP hand over several segments as one packet; for an emulator that knows what they are. Raises
        NetworkError."""
        self._set(interface, re.compile(r"tx-tcp6?-segmentation"), True)

    def _set(self, interface: str, pattern: re.Pattern[str], on: bool) -> None:
        blocks = -(-len(self._features(interface)) // 32)
        valid = [0] * blocks
        for index, (name, changeable, _) in enumerate(self._read(interface)):
            if changeable and pattern.fullmatch(name):
                valid[index // 32] |= 1 << index % 32
        pairs = [word for block in valid for word in (block, block if on else 0)]
        self._ask(interface, bytearray(struct.pack(f"=II{2 * blocks}I", _SFEATURES, blocks, *pairs)))

    def _read(self, interface: str) -> list[tuple[str, bool, bool]]:
        # (name, can be changed, is active), in the kernel's order
        names = self._features(interface)
        blocks = -(-len(names) // 32)
        answer = self._ask(
            interface, bytearray(struct.pack("=II", _GFEATURES, blocks)) + bytearray(16 * blocks)
        )
        words = struct.unpack_from(f"={4 * blocks}I", answer, 8)
        found = []
        for index, name in enumerate(names):
            available, _, active, never_changed = words[index // 32 * 4 : index // 32 * 4 + 4]
            bit = 1 << index % 32
            found.append((name, bool(available & ~never_changed & bit), bool(active & bit)))
        return found

    def _features(self, interface: str) -> list[str]:
        # the same for every interface of a kernel
        if not self._names:
            question = bytearray(struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _FEATURE_STRINGS, 0))
            (count,) = struct.unpack_from("=I", self._ask(interface, question), 16)
            question = bytearray(struct.pack("=III", _GSTRINGS, _FEATURE_STRINGS, count)) + bytearray(
                _NAME_BYTES * count
            )
            text = self._ask(interface, question)[12:]
            cells = [
                text[start : start + _NAME_BYTES] for start in range(0, _NAME_BYTES * count, _NAME_BYTES)
            ]
            self._names = [cell.partition(b"\0")[0].decode("ascii", "replace") for cell in cells]
        return self._names

    def _ask(self, interface: str, data: bytearray) -> bytes:
        buffer = (ctypes.c_char * len(data)).from_buffer(data)
        request = struct.pack("16sQ16x", interface.encode(), ctypes.addressof(buffer))
        try:
            fcntl.ioctl(self._socket, _SIOCETHTOOL, request)
        except OSError as error:
            raise NetworkError(f"{interface}: cannot read or set its offloads: {error.strerror}") from None
        return bytes(data)
