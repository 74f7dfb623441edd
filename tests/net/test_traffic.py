"""Background flows between nodes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from testbed.hosts import processes
from testbed.net.fabric.fabric import Fabric
from testbed.net.topology.topology import load_topology
from testbed.net.traffic.traffic import Flow, running
from tests.net.direct import Direct

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
]


def test_flows_run_at_their_rate_and_time_are_counted_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path))
    flows = [
        Flow("edge1", "cloud", "udp", rate_bps=4e6),
        Flow("edge2", "cloud", "tcp", rate_bps=8e6, start_s=0.5, stop_s=1.5),
        Flow("cloud", "edge1", "tcp", start_s=60),
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


def test_flows_end_when_the_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path))
    with Fabric.build(load_topology("edge-cloud"), Direct()) as fabric:
        with pytest.raises(KeyboardInterrupt), running(fabric, [Flow("edge", "cloud")]):
            made = fabric.state.processes
            raise KeyboardInterrupt
        assert not any(processes.is_running(p.pid, p.started) for p in made)
        assert (
            subprocess.run(["ip", "netns", "pids", fabric.namespace("edge")], capture_output=True).stdout
            == b""
        )
