"""What the kernel is asked for, to make a topology out of namespaces: veth pairs, addresses, routes, sysctls.

Everything is created inside the run's own namespaces; the host's namespace never sees an interface of ours,
not even for a moment.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.errors import NetworkError, UsageError
from testbed.hosts import namespaces
from testbed.net.fabric.batch import Batch, Peer
from testbed.net.fabric.offloads import Ethtool
from testbed.net.fabric.state import State
from testbed.net.profile.presets import PRESETS
from testbed.net.profile.profile import MTU
from testbed.net.topology.routing import Interface
from testbed.net.topology.topology import Link, Topology

_MIN_BUFFER_BYTES, _MAX_BUFFER_BYTES = 32_000_000, 1_000_000_000
_LOOPBACK = 1
_NODAD, _LINK_SCOPE = 0x02, 253  # IFA_F_NODAD, RT_SCOPE_LINK
_FIRST_INDEX = 10
_QUIET = {f"net/ipv6/conf/{scope}/disable_ipv6": "1" for scope in ("all", "default")}


def build(state: State, segments: Mapping[int, Mapping[str, int]] | None = None) -> None:
    """Makes and fills the state's namespaces, which are named and not there yet: links, addresses, routes, sysctls.

    `segments`: link number -> how many segments may enter it as one packet, ``up`` and ``down``; 1 where it is not named.
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
                _set_sysctls(_QUIET)
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
        self._batch.link("set", index=_LOOPBACK, state="up", ifalias=state.mark)
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
            several = max(self._segments.get(end.link, {"up": 1}).values()) > 1
            self._ethtool.disable_segmentation(name, but_transports=several)
            self._batch.link("set", index=_FIRST_INDEX + 2 * end.link + second, state="up")
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
    """How many segments of TCP or UDP may enter link *number* as one packet, ``up`` and ``down``; 1, as it is at first: none."""
    for end, way in zip(_ends(state.topology, number), ("up", "down"), strict=True):
        with changing(state, state.namespace(end.node)) as network, Ethtool() as ethtool:
            network.link("set", index=socket.if_nametoindex(end.name), gso_max_segs=segments[way])
            if segments[way] > 1:
                ethtool.enable_transports_segmentation(end.name)
            else:
                ethtool.disable_segmentation(end.name)
    if max(segments.values()) > 1:
        with namespaces.inside(state.wire), Ethtool() as ethtool:
            for name in wire_ends(number):
                ethtool.enable_transports_segmentation(name)


def set_mtu(state: State, number: int, mtu: int) -> None:
    """The largest packet of link *number*, both ways and at all four of its interfaces."""
    places = [(state.wire, name) for name in wire_ends(number)]
    places += [(state.namespace(end.node), end.name) for end in _ends(state.topology, number)]
    for namespace, name in places:
        with changing(state, namespace) as network:
            network.link("set", index=socket.if_nametoindex(name), mtu=mtu)


def _ends(topology: Topology, number: int) -> list[Interface]:
    """Link *number*'s ``a`` and ``b``."""
    link = topology.links[number]
    return [end for node in (link.a, link.b) for end in topology.interfaces(node) if end.link == number]


@contextlib.contextmanager
def changing(state: State, namespace: str) -> Iterator[IPRoute]:
    """For changes to a namespace that is there; this thread is in it. Raises NetworkError where the kernel refuses one."""
    try:
        with namespaces.inside(namespace), IPRoute(ext_ack=True) as network:
            yield network
    except NetlinkError as error:
        raise NetworkError(f"network {state.id}: {namespace}: the kernel refused: {error.args[1]}") from None


def _buffer_sysctls(topology: Topology) -> dict[str, str]:
    # The first two are the kernel's own defaults: least, and to begin with.
    limit = tcp_buffer_bytes(topology)
    return {"net/ipv4/tcp_rmem": f"4096 131072 {limit}", "net/ipv4/tcp_wmem": f"4096 16384 {limit}"}


def has_ipv6() -> bool:
    """Whether this kernel has IPv6."""
    return Path("/proc/sys/net/ipv6").is_dir()


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


def _set_sysctls(values: dict[str, str]) -> None:
    # /proc/sys/net shows the namespace of the thread that opens the file. There are a dozen a node: no more than it takes.
    for name, value in values.items():
        congestion = name.endswith("tcp_congestion_control")
        try:
            file = os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(file, value.encode())
            finally:
                os.close(file)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and name.startswith("net/ipv6/"):
                continue  # a kernel without IPv6 is as quiet as asked
            if isinstance(error, PermissionError) and congestion:
                continue  # the kernel has it but restricts it; the routes set it regardless
            if congestion:
                offered = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
                raise UsageError(
                    f"congestion control {value!r}: this kernel offers {', '.join(offered)}"
                ) from None
            raise NetworkError(f"sysctl {name.replace('/', '.')} = {value}: {error.strerror}") from None


