"""Runs without a link: the answers and bytes of a run over one, and no word of times."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pandas.testing import assert_frame_equal

from benchmarks.publish import publish
from testbed.analysis import claims, compare
from testbed.analysis.figures import FIGURES, NotInThisRun, figure
from testbed.analysis.recommend import recommend
from testbed.analysis.run import load
from testbed.errors import SpecError, UsageError
from testbed.experiment.plan import load_plan
from testbed.experiment.row import COLUMNS, TIMES
from tests.command import Ended, command
from tests.runs import SCENARIO, rows, run, undrawn, unmeasured

pytestmark = pytest.mark.usefixtures("own_state")

#: What a setting does to an answer, whatever lies between edge and cloud.
SAME = (
    "task", "example", "context_tokens", "kv_bytes", "payload_bytes", "payload_digest", "tokens_kept", "kept_digest", "answer",
    "answer_tokens", "score", "em", "f1", "nll", "kl", "reference_answer", "reference_score", "reference_nll", "error",
)  # fmt: skip
EVERY = [
    "fp16", "int8", "q2c@0.25+int4", "q2c@0.25(scope=global, layers=last, sinks=0, pool=1)+int8", "snapkv@0.5+int4",
    "h2o@0.5+int8", "random@0.5+int8+zstd", "mixed(high=16, protect=0, scale=token)", "delta(loop=open)+int4",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenario(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "tiny.yaml"
    path.write_text(SCENARIO + f"model: {tiny_model('llama')}\n")
    return path


def free(*arguments: str, **settings: Any) -> Ended:
    """Such a run, whatever anybody may do as root."""
    with patch("testbed.cli.run.require_root", side_effect=AssertionError("nobody has to be root")):
        return run(*arguments, "--placement-free", **settings)


@pytest.fixture(scope="module")
def unlinked(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, once."""
    out = tmp_path_factory.mktemp("unlinked") / "out"
    done = free(str(scenario), "--out", str(out))
    assert done.status == 0, done.errors
    return out


@pytest.mark.netns
@pytest.mark.slow
def test_answers_and_bytes_are_those_of_a_run_over_a_link(scenario: Path, tmp_path: Path) -> None:
    changes: Any = {
        "codecs": EVERY,
        "placements": ["split", "store", "cloud", "edge"],
        "delivery": ["whole", "stream"],
    }
    with unmeasured():
        assert run(str(scenario), "--out", str(tmp_path / "linked"), **changes).status == 0
        assert free(str(scenario), "--out", str(tmp_path / "free"), **changes).status == 0
    over, without = (
        {_of(row): [row[key] for key in SAME] for row in rows(tmp_path / k)} for k in ("linked", "free")
    )
    assert without.keys() == {key for key in over if key[0] != "store"}
    assert all(over[key] == found for key, found in without.items())
    stored = {key: found for key, found in over.items() if key[0] == "store"}
    assert all(
        found == over["split", *key[1:]] for key, found in stored.items()
    )  # so they need no rows of their own
    lines = compare.compare(load(tmp_path / "linked"), load(tmp_path / "free"))
    assert {line.panel for line in lines} == {compare.ANSWERS}
    assert all(line.nll.value == line.score.value == 0 and line.nll.n == 2 for line in lines)


