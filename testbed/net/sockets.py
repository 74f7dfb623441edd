"""Options of sockets that Python does not name. Standard library alone: isolated programs (`testbed.programs`) load it."""

from __future__ import annotations

import socket

SO_TIMESTAMPNS = 35
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


def enlarge_buffers(sock: socket.socket, receive_bytes: int, send_bytes: int) -> None:
    """As far as permitted: root in a user namespace of its own gets what everybody may have (net.core.rmem_max, wmem_max)."""
    for forced, allowed, size in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_bytes),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF, send_bytes),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, allowed, size)
