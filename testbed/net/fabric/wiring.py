"""What the kernel is asked for, to make a topology out of namespaces: veth pairs, addresses, routes, sysctls.

Everything is created inside the run's own namespaces; the host's namespace never sees an interface of ours,
not even for a moment.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from testbed.errors import NetworkError, UsageError
from testbed.hosts import namespaces
from testbed.net.fabric.offloads import Ethtool
from testbed.net.fabric.state import State
from testbed.net.netlink import Batch, Peer
from testbed.net.profile.presets import PRESETS
from testbed.net.profile.profile import MTU
from testbed.net.topology.routing import PREFIX_BITS, Interface
from testbed.net.topology.topology import Topology

_MIN_BUFFER_BYTES, _MAX_BUFFER_BYTES = 32_000_000, 1_000_000_000
_LOOPBACK = 1
_FIRST_INDEX = 10


def build(state: State, segments: Mapping[int, Mapping[str, int]] | None = None) -> None:
    """Makes and fills the state's namespaces, which are named and not there yet: links, addresses, routes, sysctls.

    `segments`: link number -> how many TCP segments may enter it as one packet, ``up`` and ``down``; 1 where it is not named.
    What arrives at the wire's ends of a link goes nowhere yet: that is the emulator's part. Raises NetworkError, or UsageError
    for a congestion control this kernel does not offer.
    """
    nodes = {state.namespace(node.name): node.name for node in state.topology.nodes}
    segments = segments or {}
    buffers = _buffer_sysctls(state.topology)
    with contextlib.ExitStack() as closing:
        wire: _Wire | None = None

        def furnish(name: str) -> None:
            nonlocal wire
            if name == state.wire:
                _set_sysctls(_quiet())
                wire = closing.enter_context(_Wire(state, segments))
            else:
                assert wire is not None  # it is furnished first
                _set_sysctls(_node_sysctls(state.topology, nodes[name]) | buffers)
                _configure_node(state, nodes[name], wire, segments)

        namespaces.create_all([state.wire, *nodes], furnish)


class _Wire:
    """The wire's namespace, from inside any other: sockets stay in the one in which they were opened. Open it inside the wire."""

    def __init__(self, state: State, segments: Mapping[int, Mapping[str, int]]) -> None:
        self._segments = segments
        self._closing = contextlib.ExitStack()
        self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._closing.callback(os.close, self.namespace)
        self._batch = self._closing.enter_context(Batch(f"network {state.id}: links"))
        self._batch.up(_LOOPBACK, "lo", state.mark)
        self._ethtool = self._closing.enter_context(Ethtool())

    def __enter__(self) -> _Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def raise_ends(self, ends: Iterable[Interface]) -> None:
        """Brings the wire's ends of these interfaces up."""
        for end in ends:
            second = end.end == "b"
            name = wire_ends(end.link)[second]
            if max(self._segments.get(end.link, {"up": 1}).values()) > 1:
                self._ethtool.allow_tcp_segmentation_alone(name)
            else:
                self._ethtool.disable_segmentation(name)
            self._batch.up(_FIRST_INDEX + 2 * end.link + second, name)
        self._batch.send()


def wire_ends(number: int) -> tuple[str, str]:
    """The wire's interfaces of link `number`: ``("l0a", "l0b")``."""
    return f"l{number}a", f"l{number}b"


def tcp_buffer_bytes(topology: Topology) -> int:
    """How large TCP's buffers may grow: enough for windows of 2 BDPs of any preset or link of the topology,
    32 MB at least.

    Twice that in memory, since TCP takes half of a receive buffer for bookkeeping (tcp(7),
    tcp_adv_win_scale).
    """
    profiles = [link.profile for link in topology.links]
    hops = min(len(profiles), 4)  # a path may lead across several links
    longest = max(profile.round_trip_s for profile in profiles) * hops
    fastest = max(max(p.up.rate_bps or 0.0, p.down.rate_bps or 0.0) for p in profiles)
    bdp = max(fastest / 8 * longest, *(profile.bdp_bytes() for profile in PRESETS.values()))
    return int(min(max(4 * bdp, _MIN_BUFFER_BYTES), _MAX_BUFFER_BYTES))


def allow_tcp_buffers(state: State) -> None:
    """Sets what TCP's buffers may grow to in every node, for the profiles the state's topology has now."""
    values = _buffer_sysctls(state.topology)
    for node in state.topology.nodes:
        with namespaces.inside(state.namespace(node.name)):
            _set_sysctls(values)


