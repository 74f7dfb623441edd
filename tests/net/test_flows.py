"""Background flows over the loopback interface: what they count, by whichever program, and when they are broken off."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

from testbed.errors import UsageError
from testbed.net.loopback import Loopback
from testbed.net.traffic import traffic
from testbed.net.traffic.traffic import Flow, running

iperf3 = pytest.mark.skipif(shutil.which("iperf3") is None, reason="there is no iperf3 on this machine")


@pytest.fixture
def loopback() -> Loopback:
    return Loopback()


@iperf3
def test_iperf3_flows_run_beside_our_own_and_are_counted(loopback: Any) -> None:
    flows = [
        Flow("a", "b", "iperf3", rate_bps=8e6),
        Flow("b", "a", "iperf3", rate_bps=4e6, start_s=0.3),
        Flow("a", "b", "tcp", rate_bps=4e6),
        Flow("a", "b", "iperf3", start_s=60),
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
    with running(loopback, [Flow("a", "b", "iperf3", rate_bps=8e6, stop_s=1.0)]) as results:
        time.sleep(2.5)
    assert 1e5 < results[0]["received_bytes"] <= results[0]["sent_bytes"] <= 1e6 + (1 << 18)


@pytest.mark.parametrize("kind", ["tcp", pytest.param("iperf3", marks=iperf3)])
def test_what_flows_did_until_the_block_was_broken_off_is_kept(loopback: Any, kind: Any) -> None:
    with pytest.raises(KeyboardInterrupt), running(loopback, [Flow("a", "b", kind, rate_bps=8e6)]) as results:
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
        running(loopback, [Flow("a", "b"), Flow("a", "b", "iperf3")]),
    ):
        pytest.fail("the block ran")
