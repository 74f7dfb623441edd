"""Two namespaces and a wire between them, for emulators to be attached to: ip(8) and nothing of the code under test."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from testbed.net.emulators.emulator import Counters, Emulator
from testbed.net.profile.profile import Profile
from testbed.net.topology.topology import Link, Node, Topology


@dataclass(frozen=True)
class Wire:
    """Namespaces a and b with one ``eth0`` each (10.99.0.1, 10.99.0.2), whose other ends are l0a and l0b in `wire`."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:6])

    @property
    def wire(self) -> str:
        return f"tt-{self.id}-wire"

    def namespace(self, node: str) -> str:
        return f"tt-{self.id}-{node}"

    def address(self, node: str, link: str | None = None) -> str:
        return {"a": "10.99.0.1", "b": "10.99.0.2"}[node]

    def exec(self, node: str, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace(node), *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


@contextmanager
def wire() -> Iterator[Wire]:
    made = Wire()
    names = [made.wire, made.namespace("a"), made.namespace("b")]
    try:
        for name in names:
            _ip(f"netns add {name}")
        for node in ("a", "b"):
            inner = made.namespace(node)
            _ip(f"link add l0{node} netns {made.wire} type veth peer name eth0 netns {inner}")
            _ip(f"-n {inner} addr add {made.address(node)}/24 dev eth0")
            _ip(f"-n {inner} link set eth0 up gso_max_segs 1")
            _ip(f"-n {inner} link set lo up")
            _ip(f"-n {made.wire} link set l0{node} up")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@dataclass
class Conditioned:
    """A wire with an emulator on it, seen as calibration sees a fabric."""

    net: Wire
    emulator: Emulator
    profile: Profile

    def __post_init__(self) -> None:
        self.attachment = self.emulator.attach(self.net.wire, "l0", "l0a", "l0b", self.profile)
        self.topology = Topology("wire", (Node("a"), Node("b")), (Link("l0", "a", "b", self.profile, None),))

    def namespace(self, node: str) -> str:
        return self.net.namespace(node)

    def address(self, node: str, link: str | None = None) -> str:
        return self.net.address(node)

    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None:
        self.attachment.apply(profile, origin_s)

    def counters(self, link: str) -> dict[str, Counters]:
        return self.attachment.counters()
