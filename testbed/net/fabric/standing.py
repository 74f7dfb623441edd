"""A network that stands is put under other conditions by whoever comes, not by who built it."""

from __future__ import annotations

from dataclasses import replace

from testbed.errors import NetworkError
from testbed.net import emulators
from testbed.net.fabric import state as states
from testbed.net.fabric import wiring
from testbed.net.fabric.description import reattach
from testbed.net.fabric.state import State
from testbed.net.profile.profile import Profile


def set_profile(network: State, link: str, profile: Profile) -> State:
    """Puts a link of a persistent network under another profile, whose traces begin now, and notes it. What is under way stays,
    and connections survive. Raises SpecError: no such link; NetworkError: the network is a run's, or its emulator is gone.
    """
    number = network.topology.link_number(link)
    if not network.persistent:
        raise NetworkError(
            f"network {network.called} belongs to a run (process {network.pid}), which sets its links itself"
        )
    before = network.topology.links[number].profile
    fresh = replace(network, topology=network.topology.with_profiles({link: profile}))
    if wiring.tcp_buffer_bytes(fresh.topology) != wiring.tcp_buffer_bytes(network.topology):
        wiring.allow_tcp_buffers(fresh)
    attachment = reattach(network, number)
    served = attachment.process
    attachment.apply(profile)
    if before.up.mtu != profile.up.mtu:
        wiring.set_mtu(network, number, profile.up.mtu)
    _allow_super_packets(fresh, number, before)
    with states.locked():
        states.write(fresh)
        if attachment.process is not None and attachment.process != served:
            return states.add_processes(fresh, [(*attachment.process, f"emulator of link {link}")])
    return fresh


def _allow_super_packets(network: State, number: int, before: Profile) -> None:
    """What enters the link as one packet is again of the size that its profile, and its emulator, ask for."""
    link = network.topology.links[number]
    if link.cell is not None:  # whose users take turns, packet by packet
        return
    emulator = emulators.choose(network.emulator)
    then, now = emulator.super_packets(before), emulator.super_packets(link.profile)
    if then != now:
        wiring.allow_super_packets(network, number, now)
