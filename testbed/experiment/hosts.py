"""Real hosts looked at before a run: what each has, what lies between them. For `testbed hosts`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from testbed import __version__
from testbed.deadline import Deadline
from testbed.errors import EndpointError, TestbedError, UsageError
from testbed.experiment.environment import Finding
from testbed.hosts import asking, installing, survey
from testbed.hosts.address import Address
from testbed.hosts.host import Host
from testbed.net.real.addresses import data_address, interface_of
from testbed.net.topology.topology import PYTHON, Link, Node, Topology

_ANSWER_S = 20.0


@dataclass
class Examined:
    """One node's host. `found`: what `survey` says of it; empty where it could not be asked. `python`: which one answered."""

    node: Node
    host: Host | None = None
    python: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def address(self) -> str:
        """At which the node's data is to arrive. Raises SpecError, NetworkError as `data_address` does."""
        assert self.host is not None
        return data_address(self.node, self.host, self.found)


@dataclass(frozen=True)
class Path:
    """From one node to another: what `survey` measured, and whether it does."""

    link: str
    ends: tuple[str, str]
    finding: Finding
    measured: dict[str, Any]


def real(topology: Topology) -> list[Node]:
    """Its nodes, which are on hosts of their own. Raises UsageError where they are namespaces."""
    nodes = [node for node in topology.nodes if node.host is not None]
    if topology.kind == "namespaces":
        raise UsageError(
            f"topology {topology.name} has no hosts: its nodes are namespaces of this machine (testbed doctor looks at that)"
        )
    return nodes


def examine(topology: Topology) -> tuple[list[Examined], list[Path]]:
    """Every host, and every link both ways. Raises UsageError."""
    shaped = {link.shape for link in topology.links}
    with contextlib.ExitStack() as closing, ThreadPoolExecutor(max_workers=8) as pool:
        looked = list(pool.map(lambda node: look(node, node.name in shaped, closing), real(topology)))
        by_name = {one.node.name: one for one in looked if one.found}
        paths = []
        for link in topology.links:
            if link.a in by_name and link.b in by_name:
                paths.append(_path(link, by_name[link.a], by_name[link.b], needed=True))
                paths.append(_path(link, by_name[link.b], by_name[link.a], needed=False))
        return looked, paths


def look(node: Node, shaped: bool, closing: contextlib.ExitStack) -> Examined:
    """Look at the host of a node that has one. `shaped`: it is to put a link under conditions; `closing` keeps its connection."""
    assert node.host is not None
    one = Examined(node)
    no_python: list[str] = []
    for python in dict.fromkeys((python_of(node), PYTHON)):
        try:
            one.host, one.python = closing.enter_context(opened(node.host, python)), python
            one.found = asking.asked(
                one.host, python, "survey", "torch", f"{PurePosixPath(python_of(node)).parent}/"
            )
            break
        except TestbedError as error:
            no_python.append(str(error))
    if not one.found:
        one.findings = [Finding("reached", False, "; ".join(dict.fromkeys(no_python)))]
        return one
    if node.host.local:  # whose programs may not become root again
        one.found["sudo"] = survey.sudo()
    one.findings = [
        _python(one, "".join(no_python)),
        _testbed(one),
        *_packages(one),
        _device(one),
        _memory(one),
        *_kernel(one, shaped),
        _clock(one),
        _network(one),
    ]
    return one


def _python(one: Examined, no_python: str) -> Finding:
    version = one.found["python"]["version"]
    if no_python:
        return Finding("python", False, no_python)
    new = tuple(map(int, version.split(".")[:2])) >= installing.OLDEST
    return Finding("python", new, version if new else f"{version}: the testbed needs 3.11 or newer")


def _testbed(one: Examined) -> Finding:
    there, remedy = one.found["testbed"], "testbed hosts install puts this one there"
    if not there:
        return Finding("testbed", False, f"not installed; {remedy}")
    if there["digest"] != installing.digest():
        return Finding("testbed", False, f"another than here, in {there['path']}; {remedy}")
    return Finding("testbed", True, f"{__version__}, this very one, in {there['path']}")


def _packages(one: Examined) -> Iterator[Finding]:
    for name in ("torch", "transformers"):
        version = one.found["packages"].get(name, "")
        yield Finding(name, bool(version), version or "not installed; testbed hosts install puts it there")


def _device(one: Examined) -> Finding:
    seen, wanted = one.found["torch"], one.node.device or ""
    gpus = seen if isinstance(seen, list) else []
    number = int(wanted.partition(":")[2] or 0)
    if gpus and number < len(gpus):
        return Finding("device", True, ", ".join(f"{name}, {size / 1e9:.1f} GB" for name, size in gpus))
    there = ", ".join(one.found["gpus"]) or "no GPU"
    why = f"; torch: {seen}" if isinstance(seen, str) else f"; torch sees {len(gpus)} GPUs"
    if wanted.startswith("cuda"):
        return Finding("device", False, f"{wanted} is asked for: {there}{why}")
    board = f"{one.found['board']}, " if one.found["board"] else ""
    return Finding(
        "device", True, f"{board}{one.found['cpu']}, {one.found['cores']} cores; {there}{why}", False
    )


