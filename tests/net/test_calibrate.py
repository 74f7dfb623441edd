"""Measuring links: what is sent, by whom, and when; and whole calibrations of real links."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import NetworkError, SpecError, UsageError
from testbed.net import emulators
from testbed.net.calibration import prober
from testbed.net.calibration.calibrate import busy_cores, calibrate, foretell
from testbed.net.calibration.probes import PacketTrain, Prober, _batch, _plan
from testbed.net.calibration.traces import (
    _applied,
    _train,
)
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.schedule import Schedule
from testbed.programs import isolated
from tests.net.wire import Conditioned, wire


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
    assert {("up", "jitter"), ("up", "jitter distribution"), ("up", "burst")} <= found
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
            prober.run({"up": PacketTrain(1, 64, 0.01, 0.1)}, 0.1)


@pytest.mark.parametrize("module", ["testbed.net.calibration.prober", "testbed.net.emulators.relay.relay"])
def test_the_probing_and_relaying_programs_need_the_standard_library_and_their_own_parts_alone(module: str):
    # They are started isolated and without site-packages, for speed.
    argv = isolated(module)
    argv[4] = f"import sys; sys.path.insert(0, sys.argv[1]); import {module}; print(*sys.modules)"
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    ours = {name for name in loaded if name.startswith("testbed.")}
    assert {name.split(".")[0] for name in loaded - ours} <= sys.stdlib_module_names | {"testbed", "__main__"}
    rooms = ("testbed.net.emulators", "testbed.net.profile", "testbed.net.calibration")
    assert all(
        name
        in ("testbed.net", "testbed.net.sockets", "testbed.programs", "testbed.errors", "testbed.descriptors")
        or name.startswith(rooms)
        for name in ours
    ), ours
    assert not any(name.endswith((".userspace", ".netem", ".emulator")) for name in ours)


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


def test_packets_read_together_count_each_with_its_number():
    from testbed.net.calibration import prober as probe

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        to.bind(("127.0.0.1", 0))
        to.setblocking(False)
        sender.connect(to.getsockname())
        receiver = probe.Receiver(to, together=True)
        receiver.begin(1)
        plan = {"packets": 103, "bytes": 200, "interval_s": 1e-5, "duration_s": 5.0, "catch_up": True}
        probe.send(sender, plan | {"phase": 1, "batch": 16})
        probe.send(sender, plan | {"phase": 2, "packets": 5})  # before the receiver is told of that phase
        probe.send(sender, plan | {"phase": 3, "packets": 7})
        reads = sum(receiver.drain(1) for _ in range(7 + 5 + 7))
        arrived = [probe.ARRIVAL.unpack(arrival) for arrival in receiver.arrivals]
        assert not receiver.drain(1)
        receiver.begin(2)
        assert [probe.ARRIVAL.unpack(arrival)[0] for arrival in receiver.arrivals] == list(range(5))
        receiver.begin(4)
        assert not receiver.arrivals
    assert [number for number, *_ in arrived] == list(range(103))
    assert reads == 7 + 5 + 7
    assert all(0 <= at - sent < 5_000_000_000 for _, sent, at in arrived)


@pytest.mark.parametrize(
    ("interval_s", "size", "batch"), [(1e-3, 1500, 1), (1e-5, 1500, 20), (2e-5, 1500, 10), (1e-9, 1500, 40)]
)
def test_only_very_frequent_packets_are_sent_many_at_a_time(interval_s: float, size: int, batch: int):
    flow = PacketTrain(1000, size, interval_s, 1.0)
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


def test_the_flow_is_faster_than_the_trace_before_and_behind_every_step():
    profile = parse_profile("delay=20ms,step:1mbit*1s+10mbit*1s")
    schedule = profile.up.schedule("up", 0.0)
    assert isinstance(schedule, Schedule)
    flow = _train(profile.steady().up, schedule, 1500, 0.0, 2.0)
    offered = {round(until - 0.02, 2): 1500 * 8 / interval for until, interval in flow.pace}
    assert all(rate >= 10e6 for at, rate in offered.items() if at + 0.02 >= 0.95)
    assert all(1.1e6 <= rate <= 2e6 for at, rate in offered.items() if 0.1 <= at <= 0.85)


def test_a_flow_is_in_step_with_the_trace_however_late_its_sender_is_told():
    fast_then_slow = PacketTrain(10_000, 200, 1e-3, 5.5, catch_up=True, pace=((5.0, 1e-3), (6.0, 0.1)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))
        late = replace(fast_then_slow, begin_s=time.monotonic() - 5.0)
        assert 1 <= prober.send(sock, _plan(late, 1))["sent"] <= 7  # what has passed is not made up for
        begin = time.monotonic() + 0.1
        assert prober.send(sock, _plan(replace(late, begin_s=begin, duration_s=0.1), 2))["sent"] <= 101
        assert time.monotonic() >= begin + 0.09


def test_a_trace_whose_start_took_too_long_is_started_again():
    origins: list[float] = []

    def apply(origin_s: float) -> None:
        origins.append(origin_s)
        if len(origins) == 1:
            time.sleep(0.4)

    start = _applied(apply, 2.0)
    assert len(origins) == 2
    assert start == origins[-1] + 2.0
    assert start - origins[0] - 2.0 >= 0.4


def test_a_trace_that_was_ready_in_time_is_started_once():
    origins: list[float] = []
    assert _applied(origins.append, 0.0) == origins[0]
    assert len(origins) == 1
