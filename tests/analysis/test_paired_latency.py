"""Latencies are compared example by example; what is not told apart is a tie, everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from testbed.analysis import comparisons, paired_latency, recommend, settings
from testbed.analysis.latency_model import Link
from testbed.analysis.run import load
from testbed.analysis.summary import summarise
from tests.analysis.make_run import change, headline, make_run
from tests.analysis.test_figures import drawn, texts, words


def _rows(**times: np.ndarray) -> pd.DataFrame:
    """Settings' latencies on examples 0, 1, …"""
    parts = [
        pd.DataFrame(
            {"setting": name, "latency_s": own, "example": [str(i) for i in range(len(own))], "task": "qa"}
        )
        for name, own in times.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_a_ratio_is_the_median_of_the_examples_and_its_test_is_scipys() -> None:
    rng = np.random.default_rng(1)
    base = rng.lognormal(0, 1, 15)
    slow = base * rng.lognormal(0.1, 0.1, 15)
    (found,) = paired_latency.ratios(_rows(base=base, slow=slow), "base")
    assert found.ratio.value == pytest.approx(np.median(slow / base))
    assert found.p == pytest.approx(reference.wilcoxon(np.log(slow / base)).pvalue)
    ordered = np.sort(slow / base)
    assert (found.ratio.low, found.ratio.high) == (ordered[3], ordered[11])  # Conover: 4th and 12th of 15


def test_examples_that_differ_much_do_not_hide_a_setting_that_is_always_slower() -> None:
    base = np.random.default_rng(2).lognormal(0, 1, 12)
    rows = _rows(base=base, slower=1.1 * base, same=base)
    slower, same = paired_latency.ratios(rows, "base")
    assert slower.differs
    assert not same.differs
    assert paired_latency.tied(rows, "base", ["base", "slower", "same"]) == ["same"]


def test_a_request_that_failed_is_slower_than_any() -> None:
    base = np.full(8, 1.0)
    fails = np.r_[np.full(5, np.inf), np.full(3, 0.9)]
    (found,) = paired_latency.ratios(_rows(base=base, fails=fails), "base")
    assert found.ratio.value == np.inf
    both = paired_latency.ratios(_rows(base=fails, fails=fails), "base")[0]
    assert both.ratio.value == 1.0


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Edge and cloud take as long on every link, by one computation; fp16 is ten times slower."""
    run = make_run(tmp_path / "run", ("5g-good", "lte"), ("fp16",), tasks=("needle",), examples=12)
    rng = np.random.default_rng(3)

    def timed(row: dict[str, Any]) -> dict[str, Any]:
        time = float({"split": 10, "cloud": 1.15, "edge": 1.0}[row["placement"]] * rng.lognormal(0, 0.5))
        return {"e2e_s": time, "ttft_s": time, "score": 1.0, "reference_score": 1.0}

    return change(run, timed)


def test_ties_are_ties_in_terminal_figures_and_tables_alike(alike: Path) -> None:
    text = headline(alike)
    assert text.count("\n  = ") == 2  # cloud or edge, on either link
    assert sum("tied: " in text for text in texts(drawn("regimes", alike))) == 2
    assert "Dotted ring" in words("latency_quality", alike)
    table = summarise(load(alike)).set_index(["profile", "placement"])
    assert (table["latency_baseline"] == "cloud").all()
    assert (table.loc[(slice(None), "edge"), "latency_p_holm"] > 0.05).all()
    assert (table.loc[(slice(None), "split"), "latency_p_holm"] < 0.05).all()
    written = pd.read_csv(comparisons.write(load(alike)))
    own = written[written["link"] == "lte"].set_index("setting")
    assert own.loc["edge", "baseline"] == "cloud"
    assert own.loc["fp16", "latency_ratio_lo"] > 1
    assert "lte · end-to-end latency over that of cloud" in comparisons.latency_text(load(alike))


def test_a_recommendation_on_a_measured_link_names_ties(alike: Path) -> None:
    found = recommend.recommend(load(alike), Link(10e6, 0.035, 0.035, 0.005))
    assert found.measured_as == "lte" and found.choice is not None
    (other,) = {"cloud", "edge"} - {found.choice.setting}
    assert found.tied == (other,)
    said = recommend.text(found)
    assert f"not shown to be slower than it, example by example: {other}" in said
    assert f" =  {other} " in said and " +  fp16 " in said
    assert recommend.recommend(load(alike), Link(20e6, 0.02, 0.02)).tied == ()


def test_links_that_share_one_sample_of_computing_say_so(alike: Path) -> None:
    assert "taken over on 2 links" in headline(alike)


def test_a_runs_figures_and_tables_name_one_latency_for_a_setting(alike: Path) -> None:
    run = load(alike)
    ((_, rows), _) = settings.panels(run.attempts)
    medians = {m.label: m.latency.value for m in settings.measured(rows)}
    bars = texts(drawn("stages", alike))
    for label, value in medians.items():
        assert f"{value:.3f} s" in headline(alike), label
        text = f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
        assert any(t.startswith(text) for t in bars), label


def test_where_answers_differ_in_length_latency_ends_with_the_first_token(alike: Path) -> None:
    tokens = {"edge": 4, "cloud": 9, "split": 9}
    change(alike, lambda row: {"answer_tokens": tokens[row["placement"]], "ttft_s": 0.5 * row["e2e_s"]})
    run = load(alike)
    assert run.latency == "time to first token"
    assert (run.rows["latency_s"] == run.rows["ttft_s"]).all()
    for name in ("latency_quality", "latency_cdf", "regimes"):
        assert "time to first token" in words(name, alike), name
    assert "median time to first token" in headline(alike)
    assert summarise(run)["answer_tokens"].notna().all()
