"""Rows of several hosts: pairs stay within one, and what hosts differ by is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from testbed.analysis import compare, comparisons, hosts, paired_latency, report, settings
from testbed.analysis.run import load
from testbed.analysis.summary import table
from testbed.errors import UsageError
from testbed.experiment.compute import Measurement, Side, Start
from testbed.net.calibration.outcome import outcomes
from tests.analysis.conftest import Command
from tests.analysis.make_run import change, lines, make_run, rewrite, write_calibration, write_manifest

FAST, SLOW = "node-a", "node-b"


def half(row: dict[str, Any]) -> dict[str, Any]:
    """Every second example met another host, on which everything takes twice as long."""
    slow = int(row["example"].split("-")[-1]) % 2
    times = {key: row[key] * (1 + slow) for key in ("e2e_s", "ttft_s", "prefill_s")}
    return {"host": SLOW if slow else FAST, "cpu": "Some CPU", **times}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two hosts that split the examples among them."""
    path = make_run(tmp_path / "a", ("lte",), ("fp16", "int8"), tasks=("needle",), examples=12)
    change(path, half)
    starts = [
        Start(True, (Measurement("2025-01-01", 128, *[Side(s, s, s, 1.0)] * 2, None, None, None),), host)
        for host, s in ((FAST, 0.1), (SLOW, 0.2))
    ]
    (path / "compute.json").write_text(json.dumps({"starts": [start.record() for start in starts]}))
    machines = {FAST: {"shards": ["1/2"]}, SLOW: {"shards": ["2/2"]}}
    write_manifest(path, machines=machines)
    return path


def test_the_hosts_of_a_run_are_put_side_by_side(run: Path) -> None:
    fast, slow = hosts.figures(load(run))
    assert (fast.host, fast.shards, slow.host, slow.shards) == (FAST, "1/2", SLOW, "2/2")
    assert fast.trials == slow.trials and fast.examples == slow.examples == 6
    assert (fast.edge_s, slow.cloud_s) == (0.1, 0.2)
    assert fast.cells == slow.cells == 4  # of one link: two codecs, and the other placements
    assert fast.latency < 1 < slow.latency
    said = table(load(run))
    assert "Trials were made on 2 hosts" in said
    assert "Hosts are unlike: the edge computes 2.00 times as long on node-b as on node-a." in said
    assert "Some CPU" in said and "Compute, measured" not in said
    assert "The hosts, side by side" in report.render(load(run), [])


def test_of_one_host_nothing_is_said(run: Path) -> None:
    change(run, lambda row: {"host": FAST})
    assert hosts.text(load(run)) == "" and hosts.caveats(load(run)) == []


def test_settings_are_paired_within_the_host_that_made_most_of_an_examples_trials(run: Path) -> None:
    rows = lines(run)
    moved = [
        r | {"host": SLOW, "e2e_s": 9.0} if r["codec"] == "int8" and r["host"] == FAST else r for r in rows
    ]
    rewrite(run, moved)
    ((_, own),) = settings.panels(load(run).rows)
    ratios = {ratio.setting: ratio.ratio for ratio in paired_latency.ratios(own, "fp16")}
    assert ratios["int8"].n == 6 and ratios["cloud"].n == 12
    against = {each.setting: each for each in comparisons.against(load(run), "fp16")}
    assert against["int8"].nll.n == 6 and against["cloud"].nll.n == 12
    assert "6 of 12 examples met several hosts" in " ".join(hosts.caveats(load(run)))


def test_rows_whose_host_nobody_knows_are_paired_as_ever(run: Path) -> None:
    change(run, lambda row: {"host": ""} if row["codec"] == "int8" else {})
    ((_, own),) = settings.panels(load(run).rows)
    assert {ratio.ratio.n for ratio in paired_latency.ratios(own, "fp16")} == {12}


def test_two_runs_whose_examples_met_unlike_hosts_are_compared_on_request_only(
    run: Path, tmp_path: Path, command: Command
) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("fp16",), tasks=("needle",), examples=12)
    change(other, lambda row: {"host": FAST, "cpu": "Some CPU"})
    with pytest.raises(UsageError, match=r"6 of 12 examples in both on another host: .* --across-hosts"):
        compare.compare(load(run), load(other))
    assert command("compare", run, other)[0] == 2
    status, said, _ = command("compare", run, other, "--across-hosts")
    assert status == 0
    assert f"host: {FAST}, {SLOW} → {FAST}" in said
    assert {line.ratio.n for line in compare.compare(load(run), load(other), across_hosts=True)} == {12}


def test_two_runs_of_the_same_hosts_are_compared_within_each(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("fp16",), tasks=("needle",), examples=12)
    change(other, half)
    assert {line.ratio.n for line in compare.compare(load(run), load(other))} == {12}


def test_a_host_of_the_same_name_with_another_processor_is_another(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("fp16",), tasks=("needle",), examples=12)
    change(other, lambda row: half(row) | {"cpu": "Another CPU"})
    with pytest.raises(UsageError, match=r"node-a \(Some CPU\).* node-a \(Another CPU\)"):
        compare.compare(load(run), load(other))


def test_each_hosts_links_are_told_apart(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", ("lte",), ("fp16",), examples=2)
    write_calibration(path, ("lte",))
    record = json.loads((path / "calibration.json").read_text())
    (one,) = record["measurements"]
    assert [each.label for each in outcomes(record)] == ["lte"]
    record["measurements"] = [one | {"host": host} for host in (FAST, SLOW, FAST)]
    assert [each.label for each in outcomes(record)] == ["lte · node-a", "lte · node-b"]
    record["measurements"] = [one, one | {"host": FAST}]  # an older run, resumed
    assert [each.label for each in outcomes(record)] == ["lte"]
