"""The relay's impairments, each against its definition: a straight walk, a formula, or the standard's own words."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.net.emulators.relay import impairments, packet
from testbed.net.emulators.relay.codel import CoDel
from testbed.net.emulators.relay.impairments.contract import Context, Onward
from testbed.net.emulators.relay.impairments.delay import Jitter, pack, unpack
from testbed.net.emulators.relay.line import Line
from testbed.net.emulators.relay.orders import direction_conditions
from testbed.net.emulators.relay.userspace import super_packet_segments
from testbed.net.profile.jitter import table
from testbed.net.profile.profile import Profile, parse_profile


def internet_sum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = 0
    for high, low in zip(data[::2], data[1::2] + b"\0" * (len(data) % 2), strict=True):
        total += high << 8 | low
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_super_packet(payload: bytes, size: int, version: int = 4, flags: int = 0x18) -> bytes:
    """What a packet socket gives for TCP payload with segmentation and checksum left to the card."""
    tcp = bytearray(struct.pack("!HHIIBBHHH", 5, 6, 0xFFFFFF00, 7, 5 << 4, flags, 100, 0, 0))
    length = len(tcp) + len(payload)
    if version == 4:
        ip = bytearray(
            struct.pack(
                "!BBHHHBBH4s4s", 0x45, 2, 20 + length, 65535, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
            )
        )
        struct.pack_into("!H", ip, 10, 0xFFFF & ~internet_sum(bytes(ip)))
        pseudo = bytes(ip[12:20]) + struct.pack("!BBH", 0, 6, length)
    else:
        ip = bytearray(struct.pack("!IHBB16s16s", 6 << 28 | 2 << 20, length, 6, 64, b"\1" * 16, b"\2" * 16))
        pseudo = bytes(ip[8:40]) + struct.pack("!II", length, 6)
    struct.pack_into("!H", tcp, 16, internet_sum(pseudo))
    start = 14 + len(ip)
    vnet = struct.pack("=BBHHHH", 1, 1 if version == 4 else 4, start + 20, size, start, 16)
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    return vnet + bytes(12) + kind + bytes(ip) + bytes(tcp) + payload


def udp_super_packet(payload: bytes, size: int, version: int = 4) -> bytes:
    """The same for datagrams that were sent with UDP_SEGMENT."""
    length = 8 + len(payload)
    udp = bytearray(struct.pack("!HHHH", 5, 6, length, 0))
    if version == 4:
        ip = bytearray(
            struct.pack(
                "!BBHHHBBH4s4s", 0x45, 2, 20 + length, 65535, 0, 64, 17, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
            )
        )
        struct.pack_into("!H", ip, 10, 0xFFFF & ~internet_sum(bytes(ip)))
        pseudo = bytes(ip[12:20]) + struct.pack("!BBH", 0, 17, length)
    else:
        ip = bytearray(struct.pack("!IHBB16s16s", 6 << 28 | 2 << 20, length, 17, 64, b"\1" * 16, b"\2" * 16))
        pseudo = bytes(ip[8:40]) + struct.pack("!II", length, 17)
    struct.pack_into("!H", udp, 6, internet_sum(pseudo))
    start = 14 + len(ip)
    vnet = struct.pack("=BBHHHH", 1, 5, start + 8, size, start, 6)
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    return vnet + bytes(12) + kind + bytes(ip) + bytes(udp) + payload


def singles(frame: bytes) -> list[bytes]:
    """The packets that a frame, super-packet or not, stands for."""
    return packet.split(frame) if frame[1] else [frame]


def check_datagram(frame: bytes, version: int) -> bytes:
    """Verifies lengths and checksums of a single datagram, and returns its payload."""
    done = packet.finish_checksum(frame)[24:]
    header = 20 if version == 4 else 40
    udp = done[header:]
    if version == 4:
        assert internet_sum(done[:20]) == 0xFFFF
        assert struct.unpack_from("!H", done, 2)[0] == len(done)
        pseudo = done[12:20] + struct.pack("!BBH", 0, 17, len(udp))
    else:
        assert struct.unpack_from("!H", done, 4)[0] == len(done) - 40
        pseudo = done[8:40] + struct.pack("!II", len(udp), 17)
    assert struct.unpack_from("!H", udp, 4)[0] == len(udp)
    assert internet_sum(pseudo + udp) == 0xFFFF
    return udp[8:]


def check_segment(frame: bytes, version: int) -> tuple[int, int, bytes]:
    """Verifies lengths and checksums of a single segment, and returns its sequence number, flags and payload."""
    done = packet.finish_checksum(frame)[24:]
    header = 20 if version == 4 else 40
    if version == 4:
        assert internet_sum(done[:20]) == 0xFFFF
        assert struct.unpack_from("!H", done, 2)[0] == len(done)
        pseudo = done[12:20] + struct.pack("!BBH", 0, 6, len(done) - 20)
    else:
        assert struct.unpack_from("!H", done, 4)[0] == len(done) - 40
        pseudo = done[8:40] + struct.pack("!II", len(done) - 40, 6)
    assert internet_sum(pseudo + done[header:]) == 0xFFFF
    return struct.unpack_from("!I", done, header + 4)[0], done[header + 13], done[header + 20 :]


@given(
    payload=st.integers(1, 9000).map(lambda n: random.Random(n).randbytes(n)),
    size=st.integers(100, 1460),
    version=st.sampled_from([4, 6]),
)
def test_a_super_packets_segments_are_valid_packets_that_carry_the_same_bytes(
    payload: bytes, size: int, version: int
) -> None:
    frame = tcp_super_packet(payload, size, version, flags=0x99)  # CWR, ACK, PSH, FIN
    length, count = packet.measure(frame)
    pieces = packet.split(frame)
    assert count == len(pieces) == math.ceil(len(payload) / size)
    assert length == sum(len(piece) - 24 for piece in pieces)
    checked = [check_segment(piece, version) for piece in pieces]
    assert b"".join(data for *_, data in checked) == payload
    sequences = [(0xFFFFFF00 + number * size) % 2**32 for number in range(count)]
    assert [sequence for sequence, *_ in checked] == sequences
    assert [bool(flags & 0x09) for _, flags, _ in checked] == [False] * (count - 1) + [True]
    assert [bool(flags & 0x80) for _, flags, _ in checked] == [True] + [False] * (count - 1)


@given(
    payload=st.integers(1, 9000).map(lambda n: random.Random(n).randbytes(n)),
    size=st.integers(100, 1472),
    version=st.sampled_from([4, 6]),
    data=st.data(),
)
def test_a_super_packets_datagrams_are_valid_packets_alone_and_in_rows(
    payload: bytes, size: int, version: int, data: st.DataObject
) -> None:
    frame = udp_super_packet(payload, size, version)
    length, count = packet.measure(frame)
    pieces = packet.split(frame)
    assert count == len(pieces) == math.ceil(len(payload) / size)
    assert length == sum(len(piece) - 24 for piece in pieces)
    datagrams = [check_datagram(piece, version) for piece in pieces]
    assert datagrams == [payload[at : at + size] for at in range(0, len(payload), size)]
    first = data.draw(st.integers(0, count - 1))
    kept = data.draw(st.integers(1, count - first))
    row = singles(packet.cut(frame, first, kept))
    assert [check_datagram(piece, version) for piece in row] == datagrams[first : first + kept]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    loss=st.sampled_from(
        ["loss=10%", "loss=gilbert(20%,burst=3)", "loss=states(p13=5%,p31=20%,p32=10%,p23=30%)"]
    ),
    udp=st.booleans(),
)
def test_loss_takes_of_super_packets_the_packets_that_it_takes_of_single_ones(
    sizes: list[int], loss: str, udp: bool
) -> None:
    make, payload = (udp_super_packet, 1472) if udp else (tcp_super_packet, 1460)
    frames = [make(random.Random(n).randbytes(count * payload - 7), payload) for n, count in enumerate(sizes)]
    conditions = direction_conditions(parse_profile(f"rate=1gbit,delay=2ms,{loss},seed=5"), "up")

    def through(frames: list[bytes]) -> tuple[list[bytes], dict[str, float]]:
        left: list[bytes] = []
        line = Line(left.append, 1)
        line.apply(conditions, 0.0)
        for frame in frames:
            line.enter(frame, 0.0)
        line.advance(10.0)
        counted = {name: count for name, count in line.counters().items() if not name.endswith("_s")}
        return [piece for frame in left for piece in singles(frame)], counted

    assert through(frames) == through([piece for frame in frames for piece in singles(frame)])


@given(st.binary(min_size=24, max_size=200))
def test_no_frame_however_broken_upsets_the_relay(frame: bytes) -> None:
    line = Line(lambda _: None, 1)
    line.apply(
        direction_conditions(
            parse_profile("rate=1mbit,delay=1ms,ecn=yes,loss=50%,corrupt=50%,duplicate=50%"), "up"
        ),
        0.0,
    )
    line.enter(frame, 0.0)
    line.advance(1e9)


@pytest.mark.parametrize("version", [4, 6])
def test_a_mark_sets_congestion_experienced_and_keeps_the_checksum(version: int) -> None:
    frame = tcp_super_packet(b"x" * 50, 100, version)  # its sender understands ECN: ECT(0)
    marked = packet.mark_congestion(frame)
    assert marked is not None
    check_segment(packet.cut(marked, 0, 1), version)
    field = marked[25] & 3 if version == 4 else marked[25] >> 4 & 3
    assert field == 3
    without = bytearray(frame)
    without[25] &= 0xFC if version == 4 else 0xCF
    assert packet.mark_congestion(bytes(without)) is None


def test_corruption_flips_one_bit_and_leaves_a_checksum_that_tells() -> None:
    frame = packet.cut(tcp_super_packet(b"y" * 100, 200), 0, 1)
    sound = packet.finish_checksum(frame)
    for bit in (0, 160, 500, 999):
        damaged = packet.corrupt(frame, bit)
        different = [a ^ b for a, b in zip(sound, damaged, strict=True) if a != b]
        assert len(different) == 1 and different[0].bit_count() == 1
    with pytest.raises(AssertionError):
        check_segment(packet.corrupt(frame, 999), 4)


@pytest.mark.parametrize("law", ["normal", "pareto", "paretonormal", "uniform"])
def test_jitter_has_its_laws_quantiles(law: str) -> None:
    entries = table(law)
    jitter = Jitter(0.002, unpack(pack(entries)), random.Random(1))
    drawn = sorted(jitter.deviation() for _ in range(20_000))
    for rank in (0.1, 0.5, 0.9):
        expected = 0.002 * entries[int(rank * len(entries))] / 8192
        assert drawn[int(rank * len(drawn))] == pytest.approx(expected, abs=1.2e-4)


def test_codel_drops_after_an_interval_of_standing_delay_and_then_ever_more_often() -> None:
    codel = CoDel(0.005, 0.1, 1500)
    drops = [n for n in range(1, 600) if codel.condemns(0.020, n * 0.001, 30_000)]
    # RFC 8289: first when the delay has stood for an interval, then an interval / sqrt(count) apart.
    expected, at = [], 0.101
    for count in range(1, 20):
        expected.append(at)
        at += 0.1 / math.sqrt(count)
    assert [n * 0.001 for n in drops] == pytest.approx([t for t in expected if t < 0.6], abs=0.0011)
    assert not codel.condemns(0.001, 0.7, 30_000)
    assert not codel.condemns(0.020, 0.701, 30_000)


def test_codel_leaves_a_queue_of_one_packet_alone() -> None:
    codel = CoDel(0.005, 0.1, 1500)
    assert not any(codel.condemns(0.5, n * 0.01, 1500) for n in range(100))


def run_line(text: str, arrivals: list[float], size: int = 1000) -> tuple[Line, list[int]]:
    """A line through which numbered packets went; the numbers that came out, in order."""
    left: list[int] = []
    line = Line(lambda frame: left.append(int.from_bytes(frame[-4:], "big")), 11)
    line.apply(direction_conditions(parse_profile(text), "up"), 0.0)
    for number, arrival in enumerate(arrivals):
        line.advance(arrival)
        line.enter(bytes(24 + size - 4) + number.to_bytes(4, "big"), arrival)
    line.advance(1e6)
    return line, left


def fates(first: Profile, then: Profile) -> str:
    """A digest of all that leaves a line, when, and of its counters: packets of many sizes, some of several segments, come at
    random, and the conditions change on the way."""
    draw, digest, now = random.Random(5), hashlib.sha256(), 0.0
    line = Line(lambda frame: digest.update(b"%.9f" % line.free + frame), 3)
    for number in range(2000):
        if number % 1000 == 0:
            profile = then if number else first
            line.advance(now)
            schedule = profile.up.schedule("up", 0.0)
            line.apply(direction_conditions(profile, "up")._replace(schedule=schedule), now)
        now += draw.expovariate(2000)
        if draw.random() < 0.5:
            line.advance(now)
        payload = draw.choice((10, 500, 1460, 1460, 7000))
        line.enter(
            bytes(24 + payload) if draw.random() < 0.2 else tcp_super_packet(bytes(payload), 1460), now
        )
    line.advance(1e6)
    counted = {name: count for name, count in line.counters().items() if not name.endswith("_s")}
    digest.update(json.dumps(counted, sort_keys=True).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("first", "then", "digest"),
    [
        (
            "rate=20mbit,delay=5ms,queue=30p",
            "rate=3mbit,delay=40ms,queue=10p,overhead=24b",
            "b2f99e3ad1f6beb7",
        ),
        (
            "rate=30mbit,delay=9ms,jitter=2ms,loss=2%",
            "delay=9ms,jitter=pareto(2ms,reorder),loss=gilbert(5%,burst=3)",
            "465abb49d0e68db7",
        ),
        (
            "delay=5ms,duplicate=10%,loss=20%,ecn=yes,corrupt=5%,reorder=5%,seed=7",
            "rate=40mbit,delay=5ms,duplicate=30%,corrupt=9%,loss=states(p13=1%,p31=20%,p32=10%,p23=30%)",
            "21b15057ed17c4ae",
        ),
        (
            "rate=9mbit,delay=1ms,queue=codel(99p,target=5ms,interval=20ms)",
            "rate=6mbit,queue=codel(99p,target=5ms,interval=20ms),ecn=yes,loss=1%",
            "03751bb71a17b494",
        ),
        (
            "queue=20p,trace:{here}/all.csv",
            "delay=2ms,queue=20p,duplicate=5%,jitter=1ms,trace:{here}/losses.csv",
            "4e16015a153b6931",
        ),
        (
            "delay=3ms,queue=40p,trace:{here}/deliveries",
            "rate=20mbit,delay=3ms,reorder=10%,outage:200ms@100ms/1s",
            "e4f20bdf0c92e4e5",
        ),
    ],
)
def test_a_seed_gives_every_packet_the_fate_that_it_has_always_had(
    first: str, then: str, digest: str, tmp_path: Path
) -> None:
    # The digests are those of the relay as it was when all its impairments were in one file (November 2026).
    rows = ("time_s,rate_mbps,delay_ms,loss_percent", "0,30,5,0", "0.2,2,9,10", "0.4,0,9,0", "0.5,40,2,3", "")
    (tmp_path / "all.csv").write_text("\n".join(rows))
    (tmp_path / "losses.csv").write_text("time_s,loss_percent\n0,1\n0.3,40\n0.6,0\n")
    (tmp_path / "deliveries").write_text("".join(f"{ms}\n" for ms in (1, 2, 2, 2, 5, 6, 9, 9, 12, 13, 40)))
    profiles = (parse_profile(text.format(here=tmp_path)) for text in (first, then))
    assert fates(*profiles) == digest


def test_a_new_impairment_is_a_function_and_a_place_in_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncation(context: Context, onward: Onward) -> Onward:
        return lambda frame, now, copies=1, /: onward(frame[:100], now)

    monkeypatch.setattr(impairments, "IMPAIRMENTS", (*impairments.IMPAIRMENTS, truncation))
    left: list[bytes] = []
    line = Line(left.append, 1)
    line.apply(direction_conditions(parse_profile("rate=1mbit"), "up"), 0.0)
    line.enter(bytes(1000), 0.0)
    line.advance(1.0)
    assert [len(frame) for frame in left] == [100]


def test_a_line_under_codel_keeps_its_standing_delay_near_the_target() -> None:
    # 1 Mbit/s takes a packet of 1000 bytes in 8 ms; one comes every 6 ms, for 30 s
    arrivals = [n * 0.006 for n in range(5000)]
    tail, _ = run_line("rate=1mbit,delay=1ms,queue=200p", arrivals)
    line, left = run_line("rate=1mbit,delay=1ms,queue=codel(200p,target=20ms)", arrivals)
    assert tail.counted.dropped_aqm == 0 and tail.counted.dropped_queue > 900
    assert line.counted.dropped_queue == 0 and line.counted.dropped_aqm + len(left) == 5000
    # Without it 25 % too much comes; what has left by the end leaves a queue far from full.
    assert 800 < line.counted.dropped_aqm < 1300


def test_duplicates_come_twice_and_are_counted() -> None:
    line, left = run_line("delay=1ms,duplicate=10%", [n * 0.01 for n in range(2000)])
    assert len(left) == 2000 + line.counted.duplicated
    assert sorted(set(left)) == list(range(2000))
    assert 140 < line.counted.duplicated < 260  # 200, four standard deviations of 13


def test_a_reordered_packet_overtakes_those_under_way_and_nothing_is_lost() -> None:
    line, left = run_line("rate=10mbit,delay=20ms,reorder=5%", [n * 0.002 for n in range(2000)])
    assert sorted(left) == list(range(2000))
    assert 60 < line.counted.reordered < 140
    ahead = sum(a > b for a, b in itertools.pairwise(left))
    assert ahead == pytest.approx(line.counted.reordered, rel=0.15)  # two in a row are one jump


def test_jitter_may_reorder_where_the_profile_says_so() -> None:
    arrivals = [n * 0.001 for n in range(2000)]
    _, ordered = run_line("delay=20ms,jitter=5ms", arrivals)
    _, mixed = run_line("delay=20ms,jitter=normal(5ms,reorder)", arrivals)
    assert ordered == list(range(2000))
    assert mixed != ordered and sorted(mixed) == ordered


def test_each_packets_overhead_takes_its_time() -> None:
    plain, dear = (Line(lambda _: None, 1) for _ in range(2))
    plain.apply(direction_conditions(parse_profile("rate=1mbit"), "up"), 0.0)
    dear.apply(direction_conditions(parse_profile("rate=1mbit,overhead=50b"), "up"), 0.0)
    for line in (plain, dear):
        line.enter(bytes(24 + 100), 0.0)
    assert (plain.leaves, dear.leaves) == (pytest.approx(0.0008), pytest.approx(0.0012))


def test_of_a_super_packet_what_the_queue_has_no_room_for_is_dropped() -> None:
    left: list[bytes] = []
    line = Line(left.append, 1)
    line.apply(direction_conditions(parse_profile("rate=10mbit,queue=3p"), "up"), 0.0)
    line.enter(bytes(24 + 1500), 0.0)
    line.enter(tcp_super_packet(bytes(14600), 1460), 0.0)  # ten of 1500 bytes, three of which fit
    line.advance(10.0)
    assert (line.counted.packets, line.counted.delivered, line.counted.dropped_queue) == (11, 4, 7)
    assert packet.measure(left[1]) == (4500, 3)


def test_super_packets_are_half_a_millisecond_long_and_none_where_chance_does_more_than_lose() -> None:
    def segments(text: str) -> int:
        return super_packet_segments(parse_profile(text).up)

    assert segments("rate=1gbit,delay=1ms") == 40  # 60 kB at most
    assert segments("rate=300mbit,delay=1ms") == 12
    assert segments("rate=10mbit,delay=1ms") == 1
    assert (
        segments("rate=1gbit,delay=1ms,loss=gilbert(1%,burst=4)") == 40
    )  # it takes single packets out of them
    for text in (
        "loss=1%,ecn=yes",
        "jitter=1ms",
        "corrupt=1%",
        "duplicate=1%",
        "reorder=1%",
        "queue=codel(1bdp)",
    ):
        assert segments(f"rate=1gbit,delay=5ms,{text}") == 1
