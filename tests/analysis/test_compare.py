"""Two runs, and each setting against a baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from testbed.analysis import compare, comparisons
from testbed.analysis.run import load
from testbed.cli import main
from testbed.errors import UsageError
from testbed.experiment.runner import other_threads
from tests.analysis.make_run import lines, make_run, rewrite


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a", ("lte", "5g-mid"), ("fp16", "int8"), tasks=("needle",), examples=12)


def test_matching_examples_are_compared_pair_by_pair(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("int8",), tasks=("needle",), examples=12)
    rows = {(r["codec"], r["placement"], r["example"]): r for r in lines(run) if r["profile"] == "lte"}
    changed = [
        rows[r["codec"], r["placement"], r["example"]]
        | {"e2e_s": 2 * rows[r["codec"], r["placement"], r["example"]]["e2e_s"]}
        for r in lines(other)
    ]
    rewrite(other, changed)
    found = compare.compare(load(run), load(other))
    assert {(f.panel, f.setting) for f in found} == {("lte", "int8"), ("lte", "cloud"), ("lte", "edge")}
    for one in found:
        assert one.ratio.value == pytest.approx(2.0)
        assert one.ratio.n == 12
        assert one.score.value == one.nll.value == 0.0
        assert one.p < 0.01


def test_runs_without_the_same_examples_are_compared_unpaired(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("int8",), tasks=("needle",), examples=4)
    rewrite(other, [r | {"example": f"other-{r['example']}"} for r in lines(other)])
    found = compare.compare(load(run), load(other))
    assert all(one.ratio.n == 0 for one in found)
    assert "unpaired" in compare.text(load(run), load(other), found)


def test_runs_with_nothing_in_common_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("5g-good",), ("int8",), tasks=("needle",), examples=4)
    with pytest.raises(UsageError, match="no setting on the same link in common"):
        compare.compare(load(run), load(other))


def test_the_command_line_compares(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(run), str(run)])
    assert ended.value.code == 0
    assert "1.00 [1.00, 1.00]" in capsys.readouterr().out


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
    rewrite(
        run,
        [
            r | {"score": 0.0, "nll": r["reference_nll"] + 1} if r["example"] == "needle-0" else r
            for r in lines(run)
        ],
    )
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


def test_a_trial_that_failed_in_one_run_is_slower_there(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("int8",), ("split",), tasks=("needle",), examples=12)
    late = {f"needle-{i}" for i in range(7)}
    rewrite(
        other, [r | {"error": "timed out", "e2e_s": 0.0} if r["example"] in late else r for r in lines(other)]
    )
    (found,) = compare.compare(load(run), load(other))
    assert found.ratio.value == found.latency[1].value == float("inf")
    assert found.ratio.n == 12


def test_runs_that_were_computed_in_unlike_numbers_of_threads_are_said_to_be(
    run: Path, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("int8",), tasks=("needle",), examples=4)
    before = compare.differences(load(run), load(other))
    rewrite(run, [r | {"threads": 1} for r in lines(run)])
    rewrite(other, [r | {"threads": 2} for r in lines(other)])
    said = [line for line in compare.differences(load(run), load(other)) if line not in before]
    assert said == ["threads: 1 → 2"]


def test_a_run_that_goes_on_in_another_number_of_threads_says_so() -> None:
    assert other_threads([], 2) == other_threads([{"threads": 2}, {"threads": None}, {}], 2) == ""
    said = other_threads([{"threads": 1}, {"threads": 2}], 2)  # also when it was so at the start before
    assert said.startswith("computed in 2 threads, earlier trials of this run in 1:")


def test_what_was_set_and_used_alike_is_said_once(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", ("lte",), ("int8",), tasks=("needle",), examples=4)
    for path, threads in ((run, 1), (other, 2)):
        rewrite(path, [r | {"threads": threads} for r in lines(path)])
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["settings"] = {"threads": threads}
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert compare.differences(load(run), load(other)).count("threads: 1 → 2") == 1