def _memory(one: Examined) -> Finding:
    (free,) = one.found["room"].values()
    memory, available = one.found["memory_bytes"], one.found["available_bytes"]
    return Finding(
        "memory",
        True,
        f"{memory / 1e9:.1f} GB, {available / 1e9:.1f} available; on disk {free / 1e9:.1f} free",
        False,
    )


def _kernel(one: Examined, shaped: bool) -> Iterator[Finding]:
    found = one.found
    congestion = " ".join(found["congestion"])
    yield Finding("congestion control", bool(congestion), congestion or "the kernel does not say", False)
    netem, may = found["sch_netem"], found["sudo"] in ("root", "yes")
    able = netem not in ("", "no")
    yield Finding(
        "sch_netem", able, netem or "not to be seen: /lib/modules is not there", shaped and netem == "no"
    )
    yield Finding("sudo", may, found["sudo"] + ("" if may else "; only `shape:` needs it"), shaped)


def _clock(one: Examined) -> Finding:
    clock = one.found["clock"]
    said = [f"PTP: {', '.join(clock['ptp'])}"] if clock["ptp"] else []
    said += [f"{', '.join(clock['running'])} runs"] if clock["running"] else []
    if "chrony" in clock:
        said.append(f"chrony: {clock['chrony'].get('System time', 'not synchronized')}")
    if "synchronized" in clock:
        said.append("synchronized" if clock["synchronized"] else "not synchronized")
    return Finding("clock", bool(said), "; ".join(said) or "nothing is known to keep it right", False)


def _network(one: Examined) -> Finding:
    try:
        address = one.address()
    except TestbedError as error:
        return Finding("network", False, str(error))
    ends = one.found["interfaces"]
    name = interface_of(address, one.found)
    if not name:
        known = ", ".join(f"{name} {each}" for name, end in ends.items() for each in end["addresses"])
        return Finding(
            "network", False, f"{address} is no address of it, so it cannot listen there; it has: {known}"
        )
    ssh = " (SSH comes by it, too)" if one.found["ssh_address"] == address else ""
    return Finding("network", True, f"{address} on {name}, MTU {ends[name]['mtu']}{ssh}")


def _path(link: Link, a: Examined, b: Examined, needed: bool) -> Path:
    """What a's connection to b's data address meets."""
    ends = a.node.name, b.node.name
    try:
        address = b.address()
        measured = _measured(a, b, address)
    except TestbedError as failed:
        return Path(link.name, ends, Finding("TCP", False, f"{b.node.name}: {failed}", needed), {})
    if "error" in measured:
        said = f"{address}: {measured['error']}; does a firewall let TCP through?"
        return Path(link.name, ends, Finding("TCP", False, said, needed), measured)
    way = f"from {measured['source']} on {measured['interface'] or 'an interface of another address'}"
    by = f" by {measured['gateway']}" if measured["gateway"] else ""
    said = (
        f"RTT {measured['rtt_s'] * 1e3:.2f} ms at least, median {measured['rtt_median_s'] * 1e3:.2f} "
        f"(n = {measured['exchanges']}), MTU {measured['mtu']}, {way}{by}"
    )
    return Path(link.name, ends, Finding("TCP", True, said, needed), measured)


def _measured(a: Examined, b: Examined, address: str) -> dict[str, Any]:
    assert a.host is not None and b.host is not None
    with b.host.start(asking.program(b.python, "echo", address), {}) as process:
        said = asking.read(process, lambda data: b"\n" in data, Deadline(_ANSWER_S), f"{b.node.name}'s echo")
        if b"\n" not in said:
            process.status(_ANSWER_S)
            return {"error": f"{b.node.name} cannot listen there: {process.last_words()}"}
        return dict(asking.asked(a.host, a.python, "reach", address, said.decode().strip()))


def python_of(node: Node) -> str:
    """The Python that has the node's testbed."""
    return sys.executable if node.host and node.host.local else node.python


@contextlib.contextmanager
def opened(address: Address, python: str) -> Iterator[Host]:
    """A host, until the block ends. Raises EndpointError, UsageError."""
    host = address.host(python)
    with host if isinstance(host, contextlib.AbstractContextManager) else contextlib.nullcontext():
        yield host


@contextlib.contextmanager
def reached(node: Node) -> Iterator[Host]:
    """A node's host, by the Python of its environment, or else the system's. Raises EndpointError, UsageError."""
    assert node.host is not None
    for python in dict.fromkeys((python_of(node), PYTHON)):
        with opened(node.host, python) as host:
            try:
                host.describe()
            except EndpointError:
                # Where there is no connection another Python is none the better.
                if python == PYTHON or not getattr(host, "connected", True):
                    raise
                continue
            yield host
            return
