"""Failures are no survivors: they take for ever, answer nothing, and are named where their setting is shown."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from testbed import stats
from testbed.analysis import report, settings
from testbed.analysis.run import load
from testbed.analysis.summary import summarise
from tests.analysis.make_run import change, headline, lines, make_run, rewrite
from tests.analysis.test_figures import drawn, texts

ZEROS = {"error": "timed out", "payload_bytes": 0} | dict.fromkeys(
    ("e2e_s", "ttft_s", "transmit_s", "prefill_s"), 0.0
)


def _made(path: Path, fails, codecs: tuple[str, ...] = ("fp16", "int8", "int4"), examples: int = 4) -> Path:
    run = make_run(path, ("5g-good",), codecs, ("split",), examples=examples)
    change(run, lambda row: {"score": 1.0 if row["task"] == "needle" else 0.5, "reference_score": 0.75})
    return change(run, lambda row: ZEROS if fails(row) else {})


def _points(run: Path) -> dict[str, settings.Measured]:
    ((_, rows),) = settings.panels(load(run).attempts)
    return {m.label: m for m in settings.measured(rows)}


def test_failed_rows_have_no_times_whatever_was_written(tmp_path: Path) -> None:
    run = load(_made(tmp_path / "run", lambda r: r["codec"] == "int4"))
    assert run.failed[["e2e_s", "ttft_s", "transmit_s", "payload_bytes", "score"]].isna().all(axis=None)
    assert (run.attempts.loc[run.attempts["failed"], "latency_s"] == math.inf).all()


def test_a_setting_without_a_task_has_no_mean_over_the_tasks_and_no_mark(tmp_path: Path) -> None:
    run = _made(tmp_path / "run", lambda r: r["codec"] == "int8" and r["task"] == "passages")
    found = _points(run)
    assert math.isnan(found["int8"].quality.value)
    assert found["fp16"].quality.value == 0.75
    said = texts(drawn("latency_quality", run))
    assert any("int8 failed 4 of 8" in t for t in said)
    assert "failed 4 of 8" in headline(run)


def test_a_setting_that_answered_most_but_lacks_a_task_takes_nobodys_place(tmp_path: Path) -> None:
    """int8 has all of one task's answers and none of the other's, fp16 and int4 fewer answers of both."""

    def fails(row: dict[str, object]) -> bool:
        last = int(str(row["example"]).split("-")[1])
        return row["task"] == "passages" if row["codec"] == "int8" else last >= 4

    found = _points(_made(tmp_path / "run", fails, examples=10))
    assert math.isnan(found["int8"].quality.value)
    assert found["fp16"].quality.value == found["int4"].quality.value == 0.75


def test_a_setting_that_failed_everywhere_is_named_in_panels_terminal_report_and_table(
    tmp_path: Path,
) -> None:
    run = _made(tmp_path / "run", lambda r: r["codec"] == "int4")
    for name in ("latency_quality", "latency_cdf", "stages"):
        said = texts(drawn(name, run))
        assert any("failed 8 of 8" in t for t in said), name
    line = next(one for one in headline(run).splitlines() if " int4 " in one)
    assert "none" in line
    assert line.endswith("failed 8 of 8")
    assert "failed 8 of 8" in report.write(load(run), []).read_text()
    table = summarise(load(run)).query("codec == 'int4'")
    assert (table["e2e_s"] == math.inf).all()
    assert list(table["failed"]) == [4, 4]


def test_the_terminal_names_every_setting_that_failed_and_why(tmp_path: Path) -> None:
    run = _made(tmp_path / "run", lambda r: r["codec"] != "fp16")
    change(run, lambda r: {"error": "edge: no room\ntraceback"} if r["codec"] == "int4" else {})
    said = headline(run)
    assert "16 trials failed (int8 8 of 8: timed out; int4 8 of 8: edge: no room)" in said


def test_settings_are_compared_on_the_examples_that_all_of_them_answered(tmp_path: Path) -> None:
    """int4 fails where fp16 is wrong: over its survivors alone it would stand above the full cache."""
    run = _made(tmp_path / "run", lambda r: r["codec"] == "int4" and r["example"].endswith("-0"))
    change(run, lambda row: {"score": 0.0 if row["example"].endswith("-0") else 0.8})
    found = _points(run)
    assert found["fp16"].quality.value == pytest.approx(0.8)
    assert found["int4"].quality.value == pytest.approx(0.8)
    assert found["int4"].gap == "failed 2 of 8"


def test_a_failure_is_an_infinite_latency_in_medians_and_quantiles() -> None:
    inf = math.inf
    found = stats.median([1.0, 2.0, inf, inf, inf])
    assert (found.value, found.high) == (inf, inf)
    assert found.low >= 1.0
    assert stats.median([1.0, 2.0, 3.0, 4.0, inf]).value == 3.0
    assert stats.quantile([1.0, 2.0, 3.0, inf], 0.95).value == inf
    assert not np.isnan(stats.quantile(np.r_[np.arange(19.0), inf], 0.5).high)


def test_a_curve_of_latencies_ends_at_the_share_that_finished(tmp_path: Path) -> None:
    run = _made(tmp_path / "run", lambda r: r["codec"] == "int8" and r["example"].endswith(("-0", "-1")))
    (ax,) = drawn("latency_cdf", run).axes
    ends = sorted(max(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) > 3)
    assert ends == [0.5, 1.0, 1.0]


def test_an_interrupted_run_compares_what_was_answered_by_all(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), ("split",), tasks=("needle",), examples=6)
    rewrite(run, [r for r in lines(run) if r["codec"] == "fp16" or r["example"] == "needle-1"])
    assert math.isnan(_points(run)["int8"].quality.value)
    rows = pd.concat([own for _, own in settings.panels(load(run).attempts)])
    assert set(settings.common(rows)["setting"]) == {"fp16"}
