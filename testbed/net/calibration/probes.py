"""Flows of probe packets across a link, both ways, and what arrived of them: flows that saturate it, and probes that do not."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from testbed import descriptors
from testbed.errors import NetworkError
from testbed.hosts.host import Process
from testbed.hosts.namespaces import call_inside
from testbed.net.calibration import prober
from testbed.net.calibration.prober import MESSAGE, UDP_OVERHEAD
from testbed.net.profile.profile import Direction, Profile
from testbed.net.profile.trace import WAYS, Way
from testbed.net.sockets import SO_TIMESTAMPNS, enlarge_buffers
from testbed.programs import isolated

_RECEIVE_BUFFER = 128 << 20  # a whole phase fits, so a receiver that does not get to run loses nothing
_SEND_BUFFER = 4 << 20
_BATCH, _BATCH_S = 40, 0.2e-3
_PATIENCE_S = 60.0  # for an answer, beyond what its flow takes


class Network(Protocol):
    """What probing needs of a fabric."""

    def namespace(self, node: str) -> str: ...
    def address(self, node: str, link: str | None = None) -> str: ...


@dataclass(frozen=True)
class PacketTrain:
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
            self._processes: dict[Way, subprocess.Popen[bytes] | Process] = {
                way: _start(sock, urgent) for way, sock in zip(WAYS, sockets, strict=True)
            }

    @classmethod
    def of(cls, processes: Mapping[Way, Process]) -> Prober:
        """Of probing processes that run already, by the way that each sends; they are somebody else's to end."""
        prober = cls.__new__(cls)
        prober._phase, prober._processes = 0, dict(processes)
        return prober

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            _last_words(process)

    def run(self, trains: Mapping[Way, PacketTrain], settle_s: float) -> dict[Way, Arrived]:
        """Sends the trains (``up``, ``down`` or both at once) and waits *settle_s* after the last packet.

        Raises NetworkError when a probing process fails.
        """
        self._phase += 1
        nothing = PacketTrain(0, UDP_OVERHEAD + MESSAGE.size, 1.0, 0.0)
        # Each way's train is sent by one process and received by the other; both have to know of the phase.
        for way, process in sorted(self._processes.items(), key=lambda item: item[0] in trains):
            _order(process, _plan(trains.get(way, nothing), self._phase))
        longest = max(min(each.duration_s, 4 * each.packets * each.interval_s) for each in trains.values())
        sent = {way: json.loads(_line(process, longest)) for way, process in self._processes.items()}
        time.sleep(settle_s)
        received: dict[Way, bytes] = {}
        for way, process in self._processes.items():
            _order(process, {})
            count = int(_line(process))
            received[way] = _read(process, count * prober.ARRIVAL.size)
        return {way: _arrived(sent[way], received["down" if way == "up" else "up"]) for way in trains}


def _plan(train: PacketTrain, phase: int) -> dict[str, Any]:
    size = max(MESSAGE.size, train.bytes - UDP_OVERHEAD)
    return asdict(train) | {"phase": phase, "bytes": size, "batch": _batch(train)}


