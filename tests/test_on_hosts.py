"""Scenarios whose nodes are machines of their own: what their topology says for them, and what they cannot ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.errors import SpecError, UsageError
from testbed.experiment import sending
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Plan
from testbed.hosts.local import Local
from testbed.net.profile.profile import MEASURED, PRESETS
from tests.command import command

LINK = "{name: access, a: edge, b: cloud, profile: measured}"
NODES = "{edge: {host: ssh://jetson, device: cuda}, cloud: {host: ssh://a100}, other: {host: local}}"
OTHER = "{name: side, a: other, b: cloud, profile: measured}"


def plan(folder: Path, written: str = LINK, **changes: Any) -> Plan:
    (folder / "real.yaml").write_text(f"nodes: {NODES}\nlinks: [{written}, {OTHER}]\n")
    given = {"name": "t", "tasks": ["needle"], "topology": str(folder / "real.yaml"), "link": "access"}
    return make_plan({**given, **changes}, "t.yaml")


def test_a_link_that_is_measured_is_the_scenarios_profile_named_or_not(tmp_path: Path) -> None:
    left_out, named = plan(tmp_path), plan(tmp_path, profiles=["measured"])
    assert left_out.profiles == named.profiles == (MEASURED,)
    cells = [made.cells(0, 256)[0].identity(made) for made in (left_out, named)]
    assert cells[0] == cells[1]
    again = make_plan(left_out.scenario.model_dump(mode="json"), "manifest.json")
    assert again.cells(0, 256)[0].identity(again) == cells[0]


def test_a_link_that_a_host_shapes_takes_profiles_or_has_its_own(tmp_path: Path) -> None:
    shaped = "{name: access, a: edge, b: cloud, profile: 5g-mid, shape: edge}"
    assert plan(tmp_path, shaped).profiles == (PRESETS["5g-mid"],)
    assert plan(tmp_path, shaped, profiles=["lte", "wan"]).profiles == (PRESETS["lte"], PRESETS["wan"])


def test_a_nodes_device_is_its_sides_unless_the_scenario_names_one(tmp_path: Path) -> None:
    device = plan(tmp_path).scenario.device
    assert (device.edge, device.cloud) == ("cuda", "auto")
    assert plan(tmp_path, device="cpu").scenario.device.edge == "cpu"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"profiles": ["5g-mid"]}, "t.yaml: profiles: .*the link is what it is"),
        ({"traffic": [{"from": "other", "to": "cloud"}]}, "traffic is for namespaces"),
        ({"emulator": "userspace"}, "emulator is for namespaces"),
        ({"links": {"side": "measured"}}, r"links\.side: its trials cross access alone"),
        ({"link": "side"}, "link side joins other and cloud, not edge and cloud"),
        ({"profiles": ["sine:5mbit..50mbit*20s"]}, "t.yaml: profiles: "),
        ({"topology": "edge-cloud"}, "t.yaml: profiles is missing"),
        ({"topology": "edge-cloud", "profiles": ["measured"]}, "measured is for links between hosts"),
    ],
)
def test_what_hosts_cannot_do_is_refused_before_any_is_asked(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SpecError, match=complaint) as refused:
        plan(tmp_path, **changes)
    assert "\n" not in str(refused.value)


def test_a_plan_says_that_a_measured_links_times_are_unknown(tmp_path: Path) -> None:
    plan(tmp_path)
    (tmp_path / "t.yaml").write_text("tasks: [needle]\ntopology: real.yaml\nlink: access\n")
    told = command("plan", str(tmp_path / "t.yaml"))
    assert told.status == 0, told.errors
    assert "unknown" in told.out


class Remote(Local):
    """A host that has what `has` names, and tells what it was given."""

    def __init__(self, has: Path | None = None) -> None:
        super().__init__()
        self.address, self.has = "ssh://there", has

    def describe(self) -> dict[str, Any]:
        return {"kind": "ssh"}

    def run(self, argv: list[str]) -> tuple[int, bytes]:
        return int(argv[-1] != str(self.has)), b""


def test_a_directory_without_files_is_refused_and_not_sent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file, and no directory of files"):
        sending.there(Remote(), str(tmp_path))


def test_what_is_too_large_to_be_sent_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "MOST_BYTES", 999)
    own = tmp_path / "own.jsonl"
    own.write_bytes(bytes(1000))
    with pytest.raises(UsageError, match=f"not sent to ssh://there; copy it there, to {own} as here"):
        sending.there(Remote(), str(own))
    assert sending.there(Remote(has=own), str(own)) == str(own)
    assert sending.there(Local(), str(own)) == str(own)
