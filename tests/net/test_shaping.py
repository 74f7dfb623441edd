"""A link between hosts that one of them shapes: what crosses it, what does not, and what is left when something dies."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from testbed.errors import NetworkError, UsageError
from testbed.hosts.local import Namespace
from testbed.hosts.namespaces import call_inside
from testbed.net.profile.profile import parse_profile
from testbed.net.real import shaper
from testbed.net.real.shaping import Shaping, clean
from tests import kernel

pytestmark = pytest.mark.netns
UNDER = parse_profile("up:rate=20mbit,delay=15ms;down:rate=40mbit,delay=25ms")


@dataclass
class Pair:
    """Two hosts by a cable: here 10.98.0.1 at eth0, there 10.98.0.2 and, for somebody else's packets, 10.98.0.3."""

    here: str
    there: str

    @property
    def host(self) -> Namespace:
        return Namespace(self.here)

    def run(self, *command: str) -> str:
        return subprocess.run(
            ["ip", "netns", "exec", self.here, *command], capture_output=True, text=True, check=True
        ).stdout

    def ping_ms(self, address: str) -> float:
        found = re.search(r"= ([\d.]+)/", self.run("ping", "-q", "-i", "0.1", "-c", "5", address))
        assert found
        return float(found[1])

    def there_is(self) -> tuple[str, str, str]:
        """Queueing disciplines, interfaces and offloads."""
        offloads = self.run("ethtool", "-k", "eth0") if _has_ethtool() else ""
        return self.run("tc", "qdisc"), self.run("ip", "-o", "link"), offloads


def _has_ethtool() -> bool:
    return Path("/usr/sbin/ethtool").exists()


@pytest.fixture
def pair() -> Iterator[Pair]:
    names = Pair(f"tt-shape-{time.monotonic_ns() % 10**6}a", f"tt-shape-{time.monotonic_ns() % 10**6}b")
    try:
        for name in (names.here, names.there):
            _ip(f"netns add {name}")
        _ip(f"link add eth0 netns {names.here} type veth peer name eth0 netns {names.there}")
        for name, addresses in ((names.here, ["1"]), (names.there, ["2", "3"])):
            for last in addresses:
                _ip(f"-n {name} addr add 10.98.0.{last}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up gso_max_segs 1")
            _ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in (names.here, names.there):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def rate_bps(sender: str, receiver: str, address: str, count: int = 6_000_000) -> float:
    """What TCP carries from one namespace to an address in another, behind the first third of it."""
    listener = call_inside(receiver, lambda: socket.create_server((address, 0)))
    client = call_inside(sender, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))

    def send() -> None:
        with client:
            client.connect(listener.getsockname())
            client.sendall(bytes(count))

    thread = threading.Thread(target=send)
    thread.start()
    with listener, listener.accept()[0] as stream:
        had, since, at = 0, 0.0, 0
        while piece := stream.recv(1 << 16):
            had += len(piece)
            if not since and had > count // 3:
                since, at = time.monotonic(), had
        rate = 8 * (had - at) / (time.monotonic() - since)
    thread.join()
    return rate


@pytest.mark.netem
def test_the_peer_is_met_under_the_profile_and_nobody_else(pair: Pair) -> None:
    before = pair.there_is()
    with Shaping(pair.host, "eth0", "10.98.0.2") as shaping:
        shaping.apply(UNDER)
        shaping.check()
        pinged, other = pair.ping_ms("10.98.0.2"), pair.ping_ms("10.98.0.3")
        assert 40 <= pinged < 46
        assert other < 5
        counted = shaping.counters()
        assert {way: found.packets for way, found in counted.items()} == {"up": 5, "down": 5}
        assert {way: found.bytes for way, found in counted.items()} == {"up": 5 * 84, "down": 5 * 84}
        assert {way: found.delivered for way, found in counted.items()} == {"up": 5, "down": 5}
        up = rate_bps(pair.here, pair.there, "10.98.0.2")
        down = rate_bps(pair.there, pair.here, "10.98.0.1")
        print(f"ping {pinged} ms, beside {other} ms; {up / 1e6:.2f} and {down / 1e6:.2f} Mbit/s of payload")
        assert up == pytest.approx(20e6, rel=0.08)
        assert down == pytest.approx(40e6, rel=0.08)
        entered = shaping.counters()
        shaping.apply(parse_profile("delay=5ms,loss=5%"))
        assert 10 <= pair.ping_ms("10.98.0.2") < 16
        assert shaping.counters()["up"].packets >= entered["up"].packets + 5
    assert pair.there_is() == before
    assert pair.ping_ms("10.98.0.2") < 5


@pytest.mark.netem
def test_a_change_by_somebody_else_is_found(pair: Pair) -> None:
    with Shaping(pair.host, "eth0", "10.98.0.2", egress="down") as shaping:
        shaping.apply(UNDER)
        (name,) = re.findall(r"(tbs\d+e)", pair.run("ip", "-o", "link"))[:1]
        pair.run("tc", "qdisc", "change", "dev", name, "handle", "1:", "root", "netem", "delay", "1ms")
        with pytest.raises(NetworkError, match=r"\(down\): netem differs: .*delay: asked 25000000"):
            shaping.check()
        pair.run("tc", "qdisc", "del", "dev", "eth0", "clsact")
        with pytest.raises(NetworkError, match="its filter is gone"):
            shaping.counters()


