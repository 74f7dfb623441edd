"""A network in plain values: what stands, under which profiles, and what its emulators have counted so far."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from testbed.errors import TestbedError, UsageError
from testbed.hosts import namespaces, processes
from testbed.net.fabric import state
from testbed.net.fabric.state import State

if TYPE_CHECKING:
    from testbed.net.emulators.emulator import Attachment


def describe(network: State) -> dict[str, Any]:
    """The network in plain values, for people and JSON: nodes with addresses, links with profiles and live
    counters.

    ``counters`` is None where the emulator cannot be asked: it belongs to another process, or asking takes
    root.
    """
    topology = network.topology
    nodes = [
        {
            "name": node.name,
            "namespace": network.namespace(node.name),
            "addresses": [
                {"link": topology.links[end.link].name, "interface": end.name, "address": end.address}
                | ({"address6": end.address6} if end.address6 else {})
                for end in topology.interfaces(node.name)
            ],
        }
        for node in topology.nodes
    ]
    silent: list[str] = []
    links = [
        {
            "name": link.name,
            "a": link.a,
            "b": link.b,
            "profile": str(link.profile),
            "conditions": link.profile.text(),
            "cell": link.cell,
            "congestion": link.congestion,
            "counters": _live_counters(network, number, silent),
        }
        for number, link in enumerate(topology.links)
    ]
    return {
        "problems": problems(network) or silent,
        "id": network.id,
        "name": network.name,
        "topology": topology.name,
        "emulator": network.emulator,
        "persistent": network.persistent,
        "alive": state.is_alive(network),
        "created_at": network.created_at,
        "process": network.pid,
        "nodes": nodes,
        "links": links,
        "cells": {cell.name: cell.scheduler for cell in topology.cells},
    }


def problems(network: State) -> list[str]:
    """What of a network that should stand is not there any more, a line each."""
    if network.boot != namespaces.boot_id():
        return ["the machine was booted since: nothing of it is left"]
    gone = [name for name in network.namespaces if not namespaces.path(name).exists()]
    helpers = network.processes
    dead = [one for one in helpers if not processes.is_running(one.pid, one.started)]
    stopped = [one for one in helpers if one not in dead and processes.is_stopped(one.pid)]
    lines = [f"namespace {name} is gone" for name in gone]
    lines += [f"process {helper.pid} ({helper.what}) has ended" for helper in dead]
    return lines + [f"process {helper.pid} ({helper.what}) stands still (SIGSTOP)" for helper in stopped]


def _live_counters(network: State, number: int, silent: list[str]) -> dict[str, dict[str, Any]] | None:
    """None where nobody may ask, or where nobody answers, which `silent` then tells of."""
    from testbed.net import emulators

    try:
        namespaces.require_root()
        if not network.keep.is_dir():
            return None
        counters = reattach(network, number).counters()
    except UsageError:
        return None
    except (TestbedError, OSError) as error:
        if network.emulator in emulators.NAMES:
            silent.append(f"link {network.topology.links[number].name} is not as it was made: {error}")
        return None
    return {way: asdict(values) for way, values in counters.items()}


def reattach(network: State, number: int) -> Attachment:
    """The running emulator of link `number` of a network that is up. Raises NetworkError where it cannot be
    found."""
    from testbed.net import emulators

    link, keep = f"l{number}", network.keep
    return emulators.reattach(network.emulator, network.wire, link, f"{link}a", f"{link}b", keep)
