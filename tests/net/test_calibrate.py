"""Figures and verdicts from probe packets: made up ones here, real ones across real links at the end."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import NetworkError, SpecError, UsageError
from testbed.net import emulators
from testbed.net.calibration import checks as measure
from testbed.net.calibration.calibrate import busy_cores, calibrate, foretell
from testbed.net.calibration.probes import Arrived, Flow, Prober, _batch
from testbed.net.profile.profile import Direction, parse_profile
from tests.net.wire import Conditioned, wire

LINK = Direction(rate_bps=10e6, delay_s=0.02, loss=0.01)


def arrived(
    sent: int, delay_s: float, gap_s: float, lost: set[int] | frozenset[int] = frozenset()
) -> Arrived:
    numbers = [n for n in range(sent) if n not in lost]
    times = [n * gap_s for n in numbers]
    return Arrived(sent, sent * gap_s, 0.0, numbers, times, [t + delay_s for t in times])


def test_the_rate_is_that_between_arrivals_and_not_of_the_filling():
    # 1,000 packets of 1,250 bytes, one a millisecond: 10 Mbit/s; the first 30 arrive as a burst.
    flow = arrived(1000, 0.02, 1e-3)
    early = [flow.arrived_s[30] - 1e-5 * (30 - n) for n in range(30)] + flow.arrived_s[30:]
    check = measure.rate_check("up", LINK, Arrived(1000, 1.0, 0.0, flow.numbers, flow.sent_s, early), 1250)
    assert check.measured == pytest.approx(10e6, rel=1e-3)
    assert check.ok
    assert check.low is not None
    assert check.high is not None
    assert check.low <= 10e6 <= check.high


@pytest.mark.parametrize(("factor", "ok"), [(1.02, True), (0.98, True), (1.04, False), (0.96, False)])
def test_a_rate_is_in_tolerance_up_to_three_per_cent(factor: float, ok: bool):
    assert measure.rate_check("up", LINK, arrived(1000, 0.02, 1e-3 / factor), 1250).ok is ok


def test_an_unlimited_rate_is_reported_and_not_judged():
    check = measure.rate_check("up", Direction(), arrived(1000, 0, 1e-4), 1250)
    assert check.ok is None
    assert check.measured == pytest.approx(100e6, rel=1e-3)


@pytest.mark.parametrize(("extra", "ok"), [(0.0, True), (0.0009, True), (0.0012, False), (-0.002, False)])
def test_a_delay_is_in_tolerance_up_to_a_millisecond_above(extra: float, ok: bool):
    own = 64 * 8 / 10e6  # what the probe takes to be sent is not the link's delay
    check = measure.delay_check("up", LINK, arrived(500, 0.02 + own + extra, 1e-3), 64)
    assert check.ok is ok
    assert check.measured == pytest.approx(0.02 + extra, abs=1e-6)


def test_a_few_jittery_probes_are_judged_by_what_they_can_tell():
    draw = random.Random(3)
    flow = arrived(25, 0.0, 0.05)
    jittery = Arrived(
        25, 1.0, 0.0, flow.numbers, flow.sent_s, [s + draw.gauss(0.3, 0.01) for s in flow.sent_s]
    )
    assert measure.delay_check("up", Direction(delay_s=0.3, jitter_s=0.01), jittery, 64).ok
    assert not measure.delay_check("up", Direction(delay_s=0.2, jitter_s=0.01), jittery, 64).ok


def test_clopper_pearson_agrees_with_published_values():
    # Agresti and Coull, The American Statistician 52 (1998): 0 of 10 at 95 %: (0, 0.3085); 5 of 10: (0.1871, 0.8129)
    assert measure.clopper_pearson(0, 10, 0.95) == pytest.approx((0, 0.3085), abs=1e-4)
    assert measure.clopper_pearson(5, 10, 0.95) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert measure.clopper_pearson(10, 10, 0.95)[1] == 1


@pytest.mark.parametrize(("lost", "ok"), [(20, True), (30, True), (10, True), (50, False), (0, False)])
def test_a_loss_is_in_tolerance_inside_its_binomial_interval(lost: int, ok: bool):
    assert measure.loss_check("up", LINK, arrived(2000, 0.02, 1e-3, set(range(lost)))).ok is ok


def test_any_loss_on_a_loss_free_link_is_out_of_tolerance():
    assert not measure.loss_check("up", Direction(), arrived(1000, 0, 1e-3, {500})).ok


def test_a_duplicate_does_not_hide_a_loss():
    flow = Arrived(3, 1.0, 0.0, [0, 2, 2], [0.0, 0.2, 0.2], [0.1, 0.3, 0.3])
    assert measure.loss_check("up", Direction(), flow).measured == pytest.approx(1 / 3)


def test_nothing_arriving_is_a_verdict_and_not_a_crash():
    nothing = Arrived(100, 1.0, 0.0, [], [], [])
    checks = [measure.rate_check("up", LINK, nothing, 1250), measure.delay_check("up", LINK, nothing, 64)]
    assert [check.ok for check in checks] == [False, False]
    assert "nothing arrived" in str(checks[0])


@pytest.mark.netns
@pytest.mark.slow
def test_a_link_that_is_not_what_was_asked_for_is_found_out_with_both_attempts_on_record():
    asked = parse_profile("rate=10mbit,delay=10ms")
    with wire() as net:
        link = Conditioned(net, emulators.choose("userspace"), parse_profile("rate=8mbit,delay=15ms,loss=3%"))
        measured = calibrate(link, "l0", asked, quick=True)
        link.attachment.detach()
    assert not measured.ok
    assert len(measured.attempts) == 2
    wrong = {(check.way, check.what) for check in measured.checks if check.ok is False}
    assert wrong == {(way, what) for way in ("up", "down") for what in ("rate", "delay", "loss")}
    assert "up rate" in measured.cause
    assert measured.checks[0].measured == pytest.approx(8e6, rel=0.03)
    plain = json.loads(json.dumps(measured.to_dict()))
    assert [attempt["ok"] for attempt in plain["attempts"]] == [False, False]
    assert [line["what"] for line in measured.lines()] == ["rate", "delay", "loss"] * 2


@pytest.mark.netns
@pytest.mark.slow
def test_jitter_bursts_and_traces_of_delay_and_loss_are_measured_too(tmp_path: Path):
    (tmp_path / "swing.csv").write_text(
        "time_s,delay_ms,loss_percent\n" + "".join(f"{t / 10},{20 + t % 7},{t % 5}\n" for t in range(40))
    )
    asked = parse_profile(
        f"up:rate=20mbit,delay=20ms,jitter=uniform(2ms),loss=gilbert(5%,burst=4);down:rate=20mbit,trace:{tmp_path}/swing.csv"
    )
    with wire() as net:
        link = Conditioned(net, emulators.choose("userspace"), asked)
        measured = calibrate(link, "l0", asked, quick=True, stretch_s=3.0)
        link.attachment.detach()
    assert measured.ok, measured.cause
    found = {(check.way, check.what) for check in measured.checks}
    assert {("up", "jitter"), ("up", "law"), ("up", "burst")} <= found
    assert {("down", "delay trace"), ("down", "loss trace"), ("down", "loss shape")} <= found
    tracks = measured.to_dict()["attempts"][-1]["tracks"]
    assert [(track["way"], track["what"], len(track["asked"])) for track in tracks] == [
        ("down", "delay", 30),
        ("down", "loss", 30),
    ]


@pytest.mark.netns
def test_an_unknown_link_is_refused_with_the_known_ones():
    with wire() as net:
        link = Conditioned(net, emulators.choose("userspace"), parse_profile("delay=1ms"))
        with pytest.raises(SpecError, match="there is no link 'wan'; there is l0"):
            calibrate(link, "wan", link.profile)
        link.attachment.detach()


@pytest.mark.netns
def test_a_prober_that_dies_is_an_error_that_says_so():
    with wire() as net, Prober(net, "l0", "a", "b") as prober:
        for process in prober._processes.values():
            process.kill()
        with pytest.raises(NetworkError, match="a probing process failed"):
            prober.run({"up": Flow(1, 64, 0.01, 0.1)}, 0.1)


def test_the_probing_and_relaying_programs_need_the_standard_library_and_their_own_parts_alone():
    # They are started isolated and without site-packages, for speed.
    from testbed.net.calibration import prober as probe
    from testbed.net.emulators.relay.serving import PACKAGE

    assert probe.__file__ is not None
    assert "testbed" not in {
        word.split(".")[0]
        for line in Path(probe.__file__).read_text().splitlines()
        if line.startswith(("import ", "from "))
        for word in line.split()[1:2]
    }
    load = "import sys; sys.path.insert(0, sys.argv[1]); import testbed.net.emulators.relay.relay; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", load, str(PACKAGE)], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    ours = {name for name in loaded if name.startswith("testbed.")}
    assert {name.split(".")[0] for name in loaded - ours} <= sys.stdlib_module_names | {"testbed", "__main__"}
    assert all(
        name in ("testbed.net", "testbed.errors")
        or name.startswith(("testbed.net.emulators", "testbed.net.profile"))
        for name in ours
    ), ours
    assert not any(name.endswith((".userspace", ".netem", ".contract")) for name in ours)


def test_packets_sent_many_at_a_time_are_single_ones_that_all_arrive():
    from testbed.net.calibration import prober as probe

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        to.bind(("127.0.0.1", 0))
        to.settimeout(5)
        sender.connect(to.getsockname())
        plan = {
            "phase": 1,
            "packets": 103,
            "bytes": 200,
            "interval_s": 1e-5,
            "duration_s": 5.0,
            "catch_up": True,
        }
        told = probe.send(sender, plan | {"batch": 16})
        got = [to.recv(4096) for _ in range(103)]
        probe.send(sender, plan | {"packets": 1, "bytes": 300})  # and afterwards they are single ones again
        assert len(to.recv(4096)) == 300
    assert told["sent"] == 103
    assert [len(packet) for packet in got] == [200] * 103
    assert [probe.MESSAGE.unpack_from(packet)[1] for packet in got] == list(range(103))


@pytest.mark.parametrize(
    ("interval_s", "size", "batch"), [(1e-3, 1500, 1), (1e-5, 1500, 16), (2e-5, 1500, 10), (1e-9, 1500, 16)]
)
def test_only_very_frequent_packets_are_sent_many_at_a_time(interval_s: float, size: int, batch: int):
    flow = Flow(1000, size, interval_s, 1.0)
    assert _batch(flow) == batch
    assert _batch(replace(flow, pace=((1.0, interval_s),))) == 1


def test_busy_cores_have_a_process_each_that_ends_with_the_block():
    def children() -> set[int]:
        listed = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
        return {int(pid) for pid in listed.split()}

    before = children()
    with busy_cores():
        started = children() - before
        assert len(started) == os.cpu_count()
    assert not children() & started
    with busy_cores(False):
        assert children() == before


def test_a_link_whose_queue_takes_minutes_to_drain_is_refused_and_a_long_measurement_foretold() -> None:
    assert (
        foretell(parse_profile("rate=20mbit,outage:12s")) == ""
    )  # minutes, while its mean was taken over the outage
    assert "1 min" in foretell(parse_profile("rate=8kbit"))  # 64,000 bytes at 1,000 a second
    for slow in ("rate=1kbit", "rate=20mbit,outage:12s/12001ms"):
        with pytest.raises(UsageError, match=r"profile .*more than 5 min 00 s.*queue="):
            foretell(parse_profile(slow))
    assert foretell(parse_profile("rate=1kbit,queue=1500b")) == ""  # what waits is gone in twelve seconds
