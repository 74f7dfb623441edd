"""`testbed hosts`: each host is looked at, and what lies between; what a run cannot do without is MISSING, and exit status 1."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from testbed.hosts import installing
from tests.command import Ended, command

EDGE, CLOUD = "host: local, interface: lo", "host: local, address: 127.0.0.1"


def topology(folder: Path, edge: str = EDGE, cloud: str = CLOUD) -> str:
    path = folder / "two.yaml"
    path.write_text(
        f"nodes:\n  edge: {{{edge}}}\n  cloud: {{{cloud}}}\n"
        "links:\n  - {name: access, a: edge, b: cloud, profile: measured}\n"
    )
    return str(path)


def line(said: Ended, *begins: str) -> str:
    (found,) = (line for line in said.out.splitlines() if line.split()[: len(begins)] == [*begins])
    return found


def test_this_machine_twice_is_all_a_run_needs(tmp_path: Path) -> None:
    said = command("hosts", topology(tmp_path), "--json")
    assert said.status == 0, said
    found: dict[str, Any] = json.loads(said.out)
    assert found["ok"] and set(found["nodes"]) == {"edge", "cloud"}
    survey = found["nodes"]["edge"]["survey"]
    assert survey["testbed"]["digest"] == installing.digest()
    assert survey["cores"] == len(os.sched_getaffinity(0))
    there, back = found["paths"]
    assert (there["from"], there["to"], there["needed"]) == ("edge", "cloud", True)
    assert (back["from"], back["to"], back["needed"]) == ("cloud", "edge", False)
    assert there["exchanges"] == 20 and there["interface"] == "lo" and there["rtt_s"] > 0


def test_what_is_asked_for_and_not_there_is_missing_and_said_with_what_there_is(tmp_path: Path) -> None:
    cloud = "host: local, device: 'cuda:9', address: 192.0.2.77"
    said = command("hosts", topology(tmp_path, "host: local, interface: wlan9", cloud))
    assert said.status == 1
    assert "MISSING  no interface wlan9 with an IPv4 address; there are: lo 127.0.0.1" in line(
        said, "edge", "network"
    )
    assert "MISSING  cuda:9 is asked for" in line(said, "cloud", "device")
    assert "192.0.2.77 is no address of it, so it cannot listen there" in line(said, "cloud", "network")
    assert "cloud cannot listen there: OSError" in line(said, "access", "edge", "to", "cloud")


def test_a_copy_that_differs_is_another_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "digest", lambda: "0123456789abcdef")
    said = command("hosts", topology(tmp_path))
    assert said.status == 1
    assert "MISSING  another than here" in line(said, "edge", "testbed")
    assert "testbed hosts install puts this one there" in line(said, "edge", "testbed")


@pytest.mark.parametrize("arguments", [("hosts",), ("hosts", "install"), ("clean",)])
def test_namespaces_are_no_hosts(arguments: tuple[str, ...]) -> None:
    said = command(*arguments, "edge-cloud")
    assert said.status == 2 and "its nodes are namespaces of this machine" in said.errors


def test_this_machine_has_its_testbed_and_leaves_nothing(tmp_path: Path) -> None:
    path = topology(tmp_path)
    said = command("hosts", "install", path)
    assert (said.status, said.out) == (0, "cloud: is this machine, whose testbed this is\n")
    assert command("clean", path).out == "nothing to remove\n"
