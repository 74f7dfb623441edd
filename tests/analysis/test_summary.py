"""The tables hold what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from testbed.analysis.describe import subject
from testbed.analysis.run import load
from testbed.analysis.settings import is_exact, labelled
from testbed.analysis.summary import summarise, table, write
from testbed.experiment import compute
from testbed.experiment.compute import Measurement, Side, Start
from testbed.experiment.results import write_json
from testbed.experiment.row import STAGES
from tests.analysis.make_run import KV_BYTES, change, headline, lines, make_run, rewrite
from tests.command import command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("summary") / "run", ("5g-good", "lte"), ("fp16", "int8", "int4"))


def test_there_is_one_row_per_cell_and_task_with_the_rows_own_statistics(run: Path) -> None:
    summary = pd.read_csv(write(load(run)))
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


def test_a_delivery_that_is_not_whole_makes_another_setting(tmp_path: Path) -> None:
    other = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), tasks=("needle",), examples=4)
    change(other, lambda row: {"delivery": "halves(wait=0.2)"} if row["codec"] == "int8" else {})
    rows = load(other)
    assert set(labelled(rows.rows)["setting"]) == {"fp16", "int8 · halves(wait=0.2)", "cloud", "edge"}
    assert summarise(rows).set_index("codec").loc["int8", "delivery"] == "halves(wait=0.2)"


def test_failed_trials_are_counted_where_they_failed(tmp_path: Path) -> None:
    other = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), tasks=("needle",), examples=4)
    change(other, lambda row: {"error": "died"} if row["codec"] == "int8" else {})
    summary = summarise(load(other)).set_index("codec")
    assert (summary.loc["int8", "failed"], summary.loc["int8", "n"]) == (4, 0)
    assert summary.loc["fp16", "failed"] == 0


def marked(run: Path, mark: str) -> list[str]:
    """The settings of the terminal's table that have this mark."""
    return [line.split()[1] for line in headline(run).splitlines() if line.startswith(f"  {mark}")]


def test_the_headline_marks_the_fastest_setting_that_keeps_95_percent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("fp16", "int8", "int4"), ("split",), ("needle",), examples=4)
    scores = {"fp16": 1.0, "int8": 0.96, "int4": 0.94}
    speeds = {"fp16": 3.0, "int8": 2.0, "int4": 1.0}
    change(run, lambda r: {"score": scores[r["codec"]], "e2e_s": speeds[r["codec"]], "reference_score": 1.0})
    assert marked(run, "*") == ["int8"]


def test_the_headline_marks_the_fastest_that_sends_kv_beside_the_fastest_of_all(run: Path) -> None:
    starred = marked(run, "*")
    assert len(starred) == 2
    assert set(starred) <= {"cloud", "edge"}
    assert set(marked(run, "+")) <= {"fp16", "int8", "int4"}


@pytest.mark.parametrize("width", [80, 120])
def test_the_headline_keeps_within_the_terminal_names_every_n_and_ends_with_the_result(
    wide: Path, width: int
) -> None:
    said = table(load(wide), width)
    assert max(map(len, said.splitlines())) <= width
    *_, result = said.split("\n\n")
    assert result.startswith("fastest with at least 95% of the full cache's quality")
    panels = load(wide).rows["profile"].nunique()
    assert len([line for line in result.splitlines()[2:] if " 4" in line]) == panels  # n = 4 in each


def test_a_runs_summary_is_printed_again_and_as_json(run: Path) -> None:
    asked = command("summary", str(run))
    assert (asked.status, asked.out) == (0, headline(run) + "\n")
    value = json.loads(command("summary", str(run), "--json").out)
    assert len(value["cells"]) == 20 and {cell["n"] for cell in value["cells"]} == {20}
    assert "lte" not in command("summary", str(run), "--where", "profile == '5g-good'").out


@pytest.mark.parametrize(
    ("score", "said"),
    [(0.0, "full cache scores nothing"), (None, "no answer has a score: no setting to choose")],
)
def test_no_setting_is_marked_where_the_full_cache_scores_nothing_or_nobody_knows(
    tmp_path: Path, score: float | None, said: str
) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("int8",), examples=3, score=score, reference_score=score)
    text = headline(run)
    assert said in text
    assert "nan" not in text
    assert marked(run, "*") == []


