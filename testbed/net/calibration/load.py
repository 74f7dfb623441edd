"""TCP flows across many links at once, each as fast as it goes: what a machine carries in all, and what loads it meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from testbed.hosts.namespaces import call_inside
from testbed.net.calibration.probes import Network
from testbed.net.topology.topology import Link

_CHUNK, _BUFFER = 1 << 17, 1 << 18
_CONNECT_S = 10.0
TCP_SHARE = 1448 / 1500  # of the network layer's bytes, what TCP with time stamps and IPv4 leave for payload


class Load:
    """What has arrived of each flow so far, by link."""

    def __init__(self) -> None:
        self.received: dict[str, int] = {}

    def rates_bps(self, settle_s: float, seconds: float) -> dict[str, float]:
        """Payload, in bits per second, that arrived on each link from *settle_s* on for *seconds*; it waits for as long."""
        time.sleep(settle_s)
        begun, before = time.monotonic(), dict(self.received)
        time.sleep(seconds)
        after, lasted = dict(self.received), time.monotonic() - begun
        return {link: 8 * (after[link] - before[link]) / lasted for link in before}


class Ends(NamedTuple):
    """A flow's: its name, the node that sends, and the one that receives at that address of its own."""

    name: str
    sender: str
    receiver: str
    address: str


@contextlib.contextmanager
def loaded(network: Network, links: Sequence[Link]) -> Iterator[Load]:
    """A flow up each of these links while the block runs. Raises OSError where one does not connect."""
    with flowing(network, [Ends(k.name, k.a, k.b, network.address(k.b, k.name)) for k in links]) as load:
        yield load


@contextlib.contextmanager
def flowing(network: Network, flows: Sequence[Ends]) -> Iterator[Load]:
    """These flows while the block runs, by their names in the place of links'. Raises OSError where one does not connect."""
    load, stop = Load(), threading.Event()
    threads: list[threading.Thread] = []
    with contextlib.ExitStack() as opened:
        opened.callback(_end, stop, threads)
        for flow in flows:
            load.received[flow.name] = 0
            sender, receiver = _connect(network, flow)
            for sock in (sender, receiver):
                opened.push(sock)
                opened.callback(_hang_up, sock)
            threads.append(threading.Thread(target=_send, args=(sender, stop), daemon=True))
            threads.append(threading.Thread(target=_receive, args=(receiver, load, flow.name), daemon=True))
        for thread in threads:
            thread.start()
        yield load


def _connect(network: Network, flow: Ends) -> tuple[socket.socket, socket.socket]:
    """A flow's connection: its sending end and its receiving one."""
    listener = call_inside(network.namespace(flow.receiver), partial(_listen, flow.address))
    with listener:
        sender = call_inside(
            network.namespace(flow.sender), lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        )
        try:
            sender.settimeout(_CONNECT_S)
            sender.connect(listener.getsockname())
            sender.settimeout(None)
            receiver, _ = listener.accept()
        except BaseException:
            sender.close()
            raise
    return sender, receiver


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1)
    return listener


def _send(sock: socket.socket, stop: threading.Event) -> None:
    data = bytes(_CHUNK)
    with contextlib.suppress(OSError):  # it was hung up
        while not stop.is_set():
            sock.send(data)


def _receive(sock: socket.socket, load: Load, link: str) -> None:
    buffer = bytearray(_BUFFER)
    with contextlib.suppress(OSError):
        while size := sock.recv_into(buffer):
            load.received[link] += size


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _end(stop: threading.Event, threads: Sequence[threading.Thread]) -> None:
    stop.set()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
