"""Programs of ours that carry packets, or measure how they are carried: each a process of its own, there in milliseconds and as
punctual as this machine permits. So they import the standard library and this package's own parts alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
"""Where such a program finds this package."""
SO_TIMESTAMPNS = 35
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_LOAD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from {} import main; main()"


def command(module: str, *arguments: str) -> list[str]:
    """What starts *module*'s ``main`` with these *arguments*, isolated and without site-packages."""
    return [sys.executable, "-I", "-S", "-c", _LOAD.format(module), str(PACKAGE), *arguments]


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


def schedule_in_real_time(priority: int) -> bool:
    """Lets the kernel run this process before all ordinary ones; whether that was permitted. sched(7)."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError:
        return False
    return True


def end_sleeps_exactly() -> None:
    """Has no timer of this process come late to spare the processor, where that is permitted. prctl(2), PR_SET_TIMERSLACK."""
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1")
