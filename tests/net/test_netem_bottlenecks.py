"""What netem does with the help of other queueing disciplines: traces, CoDel, duplicates. On real namespaces."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import NetworkError
from testbed.hosts.namespaces import call_inside
from testbed.net import emulators
from testbed.net.calibration.calibrate import calibrate
from testbed.net.emulators import Attachment
from testbed.net.emulators.relay.serving import start_time
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from tests.net.wire import Conditioned, Wire, wire

pytestmark = [pytest.mark.netns, pytest.mark.netem]


@pytest.fixture
def net() -> Iterator[Wire]:
    with wire() as made:
        yield made


def attach(net: Wire, profile: str, keep: Path | None = None) -> Attachment:
    """A link whose ends know each other's addresses already: what is counted from here on are the test's own packets."""
    attachment = emulators.choose("netem").attach(
        net.wire, "l0", "l0a", "l0b", parse_profile("delay=1ms"), keep=keep
    )
    net.exec("a", "ping", "-c", "1", net.address("b"))
    attachment.apply(parse_profile(profile))
    return attachment


def sockets(net: Wire) -> tuple[socket.socket, socket.socket]:
    """A sender in a, a receiver in b, of datagrams."""
    receiver = call_inside(net.namespace("b"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender = call_inside(net.namespace("a"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    receiver.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    receiver.bind((net.address("b"), 7000))
    sender.connect((net.address("b"), 7000))
    return sender, receiver


def arrivals(receiver: socket.socket, seconds: float) -> list[tuple[int, float]]:
    """Numbers of the datagrams that come in so many seconds, with the times of their arrival."""
    found, end = [], time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        receiver.settimeout(left)
        try:
            found.append((struct.unpack_from("=I", receiver.recv(2048))[0], time.monotonic()))
        except TimeoutError:
            break
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "up:delay=5ms,sine:1mbit..4mbit*2s;down:rate=2mbit,delay=5ms,outage:500ms@1s/2s",
        "delay=10ms,step:3mbit*300ms+200kbit*400ms+5mbit*300ms",
    ],
)
def test_a_link_follows_its_trace_as_closely_as_calibration_asks(net: Wire, text: str):
    for _ in range(4):  # on a busy host the guest itself is held up
        conditioned = Conditioned(net, emulators.choose("netem"), parse_profile(text))
        measured = calibrate(conditioned, "l0", parse_profile(text), stretch_s=4.0)
        conditioned.attachment.detach()
        if measured.ok:
            break
    assert measured.ok, measured.cause
    assert {check.what for check in measured.checks} >= {"curve", "total"}


def test_no_step_loses_a_packet_that_waits(net: Wire):
    attachment = attach(net, "up:delay=5ms,queue=200p,sine:1mbit..3mbit*100ms;down:delay=1ms")
    sender, receiver = sockets(net)
    with sender, receiver:
        for number in range(150):
            sender.send(struct.pack("=I", number) + bytes(1468))
        # 225 kB at 2 Mbit/s take 0.9 s: more than a hundred steps.
        found = arrivals(receiver, 2.5)
    assert [number for number, _ in found] == list(range(150))
    counted = attachment.counters()["up"]
    assert (counted.dropped_queue, counted.dropped_loss, counted.overrun) == (0, 0, 0)
    assert 0 < counted.worst_lateness_s < 1
    attachment.detach()


def test_an_outage_holds_what_waits_and_drops_what_finds_the_queue_full(net: Wire):
    attachment = attach(net, "delay=1ms")
    profile = "up:rate=8mbit,delay=1ms,queue=10p,outage:1s@100ms;down:delay=1ms"
    sender, receiver = sockets(net)
    with sender, receiver:
        origin = time.monotonic() - 0.2
        attachment.apply(parse_profile(profile), origin)
        for number in range(30):
            sender.send(struct.pack("=I", number) + bytes(1468))
        found = arrivals(receiver, 2.0)
    assert [number for number, _ in found] == list(range(11))  # one that is being sent, ten that wait
    assert all(at - origin > 1.1 for _, at in found)
    assert attachment.counters()["up"].dropped_queue == 19
    attachment.detach()


def test_a_delay_that_changes_is_each_packets_own_and_keeps_the_order(net: Wire, tmp_path: Path):
    (tmp_path / "delays.csv").write_text("time_s,delay_ms\n0,100\n0.5,20\n1,100\n")
    attachment = attach(net, "delay=1ms")
    sender, receiver = sockets(net)
    with sender, receiver:
        attachment.apply(parse_profile(f"up:trace:{tmp_path}/delays.csv;down:delay=1ms"))
        sent = []
        for number in range(90):
            sent.append(time.monotonic())
            sender.send(struct.pack("=I", number))
            time.sleep(0.01)
        found = arrivals(receiver, 0.5)
    assert [number for number, _ in found] == list(range(90))
    took = [at - sent[number] for number, at in found]
    assert min(took[:20]) >= 0.0999  # read late, never early
    stats = subprocess.run(
        ["tc", "-n", net.wire, "qdisc", "show", "dev", "l0b"], capture_output=True, text=True, check=True
    ).stdout
    assert "delay 20ms" in stats or "delay 100ms" in stats
    attachment.detach()


def test_losses_that_change_are_lost_while_they_hold(net: Wire, tmp_path: Path):
    (tmp_path / "losses.csv").write_text("time_s,loss_percent\n0,0\n0.5,100\n1,0\n10,0\n")
    attachment = attach(net, "delay=1ms")
    sender, receiver = sockets(net)
    with sender, receiver:
        origin = time.monotonic()
        attachment.apply(parse_profile(f"up:delay=1ms,trace:{tmp_path}/losses.csv;down:delay=1ms"), origin)
        sent = []
        for number in range(150):
            sent.append(time.monotonic() - origin)
            sender.send(struct.pack("=I", number))
            time.sleep(0.01)
        there = {number for number, _ in arrivals(receiver, 0.3)}
    late = attachment.counters()["up"].worst_lateness_s + 0.012
    for number, at in enumerate(sent):
        if at < 0.5 - 0.005 or at > 1 + late:
            assert number in there, at
        elif 0.5 + late < at < 1 - 0.005:
            assert number not in there, at
    attachment.detach()


def test_codel_keeps_the_queue_short_and_counts_what_it_drops(net: Wire):
    attachment = attach(
        net, "up:rate=4mbit,delay=1ms,queue=codel(1s,target=5ms,interval=50ms);down:delay=1ms"
    )
    sender, receiver = sockets(net)
    with sender, receiver:
        for number in range(400):  # 1.2 s at twice the rate
            sender.send(struct.pack("=I", number) + bytes(1468))
            time.sleep(0.0015)
        found = arrivals(receiver, 2.0)
    counted = attachment.counters()["up"]
    assert counted.dropped_aqm == 400 - len(found) > 5
    assert counted.dropped_queue == counted.dropped_loss == 0
    attachment.detach()


def test_codel_marks_what_allows_it(net: Wire):
    attachment = attach(
        net, "up:rate=4mbit,delay=1ms,ecn=yes,queue=codel(1s,target=5ms,interval=50ms);down:delay=1ms"
    )
    sender, receiver = sockets(net)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 2)  # ECT(0)
    with sender, receiver:
        for number in range(300):
            sender.send(struct.pack("=I", number) + bytes(1468))
            time.sleep(0.0015)
        assert len(arrivals(receiver, 2.0)) == 300
    counted = attachment.counters()["up"]
    assert counted.marked > 5
    assert counted.dropped_aqm == 0
    attachment.detach()


@pytest.mark.parametrize("rate", ["", "rate=20mbit,queue=500p,"])
def test_duplicates_come_twice_and_are_counted(net: Wire, rate: str):
    attachment = attach(net, f"up:{rate}delay=2ms,duplicate=30%;down:delay=1ms")
    sender, receiver = sockets(net)
    with sender, receiver:
        for number in range(400):
            sender.send(struct.pack("=I", number))
            if number % 20 == 19:
                time.sleep(0.01)
        found = [number for number, _ in arrivals(receiver, 0.5)]
    assert sorted(set(found)) == list(range(400))
    twice = sum(1 for _, copies in itertools.groupby(sorted(found)) if len(list(copies)) == 2)
    assert 80 <= twice <= 160
    assert attachment.counters()["up"].duplicated == twice
    attachment.apply(parse_profile("rate=1mbit,delay=1ms"))
    attachment.apply(parse_profile("delay=1ms,duplicate=100%"))
    attachment.detach()


def test_what_follows_a_trace_dies_with_its_owner(net: Wire):
    script = (
        "import sys, time; from testbed.net.emulators.netem.netem import Netem; "
        "from testbed.net.profile.profile import parse_profile;"
        "a = Netem().attach(sys.argv[1], 'l0', 'l0a', 'l0b', parse_profile('delay=1ms,sine:1mbit..2mbit*1s'));"
        "print(*a.process, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, net.wire],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    pid, started = map(int, owner.stdout.readline().split())
    assert start_time(pid) == started
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 10
    while start_time(pid) == started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert start_time(pid) != started


def test_what_follows_a_trace_and_was_killed_is_an_error_that_says_so(net: Wire):
    attachment = attach(net, "delay=1ms,sine:1mbit..2mbit*1s")
    assert attachment.process is not None
    os.kill(attachment.process[0], signal.SIGKILL)
    with pytest.raises(NetworkError, match="link l0: its trace's follower"):
        for _ in range(100):
            attachment.counters()
            time.sleep(0.02)
    attachment.detach()


def test_a_kept_link_goes_on_following_and_can_be_put_under_another_trace(net: Wire, tmp_path: Path):
    attachment = attach(net, "delay=1ms,sine:1mbit..2mbit*1s", keep=tmp_path)
    found = emulators.reattach("netem", net.wire, "l0", "l0a", "l0b", tmp_path)
    assert found.process == attachment.process
    found.apply(parse_profile("delay=1ms,rate=1mbit,outage:10s@0s"))
    assert " 100% packet loss" in net.exec("a", "ping", "-c", "1", "-W", "1", net.address("b"), check=False)
    found.apply(parse_profile("delay=1ms"))
    net.exec("a", "ping", "-c", "1", net.address("b"))
    found.detach()
    assert list(tmp_path.iterdir()) == []


def test_a_network_records_what_follows_its_traces_and_takes_it_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path))
    before = parse_profile("rate=5mbit,delay=1ms")
    topology = Topology("t", (Node("a"), Node("b")), (Link("wan", "a", "b", before, None),))
    with Fabric.build(topology, "netem") as fabric:
        assert fabric.state.processes == ()
        fabric.apply("wan", parse_profile("delay=1ms,sine:1mbit..2mbit*1s"))
        (process,) = fabric.state.processes
        assert start_time(process.pid) == process.started
        assert (
            Path(f"/proc/{process.pid}/ns/net").stat().st_ino
            == Path(f"/run/netns/{fabric.state.wire}").stat().st_ino
        )
    assert start_time(process.pid) != process.started