def _of(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["placement"], row["codec"], row["delivery"], row["example"]


class TestItsRows:
    def test_are_one_for_each_setting_and_example_whatever_the_links(self, unlinked: Path) -> None:
        found = rows(unlinked)
        assert len(found) == len({row["trial"] for row in found}) == 2 * (5 + 1 + 1)
        assert all(set(row) == set(COLUMNS) and not row["error"] for row in found)

    def test_say_that_there_was_no_link_and_have_no_times(self, unlinked: Path) -> None:
        for row in rows(unlinked):
            assert (row["profile"], row["emulator"], row["transport"]) == ("placement-free", "none", "")
            assert [row[column] for column in TIMES] == [None] * len(TIMES)
            assert row["answer_tokens"] is not None and row["nll"] is not None
        assert not (unlinked / "spans.jsonl").exists()

    def test_are_told_apart_by_the_manifest(self, unlinked: Path) -> None:
        manifest = json.loads((unlinked / "manifest.json").read_text())
        assert manifest["settings"]["placement_free"] is True
        assert manifest["emulator"] == "none"

    def test_come_back_in_a_run_that_is_taken_up_again(self, unlinked: Path, tmp_path: Path) -> None:
        cut = Path(shutil.copytree(unlinked, tmp_path / "cut"))
        lines = (cut / "trials.jsonl").read_bytes().splitlines(keepends=True)
        (cut / "trials.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
        with undrawn(), patch("testbed.cli.run.require_root", side_effect=AssertionError):
            assert run("--resume", str(cut)).status == 0
        before, after = (
            {row["trial"]: [row[key] for key in SAME] for row in rows(path)} for path in (unlinked, cut)
        )
        assert after == before

    def test_of_shards_are_those_of_the_whole(self, scenario: Path, unlinked: Path, tmp_path: Path) -> None:
        with undrawn():
            for shard in ("1/2", "2/2"):
                assert free(str(scenario), "--shard", shard, "--out", str(tmp_path / "run")).status == 0
            assert command("merge", str(tmp_path / "run")).status == 0
        merged, whole = (
            {row["trial"]: [row[key] for key in SAME] for row in rows(p)}
            for p in (tmp_path / "run", unlinked)
        )
        assert merged == whole

    def test_of_a_scout_say_what_it_chose_and_not_when(self, scenario: Path, tmp_path: Path) -> None:
        with undrawn():
            done = free(
                str(scenario), "--out", str(tmp_path / "scout"),
                placements=["scout"], codecs=["q2c@0.25(scope=global)"], examples=1,
            )  # fmt: skip
        assert done.status == 0, done.errors
        for row in rows(tmp_path / "scout"):
            assert row["choice_overlap"] == 1 and row["payload_bytes"] > 0
            assert row["e2e_s"] is None and row["busy_transmit_s"] is None


class TestWhatReadsThem:
    def test_draws_what_needs_no_times_and_says_of_the_rest_why_not(self, unlinked: Path) -> None:
        read = load(unlinked)
        assert not read.gaps()
        drawn = set()
        for name in FIGURES:
            try:
                figure(name, read)
                drawn.add(name)
            except NotInThisRun:
                pass
        assert drawn == {"retention", "rate_distortion"}
        with pytest.raises(NotInThisRun, match=r"without a link.*no times, and ttft is of times"):
            figure("ttft", read)

    def test_reports_quality_and_bytes_alone(self, unlinked: Path) -> None:
        page = (unlinked / "report.html").read_text()
        assert "Made without a link (placement-free)" in page
        assert "latency (s)" not in page and "payload (B)" in page
        said = command("report", str(unlinked))
        assert said.status == 0 and "missing" not in said.errors

    def test_judges_no_claim_on_times(self, unlinked: Path) -> None:
        judged, _ = claims.judge([load(unlinked)])
        verdicts = {claim.name: found for claim, found in judged}
        assert (
            not verdicts["transmission-dominates"]
            and not verdicts["q2c-free"]
            and not verdicts["kv-worth-sending"]
        )
        assert verdicts["entropy-coding-saves"] == []

    def test_recommends_nothing(self, unlinked: Path) -> None:
        asked = command("recommend", str(unlinked), "--rate", "40mbit", "--delay", "20ms")
        assert asked.status == 2 and "run it over a link" in asked.errors
        with pytest.raises(UsageError, match="no times"):
            recommend(load(unlinked), None)  # type: ignore[arg-type]


class TestAScenario:
    def test_is_planned_without_links(self, scenario: Path) -> None:
        said = command("plan", str(scenario), "--placement-free")
        assert said.status == 0, said.errors
        assert "14 trials of 7 cells, in one process, without a link" in said.out

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"load": "poisson(rate=1/s)"}, "load: poisson.*who waits for whom"),
            ({"delivery": ["progressive"], "codecs": ["planes"]}, "delivery: what progressive.* depends on the link.*take whole"),
            ({"model": "shape:llama-3.1-8b"}, "model: shape:llama-3.1-8b answers nothing"),
        ],
    )  # fmt: skip
    def test_of_nothing_but_times_is_refused(self, scenario: Path, changes: dict[str, Any], why: str) -> None:
        given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        with pytest.raises(SpecError, match=why):
            load_plan(str(scenario), assignments=given, placement_free=True)

    def test_names_what_it_leaves_out(self, scenario: Path) -> None:
        deliveries = 'delivery=["whole", "meet(chunk=64)"]'
        plan = load_plan(str(scenario), assignments=[deliveries], placement_free=True)
        assert [str(delivery) for delivery in plan.scenario.delivery] == ["whole"]
        assert len(plan.left_out) == 1 and "meet(chunk=64)" in plan.left_out[0]

    def test_has_no_link_that_could_be_put_under_a_profile(self, scenario: Path) -> None:
        said = command("plan", str(scenario), "--placement-free", "--link", "access=5g-mid")
        assert said.status == 2 and "placement-free has no links" in said.errors

    def test_that_is_unlinked_already_is_planned_as_it_is(self, scenario: Path) -> None:
        plan = load_plan(str(scenario), placement_free=True)
        again = load_plan(str(scenario), assignments=["placement_free=true"])
        assert again.scenario == plan.scenario
        assert [cell.identity(again) for cell in again.cells(0, 300)] == [
            c.identity(plan) for c in plan.cells(0, 300)
        ]


def test_published_rows_are_those_of_the_run_in_less_room_and_without_its_paths(
    unlinked: Path, tmp_path: Path
) -> None:
    assert publish(unlinked, tmp_path / "kept") == 14
    first, second = load(unlinked), load(tmp_path / "kept")
    assert not second.gaps() and second.scenario == first.scenario
    said = ["started_at", "host"]
    order = ["trial"]
    assert_frame_equal(
        first.rows.drop(columns=said).sort_values(order, ignore_index=True),
        second.rows.drop(columns=said).sort_values(order, ignore_index=True),
    )
    assert set(second.rows["host"]) == {""}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"manifest.json", "trials.parquet"}
    assert "command" not in second.manifest
    verdicts = [[(claim.name, found) for claim, found in claims.judge([run])[0]] for run in (first, second)]
    assert str(verdicts[0]) == str(verdicts[1])  # in which NaN is itself
    first.rows.iloc[:3].to_parquet(tmp_path / "kept" / "trials.parquet")
    assert load(tmp_path / "kept").gaps() == ["trials.jsonl is missing"]