def test_of_an_unknown_full_cache_nobody_says_that_it_scores_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("int8",), examples=3, reference_score=None)
    text = headline(run)
    assert "full cache unknown" in text and "the full cache's score is unknown: no setting to choose" in text
    assert "scores nothing" not in text


def test_a_shape_has_no_score_and_whoever_is_asked_for_one_says_why(tmp_path: Path) -> None:
    # The kind: rows of stand-in values, whose quality nobody knows, and which nobody may call zero or missing.
    run = make_run(
        tmp_path / "run",
        ("5g-good", "5g-mid", "lte"),
        ("fp16", "int4"),
        tasks=("passages",),
        examples=3,
        model="shape:llama-3.1-8b",
        edge_device="a",
        cloud_device="b",
        **dict.fromkeys(("score", "em", "f1", "nll", "kl", "reference_nll", "reference_score")),
    )
    why = "values stand in, so a shape has no score"
    said = headline(run)
    assert said.count(f"no loss · {why}\n") == 1 and said.count(f"({why}: no setting to choose)") == 3
    assert marked(run, "*") == marked(run, "+") == []
    advice = command("recommend", str(run), "--rate", "10mbit", "--delay", "35ms", "--loss", "0.5%")
    assert (
        advice.status == 0
        and f"{why}: only what is the full cache's by construction can be chosen" in advice.out
    )
    assert f"passages is left out: {why}" in command("claims", str(run)).out
    assert why in command("plot", str(run), "regimes").errors
    assert why in command("plot", str(run), "latency_quality").errors
    texts = [said, command("compare", str(run), str(run)).out, advice.out]
    for wrong in ("scores nothing", "unknown", "not compared", "nan", "no common examples"):
        assert not any(wrong in text.replace("settings unknown", "") for text in texts), wrong


def test_of_two_models_both_are_named_and_the_edges_answers_are_not_the_full_caches(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", ("lte",), ("int8",), ("cloud", "edge"), ("needle",), examples=3, edge_model="small"
    )
    change(run, lambda r: {"nll": r["reference_nll"]})  # as near as can be
    rows = labelled(load(run).rows)
    assert is_exact(rows[rows["placement"] == "cloud"]) and not is_exact(rows[rows["placement"] == "edge"])
    assert subject(rows).startswith("smollm2-135m (edge: small) · needle")


def test_caveats_are_said(tmp_path: Path) -> None:
    odd = {"calibrated": False, "reused": "prefill,encode"}
    run = make_run(tmp_path / "run", ("lte",), ("int8",), examples=3, **odd)
    rewrite(run, lines(run)[:-1])
    text = headline(run)
    assert "prefill (100% of trials), encode (100% of trials)" in text
    assert "out of tolerance: lte" in text
    assert "from 5 to 6 examples" in text


def test_how_the_machine_computed_is_told_and_trials_beside_a_disturbance_are_counted(tmp_path: Path) -> None:
    """Of measurements at 12:00 and 12:10 the second complains: a trial between them does not know of it yet."""
    path = make_run(tmp_path / "run", ("lte",), ("fp16",), ("split",), ("needle",), examples=4)
    assert "Compute" not in headline(path)
    minutes = iter((1, 9, 10, 11))
    change(path, lambda row: {"started_at": f"2025-01-01T12:{next(minutes):02}:00.500+00:00"})
    first, second = (
        Measurement(
            f"2025-01-01T12:{at}:00.000+00:00", 128, Side(edge, 0.1, 0.4, 0.97), Side(0.2, 0.1, 0.4, None), 0.5, None, 0.0, off
        )
        for at, edge, off in (("00", 0.2, ()), ("10", 0.3, ("slow",)))
    )  # fmt: skip
    starts = [Start(True, (first, second)), Start(False, (first,))]
    record = json.loads(json.dumps([start.record() for start in starts]))
    assert compute.starts([{}, 3, *record]) == tuple(starts)
    write_json(path / "compute.json", {"format": 3, "starts": record[:1]})
    said = headline(path)
    assert "took the edge 0.2 s and the cloud 0.2 s (ratio 1.00), then 1.00 to 1.50 times that" in said
    assert "97% of the time or more; 1 out of tolerance" in said
    assert "Compute was out of tolerance before or behind 2 of 4 trials." in said
    assert not summarise(load(path))["compute_steady"].all()
