"""A UDP port that passes on to another what it is not told to lose: both ways, for each client by a socket of its own."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable

#: Which client it is (from 0, in the order in which they came), whether it is on the way to the server, and how many datagrams
#: of that client's were before it that way.
Loses = Callable[[int, bool, int], bool]


class LossyProxy:
    """Ends with its `with`."""

    def __init__(self, port: int, loses: Loses) -> None:
        self.loses = loses
        self._server = ("127.0.0.1", port)
        self._near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._near.bind(("127.0.0.1", 0))
        self.port = self._near.getsockname()[1]
        self._clients: dict[tuple[str, int], int] = {}
        self._far: list[socket.socket] = []
        self._seen: dict[tuple[int, bool], int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._near, selectors.EVENT_READ, None)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LossyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        for sock in (self._near, *self._far):
            sock.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            for key, _ in self._selector.select(0.05):
                try:
                    self._pass_on(key.data)
                except (ConnectionError, BlockingIOError):
                    pass

    def _pass_on(self, back: tuple[int, tuple[str, int]] | None) -> None:
        """One datagram; back: of which client's socket, and the client."""
        if back is not None:
            number, client = back
            data = self._far[number].recv(65536)
            if not self._lost(number, False):
                self._near.sendto(data, client)
            return
        data, client = self._near.recvfrom(65536)
        if client not in self._clients:
            number = self._clients[client] = len(self._far)
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect(self._server)
            self._far.append(sock)
            self._selector.register(sock, selectors.EVENT_READ, (number, client))
        number = self._clients[client]
        if not self._lost(number, True):
            self._far[number].send(data)

    def _lost(self, number: int, there: bool) -> bool:
        count = self._seen.get((number, there), 0)
        self._seen[number, there] = count + 1
        return self.loses(number, there, count)
