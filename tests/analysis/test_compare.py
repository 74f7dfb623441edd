"""Two runs, and each setting against a baseline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from testbed.analysis import compare, comparisons
from testbed.analysis.run import load
from testbed.errors import UsageError
from testbed.experiment.runner import other_threads
from tests.analysis.conftest import Command
from tests.analysis.make_run import change, lines, make_run, rewrite, write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a", ("lte", "5g-mid"), ("fp16", "int8"), tasks=("needle",), examples=12)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return make_run(tmp_path / "b", ("lte",), ("int8",), tasks=("needle",), examples=12)


def test_matching_examples_are_compared_pair_by_pair(run: Path, other: Path) -> None:
    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["codec"], row["placement"], row["example"]

    rows = {key(row): row for row in lines(run) if row["profile"] == "lte"}
    change(other, lambda row: rows[key(row)] | {"e2e_s": 2 * rows[key(row)]["e2e_s"]})
    found = compare.compare(load(run), load(other))
    assert {(f.panel, f.setting) for f in found} == {("lte", "int8"), ("lte", "cloud"), ("lte", "edge")}
    for line in found:
        assert line.ratio.value == pytest.approx(2.0)
        assert line.ratio.n == 12
        assert line.score.value == line.nll.value == 0.0
        assert line.p < 0.01


def test_runs_without_the_same_examples_are_compared_unpaired(run: Path, other: Path) -> None:
    change(other, lambda row: {"example": f"other-{row['example']}"})
    found = compare.compare(load(run), load(other))
    assert all(line.ratio.n == 0 for line in found)
    assert "unpaired" in compare.text(load(run), load(other), found)


def test_a_run_is_not_better_for_what_failed_in_it(run: Path, tmp_path: Path) -> None:
    """Half of the answers are wrong in both runs; in the second one those requests failed."""
    wrong = [f"needle-{i}" for i in range(6)]
    rewrite(run, [r | {"score": float(r["example"] not in wrong)} for r in lines(run)])
    other = make_run(tmp_path / "b", ("lte",), ("int8",), ("split",), tasks=("needle",), examples=12)
    made = [r | {"score": 1.0} for r in lines(other)]
    rewrite(other, [r | {"error": "timed out"} if r["example"] in wrong else r for r in made])
    (one,) = compare.compare(load(run), load(other))
    assert one.quality[0].value == one.quality[1].value == 1.0
    assert "B failed 6 of 12" in compare.text(load(run), load(other), [one])


def test_runs_with_nothing_in_common_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("5g-good",), ("int8",), tasks=("needle",), examples=4)
    with pytest.raises(UsageError, match="no setting on the same link in common"):
        compare.compare(load(run), load(other))


def test_the_command_line_compares(run: Path, command: Command) -> None:
    status, out, _ = command("compare", run, run)
    assert status == 0
    assert "1.00 [1.00, 1.00]" in out


def test_an_example_on_several_links_is_one_observation(run: Path) -> None:
    found = {f.setting: f for f in comparisons.against(load(run))}
    assert found["int8"].nll.n == 12
    rows = load(run).rows
    own = rows[rows["codec"] == "int8"]
    expected = (own["nll"] - own["reference_nll"]).mean()
    assert found["int8"].nll.value == pytest.approx(expected)


def test_a_baseline_may_be_any_setting(run: Path) -> None:
    found = {f.setting: f for f in comparisons.against(load(run), "fp16")}
    assert set(found) == {"int8", "cloud", "edge"}
    means = load(run).rows.groupby("codec")["nll"].mean()
    assert found["int8"].nll.value == pytest.approx(means["int8"] - means["fp16"])
    with pytest.raises(UsageError, match="no setting 'int2'; choose from full cache, fp16"):
        comparisons.against(load(run), "int2")


def test_the_comparisons_are_written_as_a_table(run: Path) -> None:
    text = comparisons.write(load(run)).read_text()
    assert text.startswith("model,link,task,setting,baseline,n,score_diff,")
    assert np.isfinite(comparisons.frame(comparisons.against(load(run)))["nll_diff"]).all()


def test_the_table_has_the_answers_lost_and_the_share_of_examples_lost(run: Path) -> None:
    wrong = {"needle-0"}
    change(run, lambda r: {"score": 0.0, "nll": r["reference_nll"] + 1} if r["example"] in wrong else {})
    table = pd.read_csv(comparisons.write(load(run)))
    own = table[(table["link"] == "all") & (table["setting"] == "fp16")].iloc[0]
    right = [
        r
        for r in lines(run)
        if r["codec"] == "fp16" and r["profile"] == "lte" and r["reference_score"] >= 0.5
    ]
    assert own["lost"] == sum(r["score"] < 0.5 for r in right)
    assert own["lost_share"] == pytest.approx(1 / 12)
    assert not own["lossless"]


def test_a_trial_that_failed_in_one_run_is_slower_there(run: Path, other: Path) -> None:
    late = {f"needle-{i}" for i in range(7)}
    change(other, lambda row: {"error": "timed out", "e2e_s": 0.0} if row["example"] in late else {})
    found = next(line for line in compare.compare(load(run), load(other)) if line.setting == "int8")
    assert found.ratio.value == found.latency[1].value == float("inf")
    assert found.ratio.n == 12


def test_runs_that_were_computed_in_unlike_numbers_of_threads_are_said_to_be_once(
    run: Path, other: Path
) -> None:
    before = compare.differences(load(run), load(other))
    for path, threads in ((run, 1), (other, 2)):
        change(path, lambda row, threads=threads: {"threads": threads})
    assert set(compare.differences(load(run), load(other))) - set(before) == {"threads: 1 → 2"}
    for path, threads in ((run, 1), (other, 2)):  # what was set and used alike is said once
        write_manifest(path, settings={"threads": threads})
    assert compare.differences(load(run), load(other)).count("threads: 1 → 2") == 1


def test_a_run_that_goes_on_in_another_number_of_threads_says_so() -> None:
    assert other_threads([], 2) == other_threads([{"threads": 2}, {"threads": None}, {}], 2) == ""
    said = other_threads([{"threads": 1}, {"threads": 2}], 2)  # also when it was so at the start before
    assert said.startswith("computed in 2 threads, earlier trials of this run in 1:")


def rare(share: float, loss: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, n: rng.normal(0, 0.01, n) + loss * (rng.random(n) < share)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "n", "least", "most"),
    [
        # means above the margin: they pass only where the sample holds no such loss, or next to none
        *((rare(0.04, 1.0), n, 0.0, 0.96**n + 0.05) for n in (50, 100)),
        *((rare(0.1, 0.25), n, 0.0, 0.025) for n in (50, 100)),
        (rare(0.02, 2.0), 100, 0.0, 0.98**100 + 0.05),
        # what only rounds is shown to by fifty examples, and not by thirty
        (lambda rng, n: rng.normal(0.002, 0.015, n), 50, 0.95, 1.0),
        (lambda rng, n: rng.normal(0.002, 0.015, n), 30, 0.0, 0.0),
    ],
)
def test_how_often_the_rule_of_what_is_lossless_lets_a_loss_pass(
    lost: Callable[[np.random.Generator, int], np.ndarray], n: int, least: float, most: float
) -> None:
    rng, passed = np.random.default_rng(n), 0
    columns = {"nll_base": 0.0, "score": 1.0, "score_base": 1.0, "kl": 0.0, "task": "qa"}
    for _ in range(150):
        pairs = pd.DataFrame({"nll": lost(rng, n), "example": list(map(str, range(n))), **columns})
        passed += comparisons.compare(pairs, "m", "qa", "codec", comparisons.FULL).lossless
    assert least <= passed / 150 <= most
