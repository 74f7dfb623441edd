"""Whole runs with what a scenario may ask of its network: captures, background traffic, a trace of its own."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.kill_resume import leftovers
from testbed.experiment.row import MEASURED
from tests.runs import SCENARIO, rows, run, unmeasured

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.usefixtures("own_state")]

TOPOLOGY = """\
nodes: [edge, other, router, cloud]
links:
  - {name: access, a: edge, b: router, profile: "rate=50mbit,delay=2ms"}
  - {name: side, a: other, b: router, profile: "rate=50mbit,delay=2ms"}
  - {name: backhaul, a: router, b: cloud, profile: "rate=50mbit,delay=2ms", pcap: true}
"""


def frames(path: Path) -> list[tuple[int, bytes]]:
    """The frames of a capture file, after the format's description alone: (time in nanoseconds, first bytes)."""
    data = path.read_bytes()
    assert data[:4] == struct.pack("=I", 0xA1B23C4D)
    assert struct.unpack_from("=HH", data, 4) == (2, 4)
    assert struct.unpack_from("=I", data, 20) == (1,)  # Ethernet
    found, at = [], 24
    while at < len(data):
        seconds, nanoseconds, kept, length = struct.unpack_from("=IIII", data, at)
        assert kept <= min(length, 128) and nanoseconds < 10**9
        found.append((seconds * 10**9 + nanoseconds, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    assert at == len(data)
    return found


@pytest.fixture
def scenario(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        SCENARIO.replace("examples: 2", "examples: 1")
        + f"emulator: userspace\nmodel: {tiny_model('llama')}\n"
    )
    return path


@pytest.fixture(autouse=True)
def _unmeasured() -> Iterator[None]:
    with unmeasured():
        yield


def test_a_run_leaves_captures_traffic_and_traces_in_its_directory_and_nothing_else(
    scenario: Path, tmp_path: Path
) -> None:
    before = set(leftovers())
    (tmp_path / "net.yaml").write_text(TOPOLOGY)
    (tmp_path / "walk.csv").write_text("time_s,rate_mbps\n0,20\n1,30\n")
    traffic = [{"from": "other", "to": "cloud", "kind": "udp", "rate": "1mbit"}]
    with scenario.open("a") as file:
        file.write(f"topology: {tmp_path / 'net.yaml'}\nlink: access\ntraffic: {json.dumps(traffic)}\n")
    out = tmp_path / "out"
    one = {"profiles": ["delay=2ms,trace:walk.csv"], "placements": ["split"], "codecs": ["fp16"]}
    done = run(str(scenario), "--out", str(out), **one)
    assert done.status == 0, done.errors
    assert set(leftovers()) == before
    assert [row["error"] for row in rows(out)] == [""]

    payload = rows(out)[0]["payload_bytes"]
    assert {p.name for p in (out / "captures").iterdir()} == {"backhaul-router.pcap", "backhaul-cloud.pcap"}
    for name in ("backhaul-router", "backhaul-cloud"):
        found = frames(out / "captures" / f"{name}.pcap")
        assert [at for at, _ in found] == sorted(at for at, _ in found)
        version4 = [frame for _, frame in found if frame[12:14] == b"\x08\x00"]
        assert {frame[23] for frame in version4} >= {6, 17}  # TCP and UDP
        # TCP's payload that crossed towards the cloud, by the lengths in the headers
        carried = sum(
            struct.unpack_from("!H", frame, 16)[0] - 4 * (frame[14] & 15) - 4 * (frame[46] >> 4)
            for frame in version4
            if frame[23] == 6 and frame[30:34] == bytes((10, 0, 2, 2))
        )
        assert carried >= payload

    (start,) = json.loads((out / "traffic.json").read_text())["starts"]
    assert start["flows"][0]["received_bytes"] > 0
    kept = json.loads((out / "manifest.json").read_text())["traces"]["walk.csv"]
    assert (out / kept["file"]).read_bytes() == (tmp_path / "walk.csv").read_bytes()


@pytest.mark.parametrize("at", ["trial", "run"])
def test_a_reused_answer_meets_the_outage_that_a_computed_one_met(
    scenario: Path, tmp_path: Path, at: str
) -> None:
    out = tmp_path / "out"
    alike = [f"rate=20mbit,delay={delay}ms,outage:3s@0.5s" for delay in (5, 6)]
    slow = {"compute.cloud": 30}
    done = run(str(scenario), "--out", str(out), profiles=alike, placements=["cloud"], at=at, **slow)
    assert done.status == 0, done.errors
    computed, reused = rows(out)
    assert computed["reused"] == "" and not computed["replayed"]
    assert reused["reused"] == "prefill,first_token,generate" and reused["replayed"]
    assert reused["answer"] == computed["answer"]
    if at == "trial":
        assert reused["e2e_s"] > 3 and computed["e2e_s"] > 3
    else:
        assert reused["trace_s"] - computed["trace_s"] > computed["e2e_s"] > 3


def test_examples_are_spread_over_a_trace_of_which_every_setting_meets_the_same_stretch(
    scenario: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "steps.csv").write_text("time_s,rate_mbps\n0,20\n4,30\n")
    traced = {"profiles": ["delay=2ms,trace:steps.csv"], "placements": ["split", "cloud"], "codecs": ["int8"]}
    done = run(str(scenario), "--out", str(out), **traced, at="example", examples=2)
    assert done.status == 0, done.errors
    begun = [int(row["trace_s"]) for row in rows(out)]
    assert begun == [0, 0, 4, 4]  # its last value holds as long as the one before


def test_a_failed_trial_leaves_no_times_and_no_counts(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    profiles = ["rate=20mbit,delay=5ms,outage:6s@0s"]
    done = run(
        str(scenario), "--out", str(out), profiles=profiles, placements=["edge", "cloud"], timeout="1s"
    )
    assert done.status == 1, done.errors
    here, failed = rows(out)
    assert here["e2e_s"] > 0 and here["answer_tokens"] >= 1
    assert failed["error"] and failed["trace_s"] is not None and failed["kv_bytes"] == here["kv_bytes"]
    assert {failed[column] for column in MEASURED} == {None}
