"""A link over loopback that stands still in mid-transfer, for good or for a while, or is cut there."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

_POLL_S = 0.02
_MOST = 65536


class Stalling:
    """Stands still, both ways, once `after` bytes have gone from the edge to the cloud: for `for_s` seconds, or for good.

    What comes by TCP meanwhile is held, as its sender would send it again; datagrams are lost. `stalled`: whether it has.
    cuts: instead, connections end there, and nobody listens for datagrams any more.
    """

    def __init__(self, port: int, after: int, for_s: float | None, cuts: bool = False) -> None:
        self._to, self._after, self._for_s, self._cuts = port, after, for_s, cuts
        self.stalled = threading.Event()
        self._lock = threading.Lock()
        self._sent, self._began = 0, 0.0
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def passes(self) -> bool:
        """Whether what comes now goes on."""
        with self._lock:
            if self._sent < self._after:
                return True
            if not self.stalled.is_set():
                self._began = time.monotonic()
                self.stalled.set()
            return self._for_s is not None and time.monotonic() > self._began + self._for_s

    def count(self, size: int) -> None:
        """So many bytes go from the edge to the cloud."""
        with self._lock:
            self._sent += size

    def _run(self, work: Callable[..., None], *about: object) -> None:
        thread = threading.Thread(target=work, args=about, daemon=True)
        self._threads.append(thread)
        thread.start()

    def tcp(self) -> int:
        """Begins to serve; returns the port to connect to."""
        listener = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            with listener:
                while not self._done.is_set():
                    if select.select([listener], [], [], _POLL_S)[0]:
                        edge = listener.accept()[0]
                        cloud = socket.create_connection(("127.0.0.1", self._to))
                        for sock in (edge, cloud):
                            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        self._run(self._pipe, edge, cloud, True)
                        self._run(self._pipe, cloud, edge, False)

        self._run(accept)
        return int(listener.getsockname()[1])

    def _pipe(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while not self._done.is_set():
                if not self.passes:
                    if self._cuts:
                        for sock in (source, sink):
                            sock.shutdown(socket.SHUT_RDWR)
                        break
                    time.sleep(_POLL_S)
                elif select.select([source], [], [], _POLL_S)[0]:
                    if not (data := source.recv(4096)):
                        sink.shutdown(socket.SHUT_WR)
                        return
                    if up:
                        self.count(len(data))
                    sink.sendall(data)
        for sock in (source, sink):
            sock.close()

    def udp(self) -> int:
        """Begins to serve; returns the port to send to."""
        front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        front.bind(("127.0.0.1", 0))

        def serve() -> None:
            peers: dict[tuple[str, int], socket.socket] = {}
            while not self._done.is_set() and (self.passes or not self._cuts):
                for sock in select.select([front, *peers.values()], [], [], _POLL_S)[0]:
                    with contextlib.suppress(OSError):
                        data, peer = sock.recvfrom(_MOST)
                        if sock is front and peer not in peers:
                            peers[peer] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                            peers[peer].connect(("127.0.0.1", self._to))
                        if not self.passes:
                            continue
                        if sock is front:
                            self.count(len(data))
                            peers[peer].send(data)
                        else:
                            front.sendto(data, next(p for p, s in peers.items() if s is sock))
            for sock in [front, *peers.values()]:
                sock.close()

        self._run(serve)
        return int(front.getsockname()[1])

    def stop(self) -> None:
        """Ends all that serves."""
        self._done.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def stalling(
    transport: str, port: int, after: int, for_s: float | None = None, cuts: bool = False
) -> Iterator[tuple[Stalling, int]]:
    """The link, and its port, in front of what serves `port` by that transport."""
    link = Stalling(port, after, for_s, cuts)
    try:
        yield link, link.tcp() if transport.startswith("tcp") else link.udp()
    finally:
        link.stop()