def allow_super_packets(state: State, number: int, segments: Mapping[str, int]) -> None:
    """How many TCP segments may enter link *number* as one packet, ``up`` and ``down``; 1, as it is at first: none."""
    topology = state.topology
    link = topology.links[number]
    for node, end, way in ((link.a, "a", "up"), (link.b, "b", "down")):
        name = next(i.name for i in topology.interfaces(node) if (i.link, i.end) == (number, end))
        with namespaces.inside(state.namespace(node)), Ethtool() as ethtool:
            with Batch(f"network {state.id}: node {node}") as batch:
                batch.super_packets(socket.if_nametoindex(name), segments[way], name)
                batch.send()
            if segments[way] > 1:
                ethtool.enable_tcp_segmentation(name)
            else:
                ethtool.disable_segmentation(name)
    if max(segments.values()) > 1:
        with namespaces.inside(state.wire), Ethtool() as ethtool:
            for name in wire_ends(number):
                ethtool.enable_tcp_segmentation(name)


def set_mtu(state: State, number: int, mtu: int) -> None:
    """The largest packet of link *number*, both ways and at all four of its interfaces."""
    link = state.topology.links[number]
    places = [(state.wire, name) for name in wire_ends(number)]
    for node, end in ((link.a, "a"), (link.b, "b")):
        names = [i.name for i in state.topology.interfaces(node) if (i.link, i.end) == (number, end)]
        places += [(state.namespace(node), name) for name in names]
    for namespace, name in places:
        with namespaces.inside(namespace), Batch(f"network {state.id}: mtu") as batch:
            batch.mtu(socket.if_nametoindex(name), mtu, name)
            batch.send()


def _buffer_sysctls(topology: Topology) -> dict[str, str]:
    # The first two are the kernel's own defaults: least, and to begin with.
    limit = tcp_buffer_bytes(topology)
    return {"net/ipv4/tcp_rmem": f"4096 131072 {limit}", "net/ipv4/tcp_wmem": f"4096 16384 {limit}"}


def has_ipv6() -> bool:
    """Whether this kernel has IPv6."""
    return Path("/proc/sys/net/ipv6").is_dir()


def _quiet() -> dict[str, str]:
    return {"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/default/disable_ipv6": "1"}


def _node_sysctls(topology: Topology, node: str) -> dict[str, str]:
    forwards = "1" if topology.forwards(node) else "0"
    values = {
        # A new namespace takes over some of the host's settings, so those that matter are all set.
        "net/ipv4/ip_forward": forwards,
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/default/rp_filter": "0",
        "net/ipv4/conf/all/send_redirects": "0",
        "net/ipv4/conf/default/send_redirects": "0",
        # What one connection learnt about the path must not help the next one.
        "net/ipv4/tcp_no_metrics_save": "1",
    }
    # For the interfaces to come: no packet of the kernel's own between those that are measured (router and neighbour discovery,
    # duplicate address detection, and the link-local address that takes part in them). ::1 stays.
    if topology.ipv6:
        values |= {
            "net/ipv6/conf/default/addr_gen_mode": "1",  # none
            "net/ipv6/conf/default/accept_ra": "0",
            "net/ipv6/conf/default/router_solicitations": "0",
            "net/ipv6/conf/default/accept_dad": "0",
        }
    else:
        values["net/ipv6/conf/default/disable_ipv6"] = "1"
    congestion = topology.congestion(node)
    if congestion is not None:
        values["net/ipv4/tcp_congestion_control"] = congestion
    return values


def _sysctl(name: str) -> str:
    # /proc/sys/net shows the namespace of the thread that opens the file
    return f"/proc/sys/{name}"


def _set_sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        try:
            file = os.open(
                _sysctl(name), os.O_WRONLY | os.O_CLOEXEC
            )  # there are a dozen a node: no more than it takes
            try:
                os.write(file, value.encode())
            finally:
                os.close(file)
        except FileNotFoundError as error:
            if name.startswith("net/ipv6/"):
                continue  # a kernel without IPv6 is as quiet as asked
            _refuse(name, value, error)
        except PermissionError as error:
            if not name.endswith("tcp_congestion_control"):
                _refuse(name, value, error)
            # The kernel has it but restricts it; the routes set it regardless.
        except OSError as error:
            _refuse(name, value, error)


def _refuse(name: str, value: str, error: OSError) -> None:
    if name.endswith("tcp_congestion_control"):
        offered = Path(_sysctl("net/ipv4/tcp_available_congestion_control")).read_text().split()
        raise UsageError(f"congestion control {value!r}: this kernel offers {', '.join(offered)}") from None
    raise NetworkError(f"sysctl {name.replace('/', '.')} = {value}: {error.strerror}") from None


