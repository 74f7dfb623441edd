"""Whether a program in a namespace listens: read from the kernel's tables, so that no server meets a caller who asks nothing."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from testbed.errors import NetworkError
from testbed.hosts import namespaces

_LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h
_LOOK_S = 0.01


def ports() -> set[int]:
    """The TCP ports at which something listens in this thread's namespace. proc(5), /proc/net/tcp."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == _LISTEN:
                    found.add(int(local.rpartition(":")[2], 16))
    return found


def await_port(namespace: str, port: int, timeout_s: float) -> None:
    """Waits until something in the namespace listens at the port. Raises NetworkError where nothing does in time."""
    until = time.monotonic() + timeout_s
    while port not in namespaces.call_inside(namespace, ports):
        if time.monotonic() > until:
            raise NetworkError(f"nothing in {namespace} listens at port {port} after {timeout_s:g} s")
        time.sleep(_LOOK_S)