def _mac(number: int, last: int) -> str:
    return f"02:74:62:{number >> 8:02x}:{number & 255:02x}:{last:02x}"


def _configure_node(state: State, node: str, wire: _Wire, segments: Mapping[int, Mapping[str, int]]) -> None:
    """Makes the node's links, with their ends in the wire, and its addresses, neighbours and routes. Call it inside the node."""
    topology = state.topology
    with Batch(f"network {state.id}: node {node}") as batch:
        batch.link("set", index=_LOOPBACK, state="up", ifalias=state.mark)
        ends = topology.interfaces(node)
        indices = {end.name: _FIRST_INDEX + place for place, end in enumerate(ends)}
        for end in ends:
            _add_end(batch, end, indices[end.name], wire.namespace, _allowed(segments, end))
        batch.send()
        wire.raise_ends(ends)
        for end in ends:
            _address_end(batch, topology, end, indices[end.name])
        _add_routes(batch, topology, node, indices)
        batch.send()
    if topology.ipv6 and topology.forwards(node):
        # Not before the interfaces are without multicast: a router joins ff02::2 on each that has it, and reports so on the link.
        _set_sysctls({"net/ipv6/conf/all/forwarding": "1"})
    with Ethtool() as ethtool:
        for end in ends:
            ethtool.disable_segmentation(end.name, but_transports=_allowed(segments, end) > 1)


def _add_routes(requests: Batch | IPRoute, topology: Topology, node: str, indices: Mapping[str, int]) -> None:
    """The node's routes that leave by these interfaces, name -> index."""
    for route in topology.routes(node):
        if route.interface in indices:
            oif, metrics = indices[route.interface], _metrics(topology.links[route.link])
            requests.route("replace", oif=oif, dst=route.destination, gateway=route.via, metrics=metrics)


def set_link(state: State, number: int, up: bool) -> None:
    """Takes both nodes' interfaces of a link down, or brings them up with all that the kernel forgot, whoever took them down:
    addresses, neighbours and routes. Raises NetworkError."""
    ends = _ends(state.topology, number)
    for end in ends:
        with changing(state, state.namespace(end.node)) as network:
            network.link("set", index=socket.if_nametoindex(end.name), state="up" if up else "down")
    # Not before both ends are up: what leaves by an interface without a carrier has no route.
    for end in ends if up else []:
        with changing(state, state.namespace(end.node)) as network:
            index = socket.if_nametoindex(end.name)
            _address_end(network, state.topology, end, index)
            _add_routes(network, state.topology, end.node, {end.name: index})


def _allowed(segments: Mapping[int, Mapping[str, int]], end: Interface) -> int:
    return segments[end.link]["up" if end.end == "a" else "down"] if end.link in segments else 1


def _add_end(batch: Batch, end: Interface, index: int, wire: int, segments: int) -> None:
    second = end.end == "b"
    name = wire_ends(end.link)[second]
    peer = Peer(name, _FIRST_INDEX + 2 * end.link + second, _mac(end.link, 0x1A + second), wire, segments)
    batch.veth(end.name, index, _mac(end.link, 0x0A + second), MTU, peer)


def _address_end(requests: Batch | IPRoute, topology: Topology, end: Interface, index: int) -> None:
    """Has an interface send, once it and its other end are up, and gives it its addresses and its neighbour.

    When only its other end comes up, the kernel lets it send when it gets round to it (linkwatch: a hundred interfaces a second),
    and drops what is sent before. A queueing discipline, here the one it will have anyway, makes it look at once.
    """
    requests.tc("replace", "noqueue", index)
    second, metrics = end.end == "b", _metrics(topology.links[end.link])
    for address, other, destination, flags, scope in (
        (end.address, end.peer, end.network, 0, _LINK_SCOPE),
        (
            end.address6,
            end.peer6,
            end.network6,
            _NODAD,
            0,
        ),  # used at once: nobody is asked whether it is taken
    ):
        if not address:
            continue
        bits = int(destination.partition("/")[2])
        requests.addr("replace", index=index, address=address, prefixlen=bits, flags=flags)
        # Known for good, so that no packet that asks for it queues, is lost or counted on the emulated link.
        requests.neigh("replace", ifindex=index, dst=other, lladdr=_mac(end.link, 0x0A + (not second)))
        if metrics:  # the route that came with the address, again
            requests.route(
                "replace", oif=index, dst=destination, prefsrc=address, metrics=metrics, scope=scope
            )


def _metrics(link: Link) -> dict[str, str] | None:
    """By route (ip-route(8), congctl) and not only by sysctl: a namespace may only set those algorithms as its default that the
    host allows everybody, and each link can have its own this way."""
    return {"cc_algo": link.congestion} if link.congestion else None
