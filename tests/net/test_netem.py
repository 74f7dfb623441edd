"""Links under netem and the queueing disciplines beside it, on real namespaces; in tc's own words, too."""

from __future__ import annotations

import itertools
import re
import socket
import struct
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import NetworkError, UsageError
from testbed.hosts.namespaces import call_inside
from testbed.hosts.processes import start_time
from testbed.net import emulators
from testbed.net.emulators.emulator import Attachment
from testbed.net.emulators.netem import netem, qdiscs, support
from testbed.net.emulators.netem.options import Options
from testbed.net.emulators.netem.qdiscs import Qdisc
from testbed.net.fabric.fabric import Fabric
from testbed.net.netlink import Netlink
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from tests.net.wire import Wire

pytestmark = [pytest.mark.netns, pytest.mark.netem]


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
    """Numbers of the datagrams that are there, or come in so many seconds, with the times of their arrival."""
    found, end = [], time.monotonic() + seconds
    while True:
        receiver.settimeout(max(0.0, end - time.monotonic()))
        try:
            found.append((struct.unpack_from("=I", receiver.recv(2048))[0], time.monotonic()))
        except (TimeoutError, BlockingIOError):
            return found


def order_of(net: Wire, count: int, tos: int = 0) -> list[int]:
    """The numbers of *count* datagrams from a to b, in the order of their arrival."""
    sender, receiver = sockets(net)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    order: list[int] = []
    with sender, receiver:
        for number in range(count):
            sender.send(struct.pack("=I", number))
            if number % 50 == 49:
                time.sleep(0.005)
                order += [there for there, _ in arrivals(receiver, 0.0)]
        time.sleep(0.2)
        return order + [there for there, _ in arrivals(receiver, 0.0)]


def arrived(net: Wire, count: int, tos: int = 0) -> list[bool]:
    there = set(order_of(net, count, tos))
    return [number in there for number in range(count)]


def tc(namespace: str, interface: str) -> list[str]:
    command = ["tc", "-s", "-n", namespace, "qdisc", "show", "dev", interface]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("text", "outer", "inner"),
    [
        (
            "rate=50mbit,delay=20ms,queue=20p",
            "limit 1000000 delay 20ms",
            "netem 2: .*limit 21 rate 50Mbit packetoverhead -14",
        ),
        ("delay=100ms,loss=25%", "limit 1000000 delay 100ms loss 25%", "netem 2: .*limit 1000000"),
        (
            "rate=40gbit,delay=7ms,queue=100p",
            "delay 7ms",
            "netem 2: .*limit 101 rate 40Gbit packetoverhead -14",
        ),
        ("delay=30s,jitter=10ms", "delay 30s  10ms rate 8Tbit", "netem 2: .*limit 1000000"),
        (
            "delay=20ms,jitter=pareto(2ms,reorder)",
            "limit 1000000 delay 20ms  2ms",
            "netem 2: .*limit 1000000",
        ),
        (
            "delay=1ms,loss=gilbert(p=1%,r=25%,1-h=75%,1-k=0.5%)",
            "loss gemodel p 1% r 25% 1-h 75% 1-k 0.5%",
            "netem 2:",
        ),
        (
            "delay=1ms,loss=states(p13=1%,p31=25%,p32=10%,p23=50%,p14=2%)",
            "loss state p13 1% p31 25% p32 10% p23 50% p14 2%",
            "netem 2:",
        ),
        ("delay=1ms,corrupt=2%,reorder=25%", "delay 1ms reorder 25% corrupt 2% gap 1", "netem 2:"),
        ("delay=1ms,loss=1%,ecn=yes", "loss 1% ecn", "netem 2:"),
        ("rate=1mbit,delay=1ms,overhead=24b", "delay 1ms", "netem 2: .*rate 1Mbit packetoverhead 10"),
        (
            "rate=10mbit,delay=5ms,queue=codel(100ms,target=7ms,interval=90ms),ecn=yes",
            "delay 5ms ecn",
            "tbf 3: .*rate 10Mbit burst 276[34]b; codel 5: .*limit 85p target 7ms interval 90ms ecn",
        ),
        (
            "rate=10mbit,delay=5ms,duplicate=25%,queue=30000b",
            "delay 5ms duplicate 25%",
            "tbf 3:; bfifo 6: parent 3:1 limit 31500b",
        ),
        ("delay=5ms,duplicate=25%", "delay 5ms duplicate 25%", "pfifo 7: parent 1:1"),
        ("delay=5ms,step:10mbit*1h", "delay 5ms", "tbf 3: parent 1:1; plug 4: parent 3:1"),
    ],
)
def test_tc_prints_what_was_asked_and_nothing_of_it_after_a_change(
    net: Wire, text: str, outer: str, inner: str
):
    attachment = emulators.choose("netem").attach(net.wire, "l0", "l0a", "l0b", parse_profile(text))
    lines = "\n".join(tc(net.wire, "l0b"))
    assert re.search(f"qdisc netem 1: root .*{outer}", lines), lines
    for qdisc in inner.split("; "):
        assert re.search(f"qdisc {qdisc}", lines), lines
    attachment.apply(parse_profile("delay=10ms"))
    changed = [line.split(" seed ")[0].rstrip() for line in tc(net.wire, "l0b") if line.startswith("qdisc")]
    assert [line.split("limit 1000000")[1].strip() for line in changed if "netem" in line] == [
        "delay 10ms",
        "",
    ]
    assert not [line for line in changed if re.match("qdisc (tbf|codel|[bp]fifo|plug)", line)]
    attachment.detach()


