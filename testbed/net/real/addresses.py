"""Where a node's data comes in: as its topology says, or else where SSH reaches its host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.errors import NetworkError, SpecError
from testbed.hosts.host import Host
from testbed.net.topology.topology import Node


def data_address(node: Node, host: Host, found: Mapping[str, Any]) -> str:
    """An IPv4 address. found: what `survey` says of the host. Raises SpecError where the topology has to say it, NetworkError
    where the host has no such interface, or not the address by which SSH reaches it."""
    if node.address:
        return node.address
    ends = found["interfaces"]
    has = ", ".join(f"{name} {address}" for name, end in ends.items() for address in end["addresses"])
    if node.interface:
        if node.interface not in ends:
            raise NetworkError(f"no interface {node.interface} with an IPv4 address; there are: {has}")
        return str(ends[node.interface]["address"])
    say = f"say by address: or interface: where its data comes in, an IPv4 address; there are: {has}"
    if node.host is None or node.host.local:
        raise SpecError(f"is this machine; {say}")
    reached = getattr(host, "addresses", None)
    # Behind another host SSH reaches it by the address that it tells itself.
    by_ssh = (reached()[1] if reached is not None else "") or str(found["ssh_address"])
    if not by_ssh or ":" in by_ssh:
        raise SpecError(f"is reached by SSH at {by_ssh or 'no address'}; {say}")
    if not interface_of(by_ssh, found):
        raise NetworkError(
            f"SSH reaches it at {by_ssh}, which is no address of it, so it cannot listen there; {say}"
        )
    return by_ssh


def interface_of(address: str, found: Mapping[str, Any]) -> str:
    """Which of a host's interfaces has that address; empty: none has."""
    ends = found["interfaces"].items()
    return next((str(name) for name, end in ends if address in end["addresses"]), "")
