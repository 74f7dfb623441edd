"""How long a network of many nodes takes to build and to remove, beside the same built by ``ip -batch`` and ``tc``.

    sudo python -m benchmarks.topology_scale [--nodes 10 100 300 1000] [--emulator auto] [--repeats 3] [--json]

The network is a star: leaves around a router, each leaf on a link of its own, both ways of which are shaped. Ours puts every
link under a whole profile (rate, delay, queue) by the emulator that the table names. The reference is what one writes by hand,
with as few processes as its tools allow (``ip -batch`` for namespaces and veth pairs, one ``ip -batch`` in each namespace for
addresses, neighbours and routes, one ``tc -batch`` for the wire): the same namespaces, veth pairs, IPv4 and IPv6 addresses,
routes, permanent neighbours and redirects, and a netem of that rate and delay where the kernel has one, else a tbf of the rate
alone. It sets no sysctl but forwarding, turns no offload off, keeps no record of what it made, and its files are written before
the clock runs.

``down`` is the time until the command that removes has ended. The kernel takes namespaces apart in the background after
that, for both; ``kernel`` is how long that took from then on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from testbed.net.emulators import NAMES, choose
from testbed.net.emulators.netem.support import available
from testbed.net.fabric import removal
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile, parse_profile
from testbed.net.topology.topology import Link, Node, Topology

PROFILE = parse_profile("rate=100mbit,delay=10ms")
_ALL = "match u32 0 0 action mirred egress redirect dev"


def star(nodes: int, profile: Profile = PROFILE) -> Topology:
    """A router and `nodes` - 1 leaves, each on a link of its own."""
    names = [f"n{number}" for number in range(1, nodes)]
    links = tuple(Link(f"to-{name}", name, "hub", profile) for name in names)
    return Topology(f"star-{nodes}", (Node("hub"), *map(Node, names)), links)


class Reference:
    """The same network by ``ip -batch`` and ``tc -batch``."""

    def __init__(self, topology: Topology, netem: bool) -> None:
        self._topology, self._netem = topology, netem
        self._directory = Path(tempfile.mkdtemp(prefix="topology-scale-"))
        self._write()

    def _namespace(self, node: str) -> str:
        return f"tbref-{node}"

    def _write(self) -> None:
        # Files are written before the clock runs: what is timed is the tools and the kernel.
        topology, nodes = self._topology, [node.name for node in self._topology.nodes]
        names = [self._namespace(node) for node in [*nodes, "wire"]]
        first = [f"netns add {name}" for name in names]
        second = []
        for number, link in enumerate(topology.links):
            for end, node in (("a", link.a), ("b", link.b)):
                inside = next(i.name for i in topology.interfaces(node) if i.link == number)
                mac = (
                    f"address 02:74:62:{number // 256:02x}:{number % 256:02x}:{'1a' if end == 'a' else '1b'}"
                )
                peer = (
                    f"address 02:74:62:{number // 256:02x}:{number % 256:02x}:{'0a' if end == 'a' else '0b'}"
                )
                second.append(
                    f"link add l{number}{end} {mac} type veth peer name {inside} {peer} netns {self._namespace(node)}"
                )
                second.append(f"link set l{number}{end} up")
        self._files = {"namespaces": first, "links": second, "shapers": self._shapers()}
        for node in nodes:
            self._files[f"node-{node}"] = self._node(node)
        self._files["remove"] = [f"netns del {name}" for name in names]
        for name, lines in self._files.items():
            (self._directory / name).write_text("\n".join(lines) + "\n")

    def _node(self, node: str) -> list[str]:
        lines = ["link set lo up"]
        for interface in self._topology.interfaces(node):
            number, other = interface.link, "0b" if interface.end == "a" else "0a"
            lines += [
                f"link set {interface.name} up arp off multicast off",
                f"addr add {interface.address}/30 dev {interface.name}",
                f"addr add {interface.address6}/64 dev {interface.name} nodad",
            ]
            mac = f"02:74:62:{number // 256:02x}:{number % 256:02x}:{other}"
            for peer in (interface.peer, interface.peer6):
                lines.append(f"neigh add {peer} lladdr {mac} dev {interface.name} nud permanent")
        routes = self._topology.routes(node)
        return [*lines, *(f"route add {r.destination} via {r.via} dev {r.interface}" for r in routes)]

    def _shapers(self) -> list[str]:
        lines = []
        shaper = (
            "netem rate 100mbit delay 10ms" if self._netem else "tbf rate 100mbit burst 32kb latency 20ms"
        )
        for number in range(len(self._topology.links)):
            for here, there in ((f"l{number}a", f"l{number}b"), (f"l{number}b", f"l{number}a")):
                lines += [
                    f"qdisc add dev {there} root {shaper}",
                    f"qdisc add dev {here} ingress",
                    f"filter add dev {here} parent ffff: u32 {_ALL} {there}",
                ]
        return lines

    def up(self) -> None:
        wire, at = self._namespace("wire"), str(self._directory)
        run("ip", "-batch", f"{at}/namespaces")
        run("ip", "-n", wire, "-batch", f"{at}/links")
        for node in self._topology.nodes:
            run("ip", "-n", self._namespace(node.name), "-batch", f"{at}/node-{node.name}")
            if self._topology.forwards(node.name):
                forward = ("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
                run("ip", "netns", "exec", self._namespace(node.name), *forward)
        run("tc", "-n", wire, "-batch", f"{at}/shapers")

    def down(self) -> None:
        run("ip", "-batch", str(self._directory / "remove"))
        shutil.rmtree(self._directory)


class Ours:
    """The network by `Fabric`."""

    def __init__(self, topology: Topology, emulator: str) -> None:
        self._topology, self._emulator = topology, emulator

    def up(self) -> None:
        self._fabric = Fabric.build(self._topology, self._emulator)

    def down(self) -> None:
        self._fabric.close()


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Canary:
    """Tells when the kernel has taken apart what was removed.

    It does so one batch after the other; so a namespace that is removed now is gone when all that were removed before are, and
    that shows on a veth whose other end was in it.
    """

    _NAMES = ("tbref-canary-a", "tbref-canary-b")

    def __enter__(self) -> Canary:
        for name in self._NAMES:
            run("ip", "netns", "add", name)
        first, second = self._NAMES
        run("ip", "-n", first, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", second)
        return self

    def wait(self, limit_s: float = 300.0) -> float:
        """Seconds until everything removed so far is gone."""
        start = time.perf_counter()
        first, second = self._NAMES
        run("ip", "netns", "del", second)
        while time.perf_counter() - start < limit_s:
            shown = subprocess.run(["ip", "-n", first, "link", "show", "v0"], capture_output=True)
            if shown.returncode != 0:
                break
            time.sleep(0.02)
        return time.perf_counter() - start

    def __exit__(self, *_: object) -> None:
        for name in self._NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(nodes: int, emulator: str, netem: bool) -> dict[str, float]:
    """One build and removal, ours and the reference's, each in seconds."""
    topology = star(nodes)
    figures: dict[str, float] = {}
    for name, way in (("ours", Ours(topology, emulator)), ("tools", Reference(topology, netem))):
        with Canary() as canary:
            figures[f"{name}_up_s"] = timed(way.up)
            figures[f"{name}_down_s"] = timed(way.down)
            figures[f"{name}_kernel_s"] = canary.wait()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--emulator", default="auto", choices=NAMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="everything measured, as JSON")
    options = parser.parse_args()
    removal.clean()
    netem = available()
    emulator = choose(options.emulator).name
    rows = []
    measure(2, emulator, netem)  # what is imported and loaded once
    for nodes in options.nodes:
        repeats = [measure(nodes, emulator, netem) for _ in range(options.repeats)]
        medians = {key: statistics.median(one[key] for one in repeats) for key in repeats[0]}
        rows.append({"nodes": nodes, "repeats": repeats, **medians})
    shaper = "netem" if netem else "tbf"
    if options.json:
        print(
            json.dumps({"emulator": emulator, "reference": f"ip -batch, tc {shaper}", "rows": rows}, indent=1)
        )
        return
    print(
        f"ours: {emulator}; tools: ip -batch and tc {shaper}; medians of {options.repeats}, seconds (per node: ms)\n"
    )
    columns = ("up", "per node", "down", "kernel")
    print(f"{'':>6}  {'ours':^40}  {'tools':^40}  {'ratio':>6}")
    print(
        f"{'nodes':>6}  "
        + "  ".join("".join(f"{name:>10}" for name in columns) for _ in range(2))
        + f"  {'up':>6}"
    )
    for row in rows:
        cells = []
        for name in ("ours", "tools"):
            up, down, kernel = (row[f"{name}_{what}_s"] for what in ("up", "down", "kernel"))
            cells.append(f"{up:10.3f}{1e3 * up / row['nodes']:10.2f}{down:10.3f}{kernel:10.3f}")
        print(f"{row['nodes']:>6}  {cells[0]}  {cells[1]}  {row['tools_up_s'] / row['ours_up_s']:6.2f}")


if __name__ == "__main__":
    main()
