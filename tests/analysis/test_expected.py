"""`testbed compare --expected`: what a scenario is expected to come to, held against a run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from testbed.analysis.expected import Expectation, judge, read
from testbed.analysis.run import load
from testbed.errors import SpecError
from testbed.experiment.plan import load_plan
from tests.analysis.conftest import Command
from tests.analysis.make_run import lines, make_run, write_manifest

FILES = sorted((Path(__file__).parents[2] / "scenarios" / "expected").glob("*.yaml"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(
        tmp_path_factory.mktemp("expected") / "run", ("lte", "5g-good"), ("fp16", "int8"), examples=5
    )
    write_manifest(path, name="synthetic")
    return path


def asked(path: Path, *expectations: dict[str, Any], scenario: str = "synthetic") -> Path:
    path.write_text(json.dumps({"scenario": scenario, "expectations": expectations}))
    return path


def test_figures_are_those_of_a_plain_loop(run: Path, tmp_path: Path) -> None:
    rows = lines(run)
    fp16, int8 = ([row for row in rows if row["codec"] == codec] for codec in ("fp16", "int8"))
    shares = [(row["connect_s"] + row["busy_transmit_s"]) / row["kv_bytes"] for row in int8]
    other = {(row["task"], row["example"], row["profile"]): row["e2e_s"] for row in fp16}
    ratios = [row["e2e_s"] / other[row["task"], row["example"], row["profile"]] for row in int8]
    anything = {"at_least": -1e9}
    int8_rows = 'codec == "int8"'
    file = asked(
        tmp_path / "asked.json",
        {"what": "share", "of": ["connect_s", "busy_transmit_s"], "over": ["kv_bytes"], "where": int8_rows}
        | anything,
        {"what": "ratio", "of": ["e2e_s"], "where": int8_rows, "against": 'codec == "fp16"'} | anything,
        {"what": "mean", "of": ["score"], "statistic": "mean"} | anything,
        {"what": "most", "of": ["e2e_s"], "statistic": "most"} | anything,
        {"what": "count", "of": ["failed"], "statistic": "count"} | anything,
        {"what": "none", "of": ["e2e_s"], "where": 'codec == "int2"'} | anything,
    )
    share, ratio, mean, most, count, none = judge(load(run), read(file))
    assert share.value == pytest.approx(statistics.median(shares)) and share.n == 10
    assert ratio.value == pytest.approx(statistics.median(ratios)) and ratio.n == 10
    assert mean.value == pytest.approx(statistics.fmean(row["score"] for row in rows))
    assert most.value == max(row["e2e_s"] for row in rows) and count.value == len(rows)
    assert none.n == 0 and not none.ok


@pytest.mark.parametrize(
    ("bounds", "low", "high"),
    [
        ({"value": 2.0, "within": "10%"}, 1.8, 2.2),
        ({"value": -2.0, "within": 0.5}, -2.5, -1.5),
        ({"value": 2.0, "within": "10%", "at_most": 2}, 1.8, 2),
        ({"at_least": 1, "at_most": 3}, 1, 3),
    ],
)
def test_bounds_are_of_the_value_or_by_themselves(bounds: dict[str, Any], low: float, high: float) -> None:
    assert Expectation(what="x", of=("e2e_s",), **bounds).bounds == pytest.approx((low, high))


def test_one_that_does_not_hold_is_named_and_ends_in_status_1(
    run: Path, tmp_path: Path, command: Command
) -> None:
    good = {"what": "bytes", "of": ["payload_bytes"], "where": 'placement == "edge"', "value": 0, "within": 0}
    bad = {"what": "faster than light", "of": ["e2e_s"], "at_most": 1e-6}
    status, out, _ = command("compare", run, "--expected", asked(tmp_path / "one.json", good))
    assert status == 0 and "1 of 1 expectations" in out
    status, out, _ = command("compare", run, "--expected", asked(tmp_path / "two.json", good, bad))
    assert status == 1 and any(line.startswith("FAILS  faster than light") for line in out.splitlines())
    status, out, _ = command("compare", run, "--expected", tmp_path / "two.json", "--json")
    assert status == 1 and [each["ok"] for each in json.loads(out)["expectations"]] == [True, False]


@pytest.mark.parametrize(
    ("expectation", "said"),
    [
        ({"what": "x", "of": ["e2e_s"]}, "expects nothing"),
        ({"what": "x", "of": ["e2e_s"], "value": 1}, "value and within go together"),
        ({"what": "x", "of": ["e2e_s"], "value": 1, "within": "a lot"}, "a lot"),
        ({"what": "x", "of": ["e2e_s"], "value": 1, "within": -1}, "below 0"),
        ({"what": "x", "of": [], "at_most": 1}, "of"),
        ({"what": "x", "off": ["e2e_s"], "at_most": 1}, "off"),
        ({"what": "x", "of": ["e2e"], "at_most": 1}, "did you mean 'e2e_s'"),
        ({"what": "x", "of": ["codec"], "at_most": 1}, "no column of numbers"),
        ({"what": "x", "of": ["e2e_s"], "where": "codec ==", "at_most": 1}, "--where"),
    ],
)
def test_a_wrong_file_ends_in_a_line(
    run: Path, tmp_path: Path, command: Command, expectation: dict[str, Any], said: str
) -> None:
    status, _, errors = command("compare", run, "--expected", asked(tmp_path / "asked.json", expectation))
    assert status == 2 and said in errors and len(errors.splitlines()) == 1, errors


def test_a_run_is_held_against_its_own_scenario_alone(run: Path, tmp_path: Path, command: Command) -> None:
    file = asked(tmp_path / "asked.json", {"what": "x", "of": ["e2e_s"], "at_most": 1}, scenario="another")
    assert command("compare", run, "--expected", file)[0] == 2
    assert command("compare", run)[0] == command("compare", run, run, "--expected", file)[0] == 2
    with pytest.raises(SpecError, match="No such file"):
        read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_of_a_scenario_and_counts_its_trials(path: Path) -> None:
    expected = read(path)
    plan = load_plan(path.parents[1] / path.name)
    assert plan.scenario.name == expected.scenario
    counts = [each.value for each in expected.expectations if each.statistic == "count"]
    assert counts == [plan.trials]