def _mac(number: int, last: int) -> bytes:
    return bytes((0x02, 0x74, 0x62, number >> 8, number & 255, last))


def _configure_node(state: State, node: str, wire: _Wire, segments: Mapping[int, Mapping[str, int]]) -> None:
    """Makes the node's links, with their ends in the wire, and its addresses, neighbours and routes. Call it inside the node."""
    topology = state.topology
    with Batch(f"network {state.id}: node {node}") as batch:
        batch.up(_LOOPBACK, "lo", state.mark)
        ends = topology.interfaces(node)
        indices = {end.name: _FIRST_INDEX + place for place, end in enumerate(ends)}
        for end in ends:
            _add_end(batch, end, indices[end.name], wire.namespace, _allowed(segments, end))
        batch.send()
        wire.raise_ends(ends)
        for end in ends:
            batch.ready(indices[end.name], end.name)
            _address_end(batch, topology, end, indices[end.name])
        _add_routes(batch, topology, node, indices)
        batch.send()
    if topology.ipv6 and topology.forwards(node):
        # Not before the interfaces are without multicast: a router joins ff02::2 on each that has it, and reports so on the link.
        _set_sysctls({"net/ipv6/conf/all/forwarding": "1"})
    with Ethtool() as ethtool:
        for end in ends:
            if _allowed(segments, end) > 1:
                ethtool.allow_tcp_segmentation_alone(end.name)
            else:
                ethtool.disable_segmentation(end.name)


def _add_routes(batch: Batch, topology: Topology, node: str, indices: Mapping[str, int]) -> None:
    """The node's routes that leave by these interfaces, name -> index."""
    for route in topology.routes(node):
        if route.interface in indices:
            congestion = topology.links[route.link].congestion
            batch.route(
                indices[route.interface], route.destination, node, via=route.via, congestion=congestion
            )


def set_link(state: State, number: int, up: bool) -> None:
    """Takes both nodes' interfaces of a link down, or brings them up with all that the kernel forgot, whoever took them down:
    addresses, neighbours and routes. Raises NetworkError."""
    topology = state.topology
    for node in (topology.links[number].a, topology.links[number].b):
        ends = [end for end in topology.interfaces(node) if end.link == number]
        with namespaces.inside(state.namespace(node)), Batch(f"network {state.id}: node {node}") as batch:
            indices = {end.name: socket.if_nametoindex(end.name) for end in ends}
            for end in ends:
                if up:
                    batch.up(indices[end.name], end.name)
                else:
                    batch.down(indices[end.name], end.name)
            batch.send()
    if not up:
        return
    # Not before both ends are up: what leaves by an interface without a carrier has no route.
    for node in (topology.links[number].a, topology.links[number].b):
        ends = [end for end in topology.interfaces(node) if end.link == number]
        with namespaces.inside(state.namespace(node)), Batch(f"network {state.id}: node {node}") as batch:
            indices = {end.name: socket.if_nametoindex(end.name) for end in ends}
            for end in ends:
                batch.ready(indices[end.name], end.name)
                _address_end(batch, topology, end, indices[end.name], again=True)
            _add_routes(batch, topology, node, indices)
            batch.send()


def _allowed(segments: Mapping[int, Mapping[str, int]], end: Interface) -> int:
    return segments[end.link]["up" if end.end == "a" else "down"] if end.link in segments else 1


def _add_end(batch: Batch, end: Interface, index: int, wire: int, segments: int) -> None:
    second = end.end == "b"
    name = wire_ends(end.link)[second]
    peer = Peer(name, _FIRST_INDEX + 2 * end.link + second, _mac(end.link, 0x1A + second), wire, segments)
    batch.veth(end.name, index, _mac(end.link, 0x0A + second), MTU, peer, end.name)


def _address_end(batch: Batch, topology: Topology, end: Interface, index: int, again: bool = False) -> None:
    second = end.end == "b"
    congestion = topology.links[end.link].congestion
    for address, other, network, bits in (
        (end.address, end.peer, end.network, PREFIX_BITS[4]),
        (end.address6, end.peer6, end.network6, PREFIX_BITS[6]),
    ):
        if not address:
            continue
        batch.address(index, address, bits, end.name, again)
        # Known for good, so that no packet that asks for it queues, is lost or counted on the emulated link.
        batch.neighbour(index, other, _mac(end.link, 0x0A + (not second)), end.name)
        if congestion:  # the route that came with the address, again
            # By route (ip-route(8), congctl) and not only by sysctl: a namespace may only set those algorithms as its
            # default that the host allows everybody, and each link can have its own this way.
            batch.route(index, network, end.name, source=address, congestion=congestion)
