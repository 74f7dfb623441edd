"""What netem is told where tc(8) does not say it (see test_netem.py), and what is refused beforehand."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest

from testbed.errors import UsageError
from testbed.net.emulators.netem import options as netem_options
from testbed.net.emulators.netem import support
from testbed.net.emulators.netem.options import Options
from testbed.net.emulators.netem.qdiscs import size_offset
from testbed.net.emulators.netem.trace_follower import patched
from testbed.net.netlink import Interface, TrafficObject, attribute, attributes
from testbed.net.profile.profile import parse_profile


def options(text: str) -> tuple[Options, Options]:
    return netem_options.options(parse_profile(text), "up", 1500)


def test_the_queue_is_counted_in_full_packets_and_one_more_for_the_one_being_sent():
    _, inner = options("rate=10mbit,delay=10ms,queue=20p")
    assert inner.limit_packets == 21
    _, inner = options("rate=10mbit,delay=10ms,queue=100001b")
    assert inner.limit_packets == 67 + 1


def test_read_back_names_the_field_that_differs():
    asked = Options(delay_ns=20_000_000, rate_bytes_per_s=1000)
    assert asked.differences(asked.encode()) == []
    other = Options(delay_ns=20_000_000, rate_bytes_per_s=999)
    assert asked.differences(other.encode()) == ["rate: asked 1000, has 999"]
    old_kernel = Options(delay_ns=64).encode()[:24] + attribute(6, struct.pack("=IiIi", 0, 0, 0, 0))
    assert Options(delay_ns=128).differences(old_kernel) == ["delay: asked 128, has 64"]


FULL = 2**32 - 1


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
        return Interface(1, 65536)

    def traffic(self, *_: object, what: str) -> None:
        pass

    def qdisc(self, ifindex: int, handle: int) -> TrafficObject:
        return TrafficObject(ifindex, handle, 0xFFFFFFFF, "netem", self._dump, {})