def _batch(train: PacketTrain) -> int:
    """Packets that are sent at a time: single ones, unless there are many in `_BATCH_S`."""
    if train.pace or train.interval_s > _BATCH_S / 8:
        return 1
    return max(1, min(_BATCH, int(_BATCH_S / train.interval_s), 60_000 // train.bytes))


def _open(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    enlarge_buffers(sock, _RECEIVE_BUFFER, _SEND_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.bind((address, 0))
    return sock


def _start(sock: socket.socket, urgent: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        isolated(prober.__name__, str(sock.fileno()), *(["urgent"] if urgent else [])),
        pass_fds=(sock.fileno(),),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


def _last_words(process: subprocess.Popen[bytes] | Process) -> str:
    """Of a process that is ended here."""
    process.kill()
    if not isinstance(process, subprocess.Popen):
        return process.last_words()
    return " ".join(process.communicate()[1].decode(errors="replace").strip().splitlines()[-1:])


def _order(process: subprocess.Popen[bytes] | Process, order: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # reading the answer says what happened
        os.write(process.stdin.fileno(), json.dumps(order).encode() + b"\n")


def _line(process: subprocess.Popen[bytes] | Process, longest_s: float = 0.0) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += _read(process, 1, longest_s)
    return line


def _read(process: subprocess.Popen[bytes] | Process, size: int, longest_s: float = 0.0) -> bytes:
    """Exactly *size* bytes of a process's answer. Raises NetworkError when it ends before, or takes far longer than
    *longest_s*."""
    assert process.stdout is not None
    data = b""
    while len(data) < size:
        if not descriptors.ready([process.stdout], _PATIENCE_S + longest_s):
            raise NetworkError("a probing process does not answer; is the processor overloaded?")
        piece = os.read(process.stdout.fileno(), size - len(data))
        if not piece:
            raise NetworkError(f"a probing process failed: {_last_words(process) or 'killed'}")
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


PROBE_BYTES = UDP_OVERHEAD + MESSAGE.size
"""Network layer; there are no smaller ones: at 1 Mbit/s they take 0.35 ms each."""
FULL_PACKET = 1500
PARALLEL_BPS = 60e6
"""Both ways at once only where their rates sum up to no more: the processor must not be the limit."""
UNLIMITED_BPS = 300e6
"""What is offered where there is no limit; the result is reported, not judged."""
SLACK_S = 0.1
"""For the last packet of a phase, over what the profile explains."""
_OVERLOAD, _OVERLOAD_FAST, _FAST_BPS = 1.2, 1.1, 200e6
"""A saturating flow's rate over the asked one; less where that is fast, since what is lost of it costs time, too."""
_CLOSEST_S = 0.3e-3  # two probes of many; a slow prober's are further apart
_LONGEST_S = 600.0  # of a flow whose number of packets is given


def settle_s(profile: Profile, way: Way) -> float:
    """How long after a saturating flow's last packet something may still arrive."""
    direction = profile.ways[way]
    waiting = direction.queue_bytes(profile.round_trip_s)
    draining = waiting * 8 / direction.rate_bps if waiting and direction.rate_bps else 0.0
    return direction.delay_s + 6 * direction.jitter_s + draining + SLACK_S


def measuring_s(profile: Profile) -> float:
    """How long one measurement of rate, delay and loss takes at least; *profile* does not change over time."""
    dense = [loss_train(profile, way, 1.0, None) for way in WAYS]
    lossy = max(min(flow.packets * flow.interval_s, flow.duration_s) for flow in dense)
    return max(settle_s(profile, way) for way in WAYS) + lossy


def packet_bytes(direction: Direction) -> int:
    """A saturating flow's packet: full-sized, smaller where a second would not hold a hundred of them."""
    return max(200, min(FULL_PACKET, int((direction.rate_bps or 1e12) / 8 / 100)))


def rate_train(direction: Direction, scale: float) -> PacketTrain:
    size = packet_bytes(direction)
    offered = UNLIMITED_BPS
    if direction.rate_bps:
        # Loss comes before the bottleneck; what is left must still saturate it.
        over = _OVERLOAD if direction.rate_bps <= _FAST_BPS else _OVERLOAD_FAST
        offered = over * direction.rate_bps / (1 - min(direction.loss, 0.9))
    duration = (1.2 if direction.rate_bps else 0.5) * scale
    duration = max(duration, min(6.0, 40 * size * 8 / offered))  # forty packets at least
    interval = size * 8 / offered
    return PacketTrain(int(duration / interval) + 1, size, interval, duration, catch_up=True)


def loss_train(profile: Profile, way: Way, scale: float, probes: int | None) -> PacketTrain:
    """Probes that never fill the queue: under half the rate, and what jitter may bunch together fits in half of the queue.

    Of a chain's bursts there are fewer than losses, so they take more probes, closer together.
    """
    direction = profile.ways[way]
    packets, interval = int((2000 if direction.loss else 800) * scale), 0.9e-3 if direction.loss else 1.5e-3
    duration = 2.0 * scale
    if direction.loss_model is not None:
        packets, interval, duration = int(10_000 * scale), _CLOSEST_S, 4.0 * scale
    if probes is not None:
        packets, interval, duration = probes, _CLOSEST_S, _LONGEST_S
    if direction.rate_bps:
        interval = max(interval, 2 * PROBE_BYTES * 8 / direction.rate_bps)
        waiting = direction.queue_bytes(profile.round_trip_s) or FULL_PACKET
        interval = max(interval, 8 * direction.jitter_s * PROBE_BYTES / (waiting / 2))
    return PacketTrain(packets, PROBE_BYTES, interval, duration)


def delay_train(direction: Direction, scale: float, probes: int | None) -> PacketTrain:
    """Probes so far apart that one in hundreds at most meets its predecessor under jitter; where *probes* is given, a tenth."""
    interval = max(8e-3, 4 * direction.jitter_s)
    if probes is not None:
        return PacketTrain(probes // 10, PROBE_BYTES, interval, _LONGEST_S)
    return PacketTrain(10_000, PROBE_BYTES, interval, 2.4 * scale)
