"""Background flows: over the loopback interface and between nodes, what they count, by whichever program, and when they end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from typing import Any

import pytest

from testbed.errors import NetworkError, UsageError
from testbed.hosts import processes
from testbed.net.fabric.fabric import Fabric
from testbed.net.loopback import Loopback
from testbed.net.topology.files import load_topology
from testbed.net.traffic import traffic
from testbed.net.traffic.traffic import Flow, running
from tests.net.direct import Direct

iperf3 = pytest.mark.skipif(shutil.which("iperf3") is None, reason="there is no iperf3 on this machine")


def flow(source: str, target: str, kind: str = "tcp", **settings: str) -> Flow:
    return Flow(**{"from": source, "to": target, "kind": kind, **settings})


@pytest.fixture
def loopback() -> Loopback:
    return Loopback()


@iperf3
def test_iperf3_flows_run_beside_our_own_and_are_counted(loopback: Any) -> None:
    flows = [
        flow("a", "b", "iperf3", rate="8mbit"),
        flow("b", "a", "iperf3", rate="4mbit", start="300ms"),
        flow("a", "b", "tcp", rate="4mbit"),
        flow("a", "b", "iperf3", start="60s"),
    ]
    began = time.monotonic()
    with running(loopback, flows) as results:
        time.sleep(2.5)
    lasted = time.monotonic() - began
    first, second, ours, waiting = results
    for one, rate_bps in ((first, 8e6), (second, 4e6)):
        assert one["kind"] == "iperf3"
        assert 1e5 < one["received_bytes"] <= one["sent_bytes"] <= rate_bps / 8 * lasted + (1 << 18)
        assert one["goodput_bps"] > 1e5
    assert ours["received_bytes"] > 1e5
    assert (waiting["sent_bytes"], waiting["received_bytes"], waiting["goodput_bps"]) == (0, 0, 0.0)


@iperf3
def test_an_iperf3_flow_ends_at_its_stop(loopback: Any) -> None:
    with running(loopback, [flow("a", "b", "iperf3", rate="8mbit", stop="1s")]) as results:
        time.sleep(2.5)
    assert 1e5 < results[0]["received_bytes"] <= results[0]["sent_bytes"] <= 1e6 + (1 << 18)


@pytest.mark.parametrize("kind", ["tcp", pytest.param("iperf3", marks=iperf3)])
def test_what_flows_did_until_the_block_was_broken_off_is_kept(loopback: Any, kind: Any) -> None:
    with pytest.raises(KeyboardInterrupt), running(loopback, [flow("a", "b", kind, rate="8mbit")]) as results:
        time.sleep(1.5)
        raise KeyboardInterrupt
    assert len(results) == 1
    assert 1e5 < results[0]["received_bytes"] <= results[0]["sent_bytes"]


def test_a_missing_iperf3_is_said_before_anything_starts(
    loopback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic.shutil, "which", lambda name: None)
    monkeypatch.setattr(traffic, "_start", lambda *_: pytest.fail("something was started"))
    with (
        pytest.raises(UsageError, match="there is no iperf3 on this machine; install it"),
        running(loopback, [flow("a", "b"), flow("a", "b", "iperf3")]),
    ):
        pytest.fail("the block ran")


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_flows_run_at_their_rate_and_time_are_counted_and_end() -> None:
    flows = [
        flow("edge1", "cloud", "udp", rate="4mbit"),
        flow("edge2", "cloud", "tcp", rate="8mbit", start="500ms", stop="1500ms"),
        flow("cloud", "edge1", "tcp", start="60s"),
    ]
    with Fabric.build(load_topology("shared-bottleneck"), Direct()) as fabric:
        began = time.monotonic()
        with running(fabric, flows) as results:
            made = fabric.state.processes
            time.sleep(2)
        lasted = time.monotonic() - began
        assert not any(processes.is_running(p.pid, p.started) for p in made)
    udp, tcp, waiting = results
    assert udp["source"] == "edge1"
    assert 4e6 / 8 * 1.5 < udp["received_bytes"] <= 4e6 / 8 * lasted + 2400
    assert udp["sent_bytes"] >= udp["received_bytes"]
    assert 8e6 / 8 * 0.5 < tcp["received_bytes"] == tcp["sent_bytes"] <= 8e6 / 8 * 1.0 + 2 * 16_384
    assert waiting["sent_bytes"] == waiting["received_bytes"] == 0


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_flows_end_when_the_block_fails() -> None:
    with Fabric.build(load_topology("edge-cloud"), Direct()) as fabric:
        with pytest.raises(KeyboardInterrupt), running(fabric, [flow("edge", "cloud")]):
            made = fabric.state.processes
            raise KeyboardInterrupt
        assert not any(processes.is_running(p.pid, p.started) for p in made)
        assert (
            subprocess.run(["ip", "netns", "pids", fabric.namespace("edge")], capture_output=True).stdout
            == b""
        )


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("end", ["edge", "cloud"])
def test_an_end_of_a_flow_that_dies_or_stands_still_is_named_while_it_is_needed(
    end: str, fate: signal.Signals
) -> None:
    """Or what is measured beside it would be measured on an idle link."""
    named = r"\w+" if fate == signal.SIGKILL else end  # of a death the other end may be the first to tell
    says = rf"from edge to cloud: its end at {named} \(process \d+\) has (ended|been stopped)"
    told_late = False
    with Fabric.build(load_topology("edge-cloud"), Direct()) as fabric:
        with pytest.raises(NetworkError, match=says), running(fabric, [flow("edge", "cloud")]):
            fabric.check()
            (dead,) = [one for one in fabric.state.processes if one.what == f"traffic at {end}"]
            os.kill(dead.pid, fate)
            for _ in range(100):
                time.sleep(0.1)
                fabric.check()
            told_late = True
        fabric.check()
    assert not told_late