def test_a_netem_that_says_something_else_is_an_error_that_names_the_field(
    net: Wire, monkeypatch: pytest.MonkeyPatch
):
    def put(netlink: Netlink, ifindex: int, qdisc: Qdisc, flags: int, stab: bytes = b"") -> None:
        qdiscs.put(netlink, ifindex, replace(qdisc, options=Options(delay_ns=1_000_000)), flags, stab)

    monkeypatch.setattr(netem, "put", put)
    with pytest.raises(NetworkError, match="delay: asked 20000000, has 1000000"):
        emulators.choose("netem").attach(net.wire, "l0", "l0a", "l0b", parse_profile("delay=20ms"))
    assert not [line for line in tc(net.wire, "l0b") if "netem" in line]


def test_a_seed_is_refused_where_the_kernel_does_not_say_it_back(net: Wire):
    profile = parse_profile("delay=1ms,loss=1%,seed=7")
    if support.knows_seeds():
        emulators.choose("netem").attach(net.wire, "l0", "l0a", "l0b", profile)
        assert any("seed 7" in line for line in tc(net.wire, "l0b"))
    else:
        with pytest.raises(UsageError, match=r"cannot honour 'seed=7' \(up, seed\)"):
            emulators.choose("netem").attach(net.wire, "l0", "l0a", "l0b", profile)


@pytest.mark.parametrize(
    ("loss", "mean", "burst"),
    [
        ("gilbert(20%,burst=4)", 0.2, 4.0),
        ("correlated(20%,50%)", 0.2, 2.5),  # a loss is followed by another with 0.2 + 0.8 * 0.5
        ("states(p13=5%,p31=25%)", 1 / 6, 4.0),
    ],
)
def test_losses_come_in_the_bursts_asked_for(net: Wire, loss: str, mean: float, burst: float):
    attachment = attach(net, f"up:delay=1ms,loss={loss};down:delay=1ms")
    got = arrived(net, 20_000)
    lost = [number for number, there in enumerate(got) if not there]
    starts = sum(1 for number in lost if number == 0 or got[number - 1])
    assert len(lost) / len(got) == pytest.approx(mean, rel=0.15)
    assert len(lost) / starts == pytest.approx(burst, rel=0.15)
    counted = attachment.counters()["up"]
    assert 0 <= counted.dropped_loss - len(lost) <= 3  # ARP
    attachment.detach()


def test_ecn_marks_what_allows_it_instead_of_losing_it(net: Wire):
    attachment = attach(net, "up:delay=1ms,loss=50%,ecn=yes;down:delay=1ms")
    got = arrived(net, 1000, tos=2)  # ECT(0)
    counted = attachment.counters()["up"]
    assert all(got)
    assert 400 <= counted.marked <= 600
    assert counted.dropped_loss <= 3  # ARP knows no ECN
    attachment.detach()


def test_reordered_packets_arrive_before_those_that_left_earlier_and_are_counted(net: Wire):
    attachment = attach(net, "up:delay=30ms,reorder=20%;down:delay=1ms")
    order = order_of(net, 1000)
    assert sorted(order) == list(range(1000))
    assert order != sorted(order)
    counted = attachment.counters()["up"]
    assert 130 <= counted.reordered <= 270
    assert counted.delivered == counted.packets
    attachment.detach()


@pytest.mark.parametrize(("law", "kept"), [("pareto(5ms)", True), ("pareto(5ms,reorder)", False)])
def test_jitter_keeps_the_order_unless_it_may_reorder(net: Wire, law: str, kept: bool):
    attachment = attach(net, f"up:delay=20ms,jitter={law};down:delay=1ms")
    order = order_of(net, 500)
    assert sorted(order) == list(range(500))
    assert (order == sorted(order)) == kept
    attachment.detach()


def test_corrupted_packets_keep_the_checksums_of_before_and_so_are_thrown_away(net: Wire):
    attachment = attach(net, "up:delay=1ms,corrupt=100%;down:delay=1ms")
    count = sum(arrived(net, 500))
    # 46 bytes of frame, 6 of them the sender's MAC, which nobody looks at: 13%.
    assert 0.05 * 500 < count < 0.25 * 500
    counted = attachment.counters()["up"]
    assert counted.delivered == counted.packets
    attachment.detach()


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
    profile = "up:rate=8mbit,delay=1ms,queue=10p,outage:5s@100ms;down:delay=1ms"
    sender, receiver = sockets(net)
    with sender, receiver:
        origin = time.monotonic() - 0.2
        attachment.apply(parse_profile(profile), origin)
        for number in range(30):
            sender.send(struct.pack("=I", number) + bytes(1468))
        found = arrivals(receiver, 6.0)
    assert [number for number, _ in found] == list(range(11))  # one that is being sent, ten that wait
    assert all(at - origin > 5.1 for _, at in found)
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
    assert any("delay 20ms" in line or "delay 100ms" in line for line in tc(net.wire, "l0b"))
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
