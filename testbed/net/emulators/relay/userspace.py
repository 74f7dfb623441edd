"""The userspace emulator: a relay process between two packet sockets, for kernels without netem.

    l0a ──▶ packet socket ═ relay, up ═▶ packet socket ──▶ l0b        and the other way after *down*

Without ``keep`` the relay ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import NetworkError, UsageError
from testbed.hosts.namespaces import call_in_scratch, call_inside
from testbed.net.emulators.emulator import Attachment, Counters, Emulator, Wanted, quieten, refuse_unknown
from testbed.net.emulators.relay.orders import relay_orders
from testbed.net.emulators.relay.port import open_port
from testbed.net.emulators.relay.serving import ServingProcess

if TYPE_CHECKING:
    from testbed.net.profile.profile import Direction, Profile
    from testbed.net.profile.trace import Way

HONOURED = frozenset(
    {"jitter law", "jitter reorder", "loss model", "codel", "duplicate", "corrupt", "reorder", "ecn"}
    | {"overhead", "mtu", "seed", "trace"}
)
"""What of `Direction.beyond_the_basics` this emulator knows."""

LINKS_A_RELAY = 256
"""Two descriptors each have to fit into what a process may have open by default, 1024, here and there."""
FRAME_S, BYTE_S = 20e-6, 0.7e-9
"""Of a processor's time, what a relay takes for a frame with its acknowledgement, each read and sent by a system call of its own
where there are many links, and for each byte."""
RELAY_SHARE = 0.8
"""Of a processor, what the links of one relay may take by that before some are given to another: those at the links' ends want
processors, too."""
_SUPER_PACKET_S = 0.5e-3
_SUPER_PACKET_BYTES = 60_000
PROGRAM = "testbed.net.emulators.relay.relay"


def require_packet_sockets() -> None:
    """Raises UsageError when this machine cannot run the userspace emulator."""
    try:
        call_in_scratch(lambda: _open("lo")).close()
    except UsageError as error:
        raise UsageError(f"emulator userspace: {error}") from None


def super_packet_segments(direction: Direction) -> int:
    """How many segments of TCP or UDP may cross as one packet without being told from so many: half a millisecond's worth.

    One where chance has more in store for each packet than its loss, and where there is no rate to say how long they take.
    """
    chance = (direction.duplicate, direction.corrupt, direction.reorder, direction.jitter_s)
    if (
        any(chance)
        or (direction.ecn and (direction.loss or direction.loss_model is not None))
        or direction.queue.codel is not None
        or direction.rate_bps is None
        or direction.trace is not None
    ):
        return 1
    at_once = min(direction.rate_bps / 8 * _SUPER_PACKET_S, _SUPER_PACKET_BYTES)
    return max(1, int(at_once / direction.mtu))


def spread(wanted: Sequence[Wanted], processors: int) -> list[list[int]]:
    """Which links, by number and in ascending order, share a relay process. One serves all up to `LINKS_A_RELAY` links and
    `RELAY_SHARE`; beyond that another does for every so much more, but no more of them than there are processors. The link that
    takes most goes to whichever has least so far, then the next."""
    # Links of a cell stay together, and take together what the fastest of them takes alone.
    together: dict[object, list[int]] = {}
    for number, link in enumerate(wanted):
        together.setdefault(number if link.cell is None else link.cell[0], []).append(number)
    units = list(together.values())
    alone = [
        min(RELAY_SHARE, max(_share(direction, way) for way, direction in link.profile.ways.items()))
        for link in wanted
    ]
    loads = [max(alone[number] for number in unit) for unit in units]
    for_links, for_rates = math.ceil(len(wanted) / LINKS_A_RELAY), math.ceil(sum(loads) / RELAY_SHARE - 1e-9)
    shares: list[list[int]] = [[] for _ in range(max(for_links, min(for_rates, processors, len(units))))]
    sums = [0.0] * len(shares)
    for number in sorted(range(len(units)), key=lambda number: -loads[number]):
        most = LINKS_A_RELAY - len(units[number])
        open_ = [place for place, share in enumerate(shares) if len(share) <= most]
        if not open_:
            shares.append([])
            sums.append(0.0)
            open_ = [len(shares) - 1]
        least = min(open_, key=lambda place: (sums[place], len(shares[place])))
        shares[least] += units[number]
        sums[least] += loads[number]
    return [sorted(share) for share in shares if share]


def _share(direction: Direction, way: Way) -> float:
    """Of a processor, what a relay takes for one way at its full rate. What has no limit counts as all that a relay is given."""
    rate = direction.mean_rate_bps(way)
    if rate is None:
        return RELAY_SHARE
    frame = super_packet_segments(direction) * direction.mtu
    return rate / 8 * (FRAME_S / frame + BYTE_S)


class Userspace(Emulator):
    """The emulator called ``userspace``; see `testbed.net.emulators`."""

    name = "userspace"
    served_by_processes = True

    @classmethod
    def require(cls) -> None:
        require_packet_sockets()

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """See `Emulator.attach`. Raises UsageError without the right to, NetworkError when the kernel refuses."""
        return self.attach_all(wire, [Wanted(link, a, b, profile)], keep=keep)[0]

    def attach_all(
        self, wire: str, wanted: Sequence[Wanted], *, keep: Path | None = None
    ) -> Sequence[Attachment]:
        """The same for many links, which are spread over relay processes (see `spread`)."""
        for link in wanted:
            refuse_unknown(self.name, link.profile, HONOURED)
            for way, direction in link.profile.ways.items():
                if link.cell is not None and direction.mean_rate_bps(way) is None:
                    raise UsageError(
                        f"cell {link.cell[0]}: {direction} gives no rate ({way}) that could be shared out"
                    )
        quieten(wire)
        attachments: dict[str, Attachment] = {}
        try:
            for share in spread(wanted, len(os.sched_getaffinity(0))):
                links = [wanted[number] for number in share]
                attached = self._attach(wire, links, keep)
                attachments.update(zip((link.link for link in links), attached, strict=True))
        except BaseException:
            for attachment in attachments.values():
                attachment.detach()
            raise
        return [attachments[link.link] for link in wanted]

    def _attach(self, wire: str, wanted: Sequence[Wanted], keep: Path | None) -> list[RelayAttachment]:
        with contextlib.ExitStack() as undo:
            interfaces = [name for link in wanted for name in (link.a, link.b)]
            ports = call_inside(wire, lambda: _open_ports(interfaces))
            for port in ports.values():
                undo.callback(port.close)
            links: dict[str, dict[str, Any]] = {}
            now = time.monotonic()
            for link in wanted:
                conditions, files = undo.enter_context(relay_orders(link.profile, now))
                links[link.link] = {
                    "port_a": ports[link.a].fileno(),
                    "port_b": ports[link.b].fileno(),
                    "seed": self._seed,
                    "conditions": conditions,
                    "files": files,
                }
                if link.cell is not None:
                    links[link.link]["cell"] = {"name": link.cell[0], "scheduler": link.cell[1]}
            # The links of one relay share it; it ends when the last of them is detached.
            relay = ServingProcess.start(links, keep, PROGRAM)
            attachments = [RelayAttachment(name, relay) for name in links]
            try:
                attachments[-1].counters()  # it answers: it runs
            except BaseException:
                for attachment in attachments:
                    attachment.detach()
                raise
        return attachments

    def super_packets(self, profile: Profile) -> dict[str, int]:
        return {way: super_packet_segments(direction) for way, direction in profile.ways.items()}

    def release_all(self, attachments: Sequence[Attachment]) -> None:
        """Ends the relays behind *attachments*, whose wire is about to be removed."""
        relays = {id(a.relay): a.relay for a in attachments if isinstance(a, RelayAttachment)}.values()
        for relay in relays:  # all are told before the first is waited for
            relay.stop()
        for relay in relays:
            relay.end()

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        return RelayAttachment(link, ServingProcess.recorded(link, keep))


class RelayAttachment(Attachment):
    """One link whose frames pass through a relay process."""

    def __init__(self, link: str, relay: ServingProcess) -> None:
        self.process: tuple[int, int] | None = relay.process
        self._link, self.relay = link, relay

    def apply(self, profile: Profile, origin_s: float | None = None, *, fresh: bool = False) -> None:
        refuse_unknown(Userspace.name, profile, HONOURED)
        origin_s = time.monotonic() if origin_s is None else origin_s
        with relay_orders(profile, origin_s) as (conditions, files):
            order = {"do": "apply", "conditions": conditions, "fresh": fresh}
            self.relay.ask(self._link, order, files)

    def share(self, scheduler: str) -> None:
        self.relay.ask(self._link, {"do": "share", "scheduler": scheduler})

    def hurry(self) -> bool:
        self.relay.ask(self._link, {"do": "hurry"})
        return True

    def under_way(self) -> int:
        return int(self.relay.ask(self._link, {"do": "under_way"})["packets"])

    def counters(self) -> dict[str, Counters]:
        answer = self.relay.ask(self._link, {"do": "counters"})
        return {way: Counters(**counted) for way, counted in answer.items()}

    def fate(self) -> str | None:
        return self.relay.fate()

    def detach(self) -> None:
        if self.process is None:
            return
        self.process = None
        self.relay.release(self._link)


def _open_ports(interfaces: list[str]) -> dict[str, socket.socket]:
    """Packet sockets on interfaces of the calling thread's namespace."""
    with contextlib.ExitStack() as undo:
        ports = {name: undo.enter_context(_open(name)) for name in interfaces}
        undo.pop_all()
        return ports


def _open(interface: str) -> socket.socket:
    """A packet socket on an interface of the calling thread's namespace."""
    try:
        return open_port(interface)
    except PermissionError:
        raise UsageError("no permission to open a packet socket; run it with sudo") from None
    except OSError as error:
        raise NetworkError(f"cannot open a packet socket on {interface}: {error.strerror}") from None
