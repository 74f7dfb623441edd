"""Flows of probe packets across a link, both ways, and what arrived of them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from testbed.errors import NetworkError
from testbed.hosts.namespaces import call_inside
from testbed.net.calibration import prober

WAYS = ("up", "down")
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_RECEIVE_BUFFER = 128 << 20  # a whole phase fits, so a receiver that does not get to run loses nothing
_BATCH, _BATCH_S = 16, 0.2e-3
_PATIENCE_S = 60.0  # for an answer, beyond what its flow takes


class Network(Protocol):
    """What probing needs of a fabric."""

    def namespace(self, node: str) -> str: ...
    def address(self, node: str, link: str | None = None) -> str: ...


@dataclass(frozen=True)
class Flow:
    """One way's packets: how many, how large (network layer), how far apart."""

    packets: int
    bytes: int
    interval_s: float
    duration_s: float
    catch_up: bool = False
    pace: tuple[tuple[float, float], ...] = ()
    """Other intervals over time: (until when after the flow's beginning, seconds from one packet to the next)."""
    begin_s: float | None = None
    """When the flow begins (CLOCK_MONOTONIC), where it has to be in step with something; None: when its sender is told."""


@dataclass(frozen=True)
class Arrived:
    """What became of one flow: `numbers` and times (seconds, CLOCK_MONOTONIC) of the packets that arrived, in arrival order."""

    sent: int
    took_s: float
    held_up_s: float  # the most that the sender was behind its schedule
    numbers: list[int]
    sent_s: list[float]
    arrived_s: list[float]


class Prober:
    """A probing process in each of a link's two nodes. A context manager."""

    def __init__(self, network: Network, link: str, a: str, b: str, *, urgent: bool = False) -> None:
        """*urgent*: with real-time scheduling where that is permitted. Raises NetworkError when a node is gone."""
        self._phase = 0
        ends = [(network.namespace(node), network.address(node, link)) for node in (a, b)]
        sockets = [call_inside(namespace, partial(_open, address)) for namespace, address in ends]
        with contextlib.ExitStack() as opened:
            for sock, peer in zip(sockets, reversed(sockets), strict=True):
                opened.enter_context(sock)
                sock.connect(peer.getsockname())
            self._processes = {way: _start(sock, urgent) for way, sock in zip(WAYS, sockets, strict=True)}

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()

    def run(self, flows: dict[str, Flow], settle_s: float) -> dict[str, Arrived]:
        """Sends the flows (``up``, ``down`` or both at once) and waits *settle_s* after the last packet.

        Raises NetworkError when a probing process fails.
        """
        self._phase += 1
        nothing = Flow(0, prober.UDP_OVERHEAD + prober.MESSAGE.size, 1.0, 0.0)
        # Each way's flow is sent by one process and received by the other; both have to know of the phase.
        for way, process in sorted(self._processes.items(), key=lambda item: item[0] in flows):
            _order(process, _plan(flows.get(way, nothing), self._phase))
        longest = max(min(flow.duration_s, 4 * flow.packets * flow.interval_s) for flow in flows.values())
        sent = {way: json.loads(_line(process, longest)) for way, process in self._processes.items()}
        time.sleep(settle_s)
        received = {}
        for way, process in self._processes.items():
            _order(process, {})
            count = int(_line(process))
            received[way] = _read(process, count * prober.ARRIVAL.size)
        return {way: _arrived(sent[way], received["down" if way == "up" else "up"]) for way in flows}


def _plan(flow: Flow, phase: int) -> dict[str, Any]:
    return {
        "phase": phase,
        "packets": flow.packets,
        "bytes": max(prober.MESSAGE.size, flow.bytes - prober.UDP_OVERHEAD),
        "interval_s": flow.interval_s,
        "duration_s": flow.duration_s,
        "catch_up": flow.catch_up,
        "pace": flow.pace,
        "begin_s": flow.begin_s,
        "batch": _batch(flow),
    }


def _batch(flow: Flow) -> int:
    """Packets that are sent at a time: single ones, unless there are many in `_BATCH_S`."""
    if flow.pace or flow.interval_s > _BATCH_S / 8:
        return 1
    return max(1, min(_BATCH, int(_BATCH_S / flow.interval_s), 60_000 // flow.bytes))


def _open(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for size, forced, allowed in (
        (_RECEIVE_BUFFER, _SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (4 << 20, _SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except (
            PermissionError
        ):  # root in a user namespace of its own gets what everybody gets: net.core.rmem_max, wmem_max
            sock.setsockopt(socket.SOL_SOCKET, allowed, size)
    sock.setsockopt(socket.SOL_SOCKET, prober.SO_TIMESTAMPNS, 1)
    sock.bind((address, 0))
    return sock


def _start(sock: socket.socket, urgent: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", prober.__file__, str(sock.fileno()), *(["urgent"] if urgent else [])],
        pass_fds=(sock.fileno(),),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


def _order(process: subprocess.Popen[bytes], order: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # reading the answer says what happened
        process.stdin.write(json.dumps(order).encode() + b"\n")


def _line(process: subprocess.Popen[bytes], longest_s: float = 0.0) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += _read(process, 1, longest_s)
    return line


def _read(process: subprocess.Popen[bytes], size: int, longest_s: float = 0.0) -> bytes:
    """Exactly *size* bytes of a process's answer. Raises NetworkError when it ends before, or takes far longer than
    *longest_s*."""
    assert process.stdout is not None
    data = b""
    while len(data) < size:
        if not select.select([process.stdout], [], [], _PATIENCE_S + longest_s)[0]:
            raise NetworkError("a probing process does not answer; is the processor overloaded?")
        piece = os.read(process.stdout.fileno(), size - len(data))
        if not piece:
            process.kill()
            complaints = process.communicate()[1].decode(errors="replace").strip().splitlines()[-1:]
            raise NetworkError(f"a probing process failed: {' '.join(complaints) or 'killed'}")
        data += piece
    return data


def _arrived(orders: dict[str, Any], received: bytes) -> Arrived:
    rows = list(prober.ARRIVAL.iter_unpack(received))
    return Arrived(
        sent=orders["sent"],
        took_s=orders["took_s"],
        held_up_s=orders["held_up_s"],
        numbers=[row[0] for row in rows],
        sent_s=[row[1] / 1e9 for row in rows],
        arrived_s=[row[2] / 1e9 for row in rows],
    )
