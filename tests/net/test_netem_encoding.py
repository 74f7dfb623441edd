"""What netem is told, byte for byte, against the layouts of linux/pkt_sched.h; and the kernel's and tc's own words for it."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from testbed.errors import NetworkError, UsageError
from testbed.hosts.namespaces import call_inside
from testbed.net.emulators import Attachment
from testbed.net.emulators.netem import netem, support
from testbed.net.emulators.netem import options as netem_options
from testbed.net.emulators.netem.options import Options, distribution
from testbed.net.emulators.netem.qdiscs import TokenBucket, size_offset
from testbed.net.emulators.netem.trace_follower import patched
from testbed.net.netlink import Interface, Netlink, TrafficObject, attribute, attributes
from testbed.net.profile.profile import parse_profile
from tests.net.wire import Wire, wire


def options(text: str) -> tuple[Options, Options]:
    return netem_options.options(parse_profile(text), "up", 1500)


def test_delay_and_jitter_are_sent_in_nanoseconds_and_in_ticks_of_64_ns():
    outer, _ = options("delay=20ms,jitter=2ms")
    encoded = outer.encode()
    latency, _, _, _, _, jitter = struct.unpack_from("=6I", encoded)
    assert (latency, jitter) == (20_000_000 // 64, 2_000_000 // 64)
    found = attributes(encoded[24:])
    assert struct.unpack("=q", found[10]) == (20_000_000,)  # TCA_NETEM_LATENCY64
    assert struct.unpack("=q", found[11]) == (2_000_000,)  # TCA_NETEM_JITTER64


def test_a_rate_beyond_32_bits_goes_into_the_64_bit_field():
    found = attributes(Options(rate_bytes_per_s=10**10).encode()[24:])
    assert struct.unpack_from("=I", found[6]) == (0xFFFFFFFF,)
    assert struct.unpack("=Q", found[8]) == (10**10,)


def test_rates_count_what_is_behind_the_ethernet_header():
    _, inner = options("rate=50mbit,delay=20ms")
    rate, overhead, cell, cell_overhead = struct.unpack("=IiIi", attributes(inner.encode()[24:])[6])
    assert (rate, overhead, cell, cell_overhead) == (50_000_000 // 8, -14, 0, 0)


def test_loss_is_a_fraction_of_the_32_bit_range():
    outer, _ = options("delay=1ms,loss=1%")
    assert struct.unpack_from("=6I", outer.encode())[2] == round(0.01 * (2**32 - 1))
    outer, _ = options("delay=1ms,loss=100%")
    assert struct.unpack_from("=6I", outer.encode())[2] == 2**32 - 1


def test_the_queue_is_counted_in_full_packets_and_one_more_for_the_one_being_sent():
    _, inner = options("rate=10mbit,delay=10ms,queue=20p")
    assert inner.limit_packets == 21
    _, inner = options("rate=10mbit,delay=10ms,queue=100001b")
    assert inner.limit_packets == 67 + 1


def test_everything_is_named_in_every_message_so_that_nothing_survives_a_change():
    assert {1, 3, 4, 6, 8, 10, 11} <= set(attributes(Options().encode()[24:]))


def test_the_distribution_table_is_a_standard_normal_in_units_of_8192():
    values = [v / 8192 for (v,) in struct.iter_unpack("=h", distribution("normal"))]
    mean = sum(values) / len(values)
    assert abs(mean) < 1e-3
    assert sum(v * v for v in values) / len(values) == pytest.approx(1, rel=0.01)
    within = sum(abs(v) < 1 for v in values) / len(values)
    assert within == pytest.approx(0.6827, abs=0.001)


def test_read_back_names_the_field_that_differs():
    asked = Options(delay_ns=20_000_000, rate_bytes_per_s=1000)
    assert asked.differences(asked.encode()) == []
    other = Options(delay_ns=20_000_000, rate_bytes_per_s=999)
    assert asked.differences(other.encode()) == ["rate: asked 1000, has 999"]
    old_kernel = Options(delay_ns=64).encode()[:24] + attribute(6, struct.pack("=IiIi", 0, 0, 0, 0))
    assert Options(delay_ns=128).differences(old_kernel) == ["delay: asked 128, has 64"]


FULL = 2**32 - 1


def test_a_gilbert_elliott_chain_is_laid_out_as_the_kernel_has_it():
    outer, _ = options("delay=1ms,loss=gilbert(p=1%,r=25%,1-h=80%,1-k=0.1%)")
    encoded = outer.encode()
    assert struct.unpack_from("=6I", encoded)[2] == 0
    # Nested TCA_NETEM_LOSS (5): NETEM_LOSS_GE (2) with struct tc_netem_gemodel {p, r, h, k1}, where h is let through.
    values = (round(0.01 * FULL), round(0.25 * FULL), FULL - round(0.8 * FULL), round(0.001 * FULL))
    assert struct.pack("=HHHHIIII", 24, 5, 20, 2, *values) in encoded


def test_four_states_are_laid_out_as_the_kernel_has_them():
    outer, _ = options("delay=1ms,loss=states(p13=1%,p31=20%,p32=10%,p23=30%,p14=0.1%)")
    # NETEM_LOSS_GI (1) with struct tc_netem_gimodel {p13, p31, p32, p14, p23}.
    values = (round(fraction * FULL) for fraction in (0.01, 0.2, 0.1, 0.001, 0.3))
    assert struct.pack("=HHHHIIIII", 28, 5, 24, 1, *values) in outer.encode()


def test_two_ways_out_of_a_state_never_exceed_32_bits_together():
    outer, _ = options("delay=1ms,loss=states(p13=50%,p31=50%,p32=50%,p14=50%)")
    p13, p31, p32, p14, _ = struct.unpack_from("=5I", outer.loss_model, 4)
    assert p13 + p14 == p31 + p32 == FULL


def test_correlated_loss_is_the_chain_and_not_tcs_own_law():
    outer, _ = options("delay=1ms,loss=correlated(10%,25%)")
    found = attributes(outer.encode()[24:])
    assert found[1] == bytes(12)  # TCA_NETEM_CORR: no correlation of tc's kind
    p, r, let_through, good_loss = struct.unpack("=4I", attributes(found[5])[2])
    assert (p / FULL, r / FULL) == (pytest.approx(0.1 * 0.75), pytest.approx(0.9 * 0.75))
    assert (let_through, good_loss) == (0, 0)


def test_corruption_reordering_ecn_and_overhead_have_their_fields():
    outer, _ = options("delay=1ms,loss=1%,corrupt=2%,reorder=3%,ecn=yes")
    encoded = outer.encode()
    found = attributes(encoded[24:])
    assert struct.unpack_from("=6I", encoded)[3] == 1  # gap: the dice are thrown for every packet
    assert struct.unpack("=II", found[3]) == (round(0.03 * FULL), 0)  # TCA_NETEM_REORDER
    assert struct.unpack("=II", found[4]) == (round(0.02 * FULL), 0)  # TCA_NETEM_CORRUPT
    assert struct.unpack("=I", found[7]) == (1,)  # TCA_NETEM_ECN
    _, inner = options("rate=1mbit,delay=1ms,overhead=24b")
    assert struct.unpack("=IiIi", attributes(inner.encode()[24:])[6])[1] == 24 - 14


def test_jitter_laws_are_sent_as_tables_and_order_is_kept_unless_asked(tmp_path: Path):
    (tmp_path / "two.dist").write_text("-8192 8192")
    for law in (f"table(1ms,file={tmp_path}/two.dist)", "uniform(1ms)", "pareto(1ms)", "paretonormal(1ms)"):
        outer, _ = options(f"delay=20ms,jitter={law}")
        sent = [value for (value,) in struct.iter_unpack("=h", attributes(outer.encode()[24:])[2])]
        assert len(sent) == (2 if "table" in law else 4096)
        assert abs(sum(sent) / len(sent)) < 0.01 * 8192
        assert outer.rate_bytes_per_s > 0
    assert (
        struct.pack("=HHhh", 8, 2, -8192, 8192)
        in options(f"delay=20ms,jitter=table(1ms,file={tmp_path}/two.dist)")[0].encode()
    )
    assert options("delay=20ms,jitter=normal(1ms,reorder)")[0].rate_bytes_per_s == 0


@pytest.mark.parametrize("other", ["loss=gilbert(1%,burst=4)", "corrupt=1%", "reorder=1%", "ecn=yes"])
def test_read_back_names_what_an_earlier_setting_left(other: str):
    asked, left = options("delay=1ms")[0], options(f"delay=1ms,{other}")[0]
    assert left.differences(left.encode()) == []
    names = {"loss": "loss model", "corrupt": "corruption", "reorder": "reordering", "ecn": "ecn"}
    different = " ".join(asked.differences(left.encode()))
    assert names[other.partition("=")[0]] in different


@pytest.mark.parametrize(
    "text",
    [
        "rate=1mbit,delay=1ms,reorder=1%",
        "delay=1ms,reorder=1%,sine:1mbit..2mbit*1s",
        "delay=1ms,queue=codel(1bdp),sine:1mbit..2mbit*1s",
        "rate=1mbit,loss=gilbert(1%,burst=4),trace:FILE",
    ],
)
def test_what_netem_cannot_honour_together_is_refused_by_name(text: str, tmp_path: Path):
    (tmp_path / "delays.csv").write_text("time_s,delay_ms\n0,10\n1,20\n2,10\n")
    text = text.replace("FILE", f"{tmp_path}/delays.csv")
    with pytest.raises(
        UsageError, match=r"emulator netem cannot honour '.*' beside .*use --emulator userspace"
    ):
        support.refuse(parse_profile(text))


def test_a_token_bucket_is_laid_out_as_the_kernel_has_it():
    encoded = TokenBucket(rate_bytes_per_s=10**10, burst_bytes=3000).encode()
    found = attributes(encoded)
    # struct tc_tbf_qopt: two struct tc_ratespec (cell_log, linklayer, overhead, cell_align, mpu, rate), limit, buffer, mtu
    rate = struct.pack("=BBHhHI", 0, 1, 0, 0, 0, FULL)
    assert found[1] == rate + bytes(12) + bytes(12)
    assert struct.unpack("=Q", found[4]) == (10**10,)  # TCA_TBF_RATE64
    assert struct.unpack("=I", found[6]) == (3000,)  # TCA_TBF_BURST


def test_sizes_below_the_frames_are_a_table_without_entries():
    # Nested TCA_STAB (8): TCA_STAB_BASE (1) with struct tc_sizespec, whose overhead has a sign.
    spec = struct.pack("=BBhiIIII", 0, 0, 0, -14, 1, 0, 0, 0)
    assert size_offset(-14) == struct.pack("=HHHH", 32, 8, 28, 1) + spec


def test_a_traces_values_are_written_over_those_that_netem_was_told_first():
    told, other = (options(text)[0] for text in ("delay=20ms,loss=1%,ecn=yes", "delay=70ms,loss=2%,ecn=yes"))
    assert patched(bytearray(told.encode()), 0.07, 0.02) == other.encode()
    assert patched(bytearray(told.encode()), None, None) == told.encode()


def test_a_seed_that_a_newer_kernel_says_back_is_compared_and_honoured(monkeypatch: pytest.MonkeyPatch):
    # TCA_OPTIONS of `tc qdisc add … netem delay 1ms seed 7` as Linux 6.6 dumps them: behind struct tc_netem_qopt,
    # TCA_NETEM_LATENCY64 (10), JITTER64 (11), CORR (1), REORDER (3), CORRUPT (4), PRNG_SEED (14).
    dump = bytes.fromhex(
        "093d0000e8030000"
        + "00" * 16  # latency in ticks, limit; loss, gap, duplicate, jitter
        + "0c000a0040420f0000000000"
        + "0c000b000000000000000000"
        + "10000100"
        + "00" * 12
        + "0c000300"
        + "00" * 8
        + "0c000400"
        + "00" * 8
        + "0c000e000700000000000000"
    )
    asked = Options(delay_ns=1_000_000, limit_packets=1000, seed=7)
    assert asked.differences(dump) == []
    assert Options(delay_ns=1_000_000, limit_packets=1000, seed=8).differences(dump) == [
        "seed: asked 8, has 7"
    ]
    monkeypatch.setattr(support, "Netlink", lambda _: contextlib.nullcontext(_Kernel(dump)))
    support.refuse(parse_profile("delay=1ms,loss=1%,seed=7"))
    before_6_6 = dump[: -len(bytes.fromhex("0c000e000700000000000000"))]
    monkeypatch.setattr(support, "Netlink", lambda _: contextlib.nullcontext(_Kernel(before_6_6)))
    with pytest.raises(UsageError, match=r"cannot honour 'seed=7' \(up, seed\)"):
        support.refuse(parse_profile("delay=1ms,loss=1%,seed=7"))


class _Kernel:
    """A netlink connection to a kernel whose netem says this of itself."""

    def __init__(self, dump: bytes) -> None:
        self._dump = dump

    def interface(self, name: str) -> Interface:
        return Interface(1, 65536, 0)

    def traffic(self, *_: object, what: str) -> None:
        pass

    def qdisc(self, ifindex: int, handle: int) -> TrafficObject:
        return TrafficObject(ifindex, handle, 0xFFFFFFFF, "netem", self._dump, {})


@pytest.mark.netem
@pytest.mark.parametrize(
    ("text", "outer", "inner"),
    [
        (
            "rate=50mbit,delay=20ms,queue=20p",
            "limit 1000000 delay 20ms",
            "limit 21 rate 50Mbit packetoverhead -14",
        ),
        ("delay=100ms,loss=25%", "limit 1000000 delay 100ms loss 25%", "limit 1000000"),
        ("rate=40gbit,delay=7ms,queue=100p", "delay 7ms", "limit 101 rate 40Gbit packetoverhead -14"),
        ("delay=30s,jitter=10ms", "delay 30s  10ms rate 8Tbit", "limit 1000000"),
        ("delay=20ms,jitter=pareto(2ms,reorder)", "limit 1000000 delay 20ms  2ms", "limit 1000000"),
        (
            "delay=1ms,loss=gilbert(p=1%,r=25%,1-h=75%,1-k=0.5%)",
            "loss gemodel p 1% r 25% 1-h 75% 1-k 0.5%",
            "limit 1000000",
        ),
        (
            "delay=1ms,loss=states(p13=1%,p31=25%,p32=10%,p23=50%,p14=2%)",
            "loss state p13 1% p31 25% p32 10% p23 50% p14 2%",
            "limit 1000000",
        ),
        ("delay=1ms,corrupt=2%,reorder=25%", "delay 1ms reorder 25% corrupt 2% gap 1", "limit 1000000"),
        ("delay=1ms,loss=1%,ecn=yes", "loss 1% ecn", "limit 1000000"),
        ("rate=1mbit,delay=1ms,overhead=24b", "delay 1ms", "rate 1Mbit packetoverhead 10"),
    ],
)
def test_tc_prints_what_was_asked(text: str, outer: str, inner: str):
    with wire() as net:
        attachment = netem.Netem().attach(net.wire, "l0", "l0a", "l0b", parse_profile(text))
        lines = _tc(net.wire, "l0b")
        assert [line for line in lines if line.startswith("qdisc netem 1: root") and outer in line], lines
        assert [line for line in lines if line.startswith("qdisc netem 2: parent 1:1") and inner in line], (
            lines
        )
        attachment.detach()


@pytest.mark.netem
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "rate=10mbit,delay=5ms,queue=codel(100ms,target=7ms,interval=90ms),ecn=yes",
            [
                "qdisc netem 1: root .* delay 5ms ecn",
                "qdisc tbf 3: parent 1:1 rate 10Mbit burst 276[34]b",
                "qdisc codel 5: parent 3:1 limit 85p target 7ms interval 90ms ecn",
            ],
        ),
        (
            "rate=10mbit,delay=5ms,duplicate=25%,queue=30000b",
            ["qdisc netem 1: root .* delay 5ms duplicate 25%", "qdisc tbf 3:", "qdisc bfifo 6: parent 3:1 limit 31500b"],
        ),
        ("delay=5ms,duplicate=25%", ["qdisc netem 1: root .* delay 5ms duplicate 25%", "qdisc pfifo 7: parent 1:1"]),
        ("delay=5ms,step:10mbit*1h", ["qdisc netem 1: root .* delay 5ms", "qdisc tbf 3: parent 1:1", "qdisc plug 4: parent 3:1"]),
    ],
)  # fmt: skip
def test_tc_prints_what_is_inside_where_it_is_no_netem(text: str, expected: list[str]):
    with wire() as net:
        attachment = netem.Netem().attach(net.wire, "l0", "l0a", "l0b", parse_profile(text))
        lines = "\n".join(_tc(net.wire, "l0b"))
        for line in expected:
            assert re.search(line, lines), lines
        attachment.apply(parse_profile("rate=1mbit,delay=1ms"))
        assert re.search("qdisc netem 2: parent 1:1 limit 44 rate 1Mbit", "\n".join(_tc(net.wire, "l0b")))
        attachment.detach()


@pytest.mark.netem
def test_a_change_leaves_nothing_of_the_earlier_conditions():
    with wire() as net:
        attachment = netem.Netem().attach(
            net.wire,
            "l0",
            "l0a",
            "l0b",
            parse_profile(
                "delay=50ms,jitter=uniform(5ms),loss=gilbert(10%,burst=3),corrupt=5%,reorder=5%,ecn=yes"
            ),
        )
        attachment.apply(parse_profile("delay=10ms"))
        lines = [line.split(" seed ")[0].rstrip() for line in _tc(net.wire, "l0a") if "netem" in line]
        assert [line.split("limit 1000000")[1].strip() for line in lines] == ["delay 10ms", ""], lines


@pytest.mark.netem
def test_a_netem_that_says_something_else_is_an_error_that_names_the_field(monkeypatch):
    with wire() as net:
        encode = Options.encode
        lying = Options(delay_ns=1_000_000)
        monkeypatch.setattr(Options, "encode", lambda self: encode(lying))
        with pytest.raises(NetworkError, match="delay: asked 20000000, has 1000000"):
            netem.Netem().attach(net.wire, "l0", "l0a", "l0b", parse_profile("delay=20ms"))
        with Netlink(net.wire) as netlink:
            assert not [q for q in netlink.qdiscs(netlink.interface("l0b").index) if q.kind == "netem"]


@pytest.mark.netem
def test_a_seed_is_refused_where_the_kernel_does_not_say_it_back():
    with wire() as net:
        profile = parse_profile("delay=1ms,loss=1%,seed=7")
        if support.knows_seeds():
            netem.Netem().attach(net.wire, "l0", "l0a", "l0b", profile)
            assert any("seed 7" in line for line in _tc(net.wire, "l0b"))
        else:
            with pytest.raises(UsageError, match=r"cannot honour 'seed=7' \(up, seed\)"):
                netem.Netem().attach(net.wire, "l0", "l0a", "l0b", profile)


@pytest.mark.netem
@pytest.mark.parametrize(
    ("loss", "mean", "burst"),
    [
        ("gilbert(20%,burst=4)", 0.2, 4.0),
        ("correlated(20%,50%)", 0.2, 2.5),  # a loss is followed by another with 0.2 + 0.8 * 0.5
        ("states(p13=5%,p31=25%)", 1 / 6, 4.0),
    ],
)
def test_losses_come_in_the_bursts_asked_for(loss: str, mean: float, burst: float):
    with wire() as net:
        attachment = _attached(net, f"up:delay=1ms,loss={loss};down:delay=1ms")
        got = _arrived(net, 20_000)
        lost = [number for number, there in enumerate(got) if not there]
        starts = sum(1 for number in lost if number == 0 or got[number - 1])
        assert len(lost) / len(got) == pytest.approx(mean, rel=0.15)
        assert len(lost) / starts == pytest.approx(burst, rel=0.15)
        counted = attachment.counters()["up"]
        assert 0 <= counted.dropped_loss - len(lost) <= 3  # ARP
        attachment.detach()


@pytest.mark.netem
def test_ecn_marks_what_allows_it_instead_of_losing_it():
    with wire() as net:
        attachment = _attached(net, "up:delay=1ms,loss=50%,ecn=yes;down:delay=1ms")
        got = _arrived(net, 1000, tos=2)  # ECT(0)
        counted = attachment.counters()["up"]
        assert all(got)
        assert 400 <= counted.marked <= 600
        assert counted.dropped_loss <= 3  # ARP knows no ECN
        attachment.detach()


@pytest.mark.netem
def test_reordered_packets_arrive_before_those_that_left_earlier_and_are_counted():
    with wire() as net:
        attachment = _attached(net, "up:delay=30ms,reorder=20%;down:delay=1ms")
        order = _order(net, 1000)
        assert sorted(order) == list(range(1000))
        assert order != sorted(order)
        counted = attachment.counters()["up"]
        assert 130 <= counted.reordered <= 270
        assert counted.delivered == counted.packets
        attachment.detach()


@pytest.mark.netem
@pytest.mark.parametrize(("law", "kept"), [("pareto(5ms)", True), ("pareto(5ms,reorder)", False)])
def test_jitter_keeps_the_order_unless_it_may_reorder(law: str, kept: bool):
    with wire() as net:
        attachment = _attached(net, f"up:delay=20ms,jitter={law};down:delay=1ms")
        order = _order(net, 500)
        assert sorted(order) == list(range(500))
        assert (order == sorted(order)) == kept
        attachment.detach()


@pytest.mark.netem
def test_corrupted_packets_keep_the_checksums_of_before_and_so_are_thrown_away():
    with wire() as net:
        attachment = _attached(net, "up:delay=1ms,corrupt=100%;down:delay=1ms")
        arrived = sum(_arrived(net, 500))
        # 46 bytes of frame, 6 of them the sender's MAC, which nobody looks at: 13%.
        assert 0.05 * 500 < arrived < 0.25 * 500
        counted = attachment.counters()["up"]
        assert counted.delivered == counted.packets
        attachment.detach()


def _attached(net: Wire, text: str) -> Attachment:
    """A link whose ends know each other's addresses already: what is counted from here on are our own packets."""
    attachment = netem.Netem().attach(net.wire, "l0", "l0a", "l0b", parse_profile("delay=1ms"))
    net.exec("a", "ping", "-c", "1", net.address("b"))
    attachment.apply(parse_profile(text))
    return attachment


def _arrived(net: Wire, count: int, tos: int = 0) -> list[bool]:
    there = set(_order(net, count, tos))
    return [number in there for number in range(count)]


def _order(net: Wire, count: int, tos: int = 0) -> list[int]:
    """The numbers of *count* datagrams from a to b, in the order of their arrival."""
    receiver = call_inside(net.namespace("b"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender = call_inside(net.namespace("a"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    order: list[int] = []
    with receiver, sender:
        receiver.bind((net.address("b"), 7000))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        sender.connect((net.address("b"), 7000))
        for number in range(count):
            sender.send(struct.pack("=I", number))
            if number % 50 == 49:
                time.sleep(0.005)
                order += _received(receiver)
        time.sleep(0.2)
        order += _received(receiver)
    return order


def _received(receiver: socket.socket) -> list[int]:
    numbers = []
    while True:
        try:
            data = receiver.recv(16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return numbers
        numbers.append(struct.unpack("=I", data)[0])


def _tc(namespace: str, interface: str) -> list[str]:
    command = ["tc", "-s", "-n", namespace, "qdisc", "show", "dev", interface]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
