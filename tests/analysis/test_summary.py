"""The tables hold what the rows say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from testbed import analysis
from testbed.analysis.run import load
from testbed.analysis.summary import summarise
from testbed.experiment.results import STAGES, write_json
from tests.analysis.make_run import KV_BYTES, lines, make_run, rewrite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("summary") / "run",
        profiles=("5g-good", "lte"),
        codecs=("fp16", "int8", "int4"),
    )


def test_there_is_one_row_per_cell_and_task_with_the_rows_own_statistics(run: Path) -> None:
    summary = pd.read_csv(analysis.write_summary(run))
    rows = load(run).rows
    assert len(summary) == rows.groupby(["cell", "task"]).ngroups == 2 * 5 * 2
    for _, line in summary.iterrows():
        own = rows[(rows["cell"] == line["cell"]) & (rows["task"] == line["task"])]
        assert line["n"] == line["trials"] == len(own) == 20
        assert line["score"] == pytest.approx(own["score"].mean(), rel=1e-5)
        assert line["delta_nll"] == pytest.approx(
            (own["nll"] - own["reference_nll"]).mean(), rel=1e-4, abs=1e-6
        )
        assert line["e2e_s"] == pytest.approx(own["e2e_s"].median(), rel=1e-5)
        assert line["score_lo"] <= line["score"] <= line["score_hi"]
        for stage in STAGES:
            assert line[f"{stage}_mean"] == pytest.approx(own[stage].mean(), rel=1e-5, abs=1e-9)


def test_the_ratio_is_the_full_caches_bytes_over_the_payloads(run: Path) -> None:
    summary = summarise(load(run)).set_index(["profile", "placement", "codec", "task"])
    int8 = summary.loc[("lte", "split", "int8", "needle")]
    assert int8["ratio"] == pytest.approx(KV_BYTES / int8["payload_bytes"])
    assert np.isnan(summary.loc[("lte", "edge", "", "needle")]["ratio"])


def test_failed_trials_are_counted_where_they_failed(run: Path, tmp_path: Path) -> None:
    other = make_run(
        tmp_path / "run", profiles=("lte",), codecs=("fp16", "int8"), tasks=("needle",), examples=4
    )
    rewrite(other, [r | {"error": "died" if r["codec"] == "int8" else ""} for r in lines(other)])
    summary = summarise(load(other)).set_index("codec")
    assert (summary.loc["int8", "failed"], summary.loc["int8", "n"]) == (4, 0)
    assert summary.loc["fp16", "failed"] == 0


def test_the_headline_marks_the_fastest_setting_that_keeps_95_percent(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", profiles=("lte",), codecs=("fp16", "int8", "int4"), tasks=("needle",), examples=4
    )
    scores = {"fp16": 1.0, "int8": 0.96, "int4": 0.94}
    speeds = {"fp16": 3.0, "int8": 2.0, "int4": 1.0}
    rows = [r for r in lines(run) if r["placement"] == "split"]
    changed = [
        r | {"score": scores[r["codec"]], "e2e_s": speeds[r["codec"]], "reference_score": 1.0} for r in rows
    ]
    rewrite(run, changed)
    marked = [line.split()[1] for line in analysis.headline(run).splitlines() if line.startswith("  *")]
    assert marked == ["int8"]


def test_the_headline_marks_the_fastest_that_sends_kv_beside_the_fastest_of_all(run: Path) -> None:
    text = analysis.headline(run)
    starred = [line.split()[1] for line in text.splitlines() if line.startswith("  *")]
    plus = [line.split()[1] for line in text.splitlines() if line.startswith("  +")]
    assert len(starred) == 2
    assert set(starred) <= {"cloud", "edge"}
    assert set(plus) <= {"fp16", "int8", "int4"}
    assert max(map(len, text.splitlines())) <= 110


def test_no_setting_is_marked_where_the_full_cache_scores_nothing(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", profiles=("lte",), codecs=("int8",), examples=3, score=0.0, reference_score=0.0
    )
    text = analysis.headline(run)
    assert "full cache scores nothing" in text
    assert not any(line.startswith("  *") for line in text.splitlines())


def test_rows_without_scores_still_give_a_table(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", profiles=("lte",), codecs=("int8",), examples=3, score=None, reference_score=None
    )
    text = analysis.headline(run)
    assert "full cache unknown" in text
    assert "nan" not in text


def test_caveats_are_said(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        profiles=("lte",),
        codecs=("int8",),
        examples=3,
        calibrated=False,
        reused="prefill,encode",
    )
    rewrite(run, lines(run)[:-1])
    text = analysis.headline(run)
    assert "prefill (100% of trials), encode (100% of trials)" in text
    assert "out of tolerance: lte" in text
    assert "from 5 to 6 examples" in text


def test_how_the_machine_computed_is_told_and_trials_behind_a_disturbance_are_counted(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", profiles=("lte",), codecs=("fp16",))
    assert "Compute" not in analysis.headline(path)
    rewrite(path, [row | {"compute_steady": number > 2} for number, row in enumerate(lines(path))])
    side = {"least_s": 0.1, "most_s": 0.1, "share": 0.97}
    made = [
        {"tokens": 128, "ratio": 1.0, "edge": side | {"median_s": edge}, "cloud": side | {"median_s": 0.2}}
        for edge in (0.2, 0.3)
    ]
    measurements = [one | {"complaints": said} for one, said in zip(made, ([], ["slow"]), strict=True)]
    write_json(path / "compute.json", {"format": 2, "starts": [{"measurements": measurements}]})
    told = analysis.headline(path)
    assert "took the edge 0.2 s and the cloud 0.2 s (ratio 1.00), then 1.00 to 1.50 times that" in told
    assert "97% of the time or more; 1 out of tolerance" in told
    assert f"Compute was out of tolerance before 3 of {len(lines(path))} trials." in told
    assert not summarise(load(path))["compute_steady"].all()
    write_json(path / "compute.json", {"starts": [{"measurements": [{"edge": 3}]}]})
    assert "no measurements that can be read" in analysis.headline(path)