def _helpers(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def _soon(true: object, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    assert callable(true)
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(true())


@pytest.mark.netem
def test_whatever_dies_what_was_shaped_is_undone(pair: Pair) -> None:
    before = pair.there_is()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for which in (0, -1):  # who watches, who works
            shaping = Shaping(pair.host, "eth0", "10.98.0.2")
            with shaping:
                shaping.apply(UNDER)
                watch, work = sorted(_helpers(pair.here))
                subprocess.run(["kill", f"-{number.value}", str((watch, work)[which])], check=True)
                if which:
                    assert _soon(lambda: pair.there_is() == before)
                    with pytest.raises(NetworkError, match="has ended"):
                        shaping.check()
            assert _soon(lambda: pair.there_is() == before)
    with Shaping(pair.host, "eth0", "10.98.0.2") as shaping:
        shaping.apply(UNDER)
        subprocess.run(["kill", "-9", *map(str, sorted(_helpers(pair.here)))], check=True)
        time.sleep(0.2)
    assert pair.there_is() != before
    assert clean(pair.host) == ["eth0"]
    assert pair.there_is() == before
    assert clean(pair.host) == []


@pytest.mark.netem
def test_a_killed_owner_leaves_nothing_shaped(pair: Pair) -> None:
    before = pair.there_is()
    program = (
        "import sys, time; from testbed.hosts.local import Namespace; from testbed.net.real.shaping import Shaping\n"
        "from testbed.net.profile.profile import parse_profile\n"
        f"with Shaping(Namespace({pair.here!r}), 'eth0', '10.98.0.2') as s:\n"
        " s.apply(parse_profile('delay=20ms')); print('on', flush=True); time.sleep(60)\n"
    )
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"on\n"
            assert pair.there_is() != before
            owner.kill()
        assert _soon(lambda: pair.there_is() == before)
        assert _soon(lambda: not _helpers(pair.here))


def test_an_interface_that_carries_ssh_is_refused_unless_told(pair: Pair) -> None:
    before = pair.there_is()
    refused = "eth0 carries the SSH connection"
    with pytest.raises(UsageError, match=refused), Shaping(pair.host, "eth0", "10.98.0.2", ssh=["10.98.0.3"]):
        pass
    with Shaping(pair.host, "eth0", "10.98.0.2", ssh=["10.98.0.3"], force=True) as shaping:
        shaping.check()
    assert pair.there_is() == before


def test_what_cannot_be_shaped_is_refused_in_a_line(pair: Pair) -> None:
    for interface, peer, why in (
        ("eth7", "10.98.0.2", "no interface eth7 there"),
        ("lo", "10.98.0.2", "10.98.0.2 is not reached by lo"),
        ("eth0", "192.0.2.1", "192.0.2.1 is not reached by eth0"),
    ):
        with pytest.raises(UsageError, match=why), Shaping(pair.host, interface, peer):
            pass
    with (
        Shaping(pair.host, "eth0", "10.98.0.2"),
        pytest.raises(UsageError, match="eth0 is shaped by another run"),
        Shaping(pair.host, "eth0", "10.98.0.3"),
    ):
        pass
    pair.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    with pytest.raises(UsageError, match="somebody else's"), Shaping(pair.host, "eth0", "10.98.0.2"):
        pass
    assert "clsact" in pair.run("tc", "qdisc")


def test_a_kernel_without_netem_says_so_and_keeps_nothing(pair: Pair) -> None:
    if not kernel.lacks_netem():
        pytest.skip("this kernel has netem")
    before = pair.there_is()
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(UsageError, match=r"this kernel has no sch_netem \(try modprobe sch_netem\)"),
    ):
        stack.enter_context(Shaping(pair.host, "eth0", "10.98.0.2")).apply(UNDER)
    stack.close()
    assert pair.there_is() == before


@pytest.mark.netem
def test_what_is_spared_is_not_shaped(pair: Pair) -> None:
    with Shaping(pair.host, "eth0", "10.98.0.2", spare=[2222]) as shaping:
        shaping.apply(parse_profile("delay=100ms"))
        took = []
        for port in (2222, 2223):
            listener = call_inside(pair.there, lambda port=port: socket.create_server(("10.98.0.2", port)))  # type: ignore[misc]
            client = call_inside(pair.here, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            with listener, client:
                since = time.monotonic()
                client.connect(("10.98.0.2", port))
                took.append(time.monotonic() - since)
        assert took[0] < 0.1 < 0.2 <= took[1]


@pytest.mark.parametrize("address", ["::1", "fe80::1%lo", "127.0.0.1"])
def test_an_interface_that_carries_ssh_is_refused_by_whatever_kind_of_address(address: str) -> None:
    asked = {"interface": "lo", "peer": "127.0.0.2", "force": False, "ssh": [address], "spare": []}
    with pytest.raises(shaper.Refusal, match=re.escape(f"lo carries the SSH connection ({address})")):
        shaper._refuse(shaper.Kernel(), asked)
    shaper._refuse(shaper.Kernel(), {**asked, "force": True})
