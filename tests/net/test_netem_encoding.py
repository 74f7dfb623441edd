"""What netem is told, byte for byte, against the layouts of linux/pkt_sched.h; and the kernel's and tc's own words for it."""

from __future__ import annotations

import struct
import subprocess

import pytest

from testbed.errors import NetworkError
from testbed.net.emulators import netem
from testbed.net.emulators.rtnetlink import Netlink, attribute, attributes
from testbed.net.profile import parse_profile
from tests.net.wire import wire


def options(text: str) -> tuple[netem.Options, netem.Options]:
    return netem.options(parse_profile(text), "up", 1500)


def test_delay_and_jitter_are_sent_in_nanoseconds_and_in_ticks_of_64_ns():
    outer, _ = options("delay=20ms,jitter=2ms")
    encoded = outer.encode()
    latency, _, _, _, _, jitter = struct.unpack_from("=6I", encoded)
    assert (latency, jitter) == (20_000_000 // 64, 2_000_000 // 64)
    found = attributes(encoded[24:])
    assert struct.unpack("=q", found[10]) == (20_000_000,)  # TCA_NETEM_LATENCY64
    assert struct.unpack("=q", found[11]) == (2_000_000,)  # TCA_NETEM_JITTER64


def test_a_rate_beyond_32_bits_goes_into_the_64_bit_field():
    found = attributes(netem.Options(rate_bytes_per_s=10**10).encode()[24:])
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
    assert {1, 3, 4, 6, 8, 10, 11} <= set(attributes(netem.Options().encode()[24:]))


def test_the_distribution_table_is_a_standard_normal_in_units_of_8192():
    values = [v / 8192 for (v,) in struct.iter_unpack("=h", netem.normal_distribution())]
    mean = sum(values) / len(values)
    assert abs(mean) < 1e-3
    assert sum(v * v for v in values) / len(values) == pytest.approx(1, rel=0.01)
    within = sum(abs(v) < 1 for v in values) / len(values)
    assert within == pytest.approx(0.6827, abs=0.001)


def test_read_back_names_the_field_that_differs():
    asked = netem.Options(delay_ns=20_000_000, rate_bytes_per_s=1000)
    assert asked.differences(asked.encode()) == []
    other = netem.Options(delay_ns=20_000_000, rate_bytes_per_s=999)
    assert asked.differences(other.encode()) == ["rate: asked 1000, has 999"]
    old_kernel = netem.Options(delay_ns=64).encode()[:24] + attribute(6, struct.pack("=IiIi", 0, 0, 0, 0))
    assert netem.Options(delay_ns=128).differences(old_kernel) == ["delay: asked 128, has 64"]


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
def test_a_change_leaves_nothing_of_the_earlier_conditions():
    with wire() as net:
        attachment = netem.Netem().attach(
            net.wire, "l0", "l0a", "l0b", parse_profile("rate=9gbit,delay=50ms,jitter=5ms,loss=10%")
        )
        attachment.apply(parse_profile("delay=10ms"))
        lines = [line.split(" seed ")[0].rstrip() for line in _tc(net.wire, "l0a") if "netem" in line]
        assert [line.split("limit 1000000")[1].strip() for line in lines] == ["delay 10ms", ""], lines


@pytest.mark.netem
def test_a_netem_that_says_something_else_is_an_error_that_names_the_field(monkeypatch):
    with wire() as net:
        encode = netem.Options.encode
        lying = netem.Options(delay_ns=1_000_000)
        monkeypatch.setattr(netem.Options, "encode", lambda self: encode(lying))
        with pytest.raises(NetworkError, match="delay: asked 20000000, has 1000000"):
            netem.Netem().attach(net.wire, "l0", "l0a", "l0b", parse_profile("delay=20ms"))
        with Netlink(net.wire) as netlink:
            assert not [q for q in netlink.qdiscs(netlink.interface("l0b").index) if q.kind == "netem"]


def _tc(namespace: str, interface: str) -> list[str]:
    command = ["tc", "-n", namespace, "qdisc", "show", "dev", interface]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
