"""What the kernel is asked for, to make a topology out of namespaces: veth pairs, addresses, routes, sysctls.

Everything is created inside the run's own namespaces; the host's namespace never sees an interface of ours,
not even for a moment.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.errors import NetworkError, UsageError
from testbed.net import namespaces
from testbed.net.offloads import Ethtool
from testbed.net.presets import PRESETS
from testbed.net.profile import MTU
from testbed.net.state import State
from testbed.net.topology import Topology

_MIN_BUFFER_BYTES, _MAX_BUFFER_BYTES = 32_000_000, 1_000_000_000
_LOOPBACK = 1
_FIRST_INDEX = 10


def build(state: State) -> None:
    """Fills the state's namespaces, which exist and are empty: links, addresses, routes, sysctls.

    What arrives at the wire's ends of a link goes nowhere yet: that is the emulator's part. Raises
    NetworkError, or UsageError for a congestion control this kernel does not offer.
    """
    topology = state.topology
    with namespaces.inside(state.wire):
        _set_sysctls({"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/default/disable_ipv6": "1"})
    for node in topology.nodes:
        with namespaces.inside(state.namespace(node.name)):
            _set_sysctls(_node_sysctls(topology, node.name))
    allow_tcp_buffers(state)
    _make_links(state)
    for node in topology.nodes:
        _configure_node(state, node.name)


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
    limit = str(tcp_buffer_bytes(state.topology))
    for node in state.topology.nodes:
        with namespaces.inside(state.namespace(node.name)):
            for name in ("net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"):
                least, usual, _ = _sysctl(name).read_text().split()
                _set_sysctls({name: f"{least} {usual} {limit}"})


def _node_sysctls(topology: Topology, node: str) -> dict[str, str]:
    values = {
        # A new namespace takes over some of the host's settings, so those that matter are all set.
        "net/ipv4/ip_forward": "1" if topology.forwards(node) else "0",
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/default/rp_filter": "0",
        "net/ipv4/conf/all/send_redirects": "0",
        "net/ipv4/conf/default/send_redirects": "0",
        # What one connection learnt about the path must not help the next one.
        "net/ipv4/tcp_no_metrics_save": "1",
        # For the interfaces to come: no neighbour discovery between the packets that are measured. ::1 stays.
        "net/ipv6/conf/default/disable_ipv6": "1",
    }
    congestion = topology.congestion(node)
    if congestion is not None:
        values["net/ipv4/tcp_congestion_control"] = congestion
    return values


def _sysctl(name: str) -> Path:
    # /proc/sys/net shows the namespace of the thread that opens the file
    return Path("/proc/sys") / name


def _set_sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        try:
            _sysctl(name).write_text(value)
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
        offered = _sysctl("net/ipv4/tcp_available_congestion_control").read_text().split()
        raise UsageError(f"congestion control {value!r}: this kernel offers {', '.join(offered)}") from None
    raise NetworkError(f"sysctl {name.replace('/', '.')} = {value}: {error.strerror}") from None


@contextlib.contextmanager
def _netlink(namespace: str, what: str) -> Iterator[IPRoute]:
    """A netlink socket in the namespace, and this thread with it; the kernel's refusal becomes a
    NetworkError."""
    with namespaces.inside(namespace):
        try:
            with IPRoute() as ip:
                yield ip
        except NetlinkError as error:
            raise NetworkError(f"{what}: the kernel refused: {os.strerror(error.code)}") from None


def _mac(number: int, last: int) -> str:
    return f"02:74:62:{number // 256:02x}:{number % 256:02x}:{last:02x}"


def _make_links(state: State) -> None:
    with _netlink(state.wire, f"network {state.id}: links") as ip, Ethtool() as ethtool:
        for node in state.topology.nodes:
            with _open_namespace(state.namespace(node.name)) as descriptor:
                for interface in state.topology.interfaces(node.name):
                    second = interface.end == "b"
                    name = wire_ends(interface.link)[second]
                    index = _FIRST_INDEX + 2 * interface.link + second
                    peer = {
                        "ifname": interface.name,
                        "address": _mac(interface.link, 0x0A + second),
                        "mtu": MTU,
                        "net_ns_fd": descriptor,
                    }
                    address = _mac(interface.link, 0x1A + second)
                    ip.link("add", ifname=name, index=index, kind="veth", address=address, mtu=MTU, peer=peer)
                    ethtool.disable_segmentation(name)
                    ip.link("set", index=index, state="up")


@contextlib.contextmanager
def _open_namespace(name: str) -> Iterator[int]:
    descriptor = os.open(namespaces.path(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _configure_node(state: State, node: str) -> None:
    topology = state.topology
    with _netlink(state.namespace(node), f"network {state.id}: node {node}") as ip, Ethtool() as ethtool:
        ip.link("set", index=_LOOPBACK, state="up")
        indices = {}
        for interface in topology.interfaces(node):
            index = indices[interface.name] = socket.if_nametoindex(interface.name)
            ethtool.disable_segmentation(interface.name)
            ip.addr("add", index=index, address=interface.address, prefixlen=30)
            ip.link("set", index=index, state="up")
            # Known for good, so that no ARP packet queues, is lost or counted on the emulated link.
            other_end = _mac(interface.link, 0x0B if interface.end == "a" else 0x0A)
            ip.neigh("add", dst=interface.peer, lladdr=other_end, ifindex=index, state="permanent")
            metrics = _congestion_metric(topology, interface.link)
            if metrics:  # the route that came with the address, again
                own = {"dst": interface.network, "oif": index, "prefsrc": interface.address, "scope": "link"}
                ip.route("replace", **own, **metrics)
        for route in topology.routes(node):
            metrics = _congestion_metric(topology, route.link)
            ip.route("add", dst=route.destination, gateway=route.via, oif=indices[route.interface], **metrics)


def _congestion_metric(topology: Topology, link: int) -> dict[str, dict[str, str]]:
    # By route (ip-route(8), congctl) and not only by sysctl: a namespace may only set those algorithms as its
    # default that the host allows everybody, and each link can have its own this way.
    congestion = topology.links[link].congestion
    return {"metrics": {"cc_algo": congestion}} if congestion else {}
