"""A whole run over SSH whose link one of the hosts shapes, by sudo: needs netem."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.experiment.deployment import Pair
from tests.hosts.bench import bench, cable, wait_for
from tests.hosts.test_sudo import MISSING, line_for_sudo, state
from tests.runs import rows, run, undrawn

pytestmark = [
    pytest.mark.netem,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_state"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "-"),
]

#: A model's shape alone, whose devices' times are waited for: neither side has to load transformers, which takes a guest minutes.
SCENARIO = """\
name: shaped
placements: [split]
codecs: [int8]
model: shape:llama-3.1-8b
compute: {edge: device:m1-max-llama-3.1-8b, cloud: device:rtx-4090-llama-3.1-8b}
tasks: [needle]
context_tokens: 64
examples: 1
threads: 1
max_new_tokens: 2
"""


def test_a_host_shapes_its_link_for_a_whole_run_and_leaves_it_as_it_was(
    tmp_path: Path,
) -> None:
    sudoers, seen, asking = line_for_sudo().replace("lab", "{user}", 1), [], Pair.trial

    def looking(*given: Any, **named: Any) -> Any:
        seen.append(hosts["edge"].execute("tc", "qdisc"))
        return asking(*given, **named)

    with bench("edge", "cloud", sudoers=sudoers) as hosts, cable(hosts["edge"], hosts["cloud"]):
        nodes = ", ".join(
            f"{name}: {{host: '{host.url}', python: {sys.executable}, interface: eth0, device: cpu}}"
            for name, host in hosts.items()
        )
        link = "{name: access, a: edge, b: cloud, profile: 'rate=20mbit,delay=5ms', shape: edge}"
        (tmp_path / "hosts.yaml").write_text(f"nodes: {{{nodes}}}\nlinks: [{link}]\n")
        (tmp_path / "shaped.yaml").write_text(f"{SCENARIO}topology: hosts.yaml\n")
        before = {name: state(host) for name, host in hosts.items()}
        with undrawn(), patch.object(Pair, "trial", looking):
            done = run(str(tmp_path / "shaped.yaml"), "--out", str(tmp_path / "out"))
        assert done.status == 0, done.errors
        assert {name: state(host) for name, host in hosts.items()} == before
        assert wait_for(lambda: not any(host.programs() for host in hosts.values()))
    assert seen and all("netem" in each and "clsact" in each for each in seen)
    found = rows(tmp_path / "out")
    assert [(row["emulator"], row["error"]) for row in found] == [("netem", "")]
    (measured,) = json.loads((tmp_path / "out/calibration.json").read_text())["measurements"]
    checks = {each["what"]: each["measured"] for each in measured["attempts"][-1]["checks"]}
    (row,) = found
    print(checks, row["payload_bytes"], row["transmit_s"])
    assert checks["round trip"] >= 0.01
    assert row["payload_bytes"] > 1e6 and row["transmit_s"] >= 8 * row["payload_bytes"] / 20e6
