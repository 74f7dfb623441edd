"""What bytes over bandwidth says is put beside what was measured, and beside which setting it makes win."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from testbed.analysis import naive, report
from testbed.analysis.run import load
from tests.analysis.conftest import Command
from tests.analysis.make_pipeline import RATES, make_pipeline
from tests.analysis.make_run import change, lines, make_run, rewrite
from tests.analysis.test_figures import words


def test_the_ratio_is_that_of_the_handshake_and_the_transmission_to_the_payload_over_the_rate(
    pipelines: Path,
) -> None:
    found = {(e.panel, e.setting): e for e in naive.errors(load(pipelines))}
    rows = pd.DataFrame(lines(pipelines))
    for profile in RATES:
        own = rows[(rows["profile"] == profile) & (rows["placement"] == "store") & (rows["codec"] == "int8")]
        formula = own["payload_bytes"] * 8 / own["rate_up_bps"]
        expected = ((own["connect_s"] + own["busy_transmit_s"]) / formula).median()
        assert found[profile, "store int8"].ratio.value == pytest.approx(expected)
        assert found[profile, "store int8"].ratio.n == 6
    assert not any(setting == "edge" for _, setting in found)  # nothing crossed


def test_a_link_that_does_as_the_formula_says_changes_no_choice(pipelines: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-mid", "lte"), ("fp16", "int8"), tasks=("needle",), examples=6)

    def ideal(row: dict) -> dict:
        sent = {**row, "connect_s": 0.0, "transmit_s": row["naive_s"], "busy_transmit_s": row["naive_s"]}
        whole = row["e2e_s"] - row["connect_s"] - row["transmit_s"] + row["naive_s"]
        return {**sent, "e2e_s": whole, "ttft_s": whole - row["generate_s"]}

    change(path, ideal)
    loaded = load(path)
    assert all(e.ratio.value == pytest.approx(1.0) for e in naive.errors(loaded))
    for choice in naive.choices(loaded):
        assert choice.named == choice.measured and choice.apart == 0
        assert choice.promised_s == pytest.approx(choice.takes_s) == pytest.approx(choice.fastest_s)
    pd.testing.assert_series_equal(
        naive.naive_latencies(loaded.rows), loaded.rows["latency_s"], check_names=False
    )


def test_what_the_formula_chooses_is_judged_by_what_it_takes(tmp_path: Path) -> None:
    """Two caches that answer alike: the small one wins by bytes, and waits long for its first byte."""
    path = make_run(tmp_path / "run", ("5g-mid",), ("int8", "int4"), ("split",), ("needle",), examples=12)

    def told(row: dict) -> dict:
        waits, size = (1.0, 1_000_000) if row["codec"] == "int4" else (0.1, 2_000_000)
        formula = size * 8 / row["rate_up_bps"]
        spent = {"connect_s": 0.0, "transmit_s": waits + formula, "busy_transmit_s": waits + formula}
        times = {"naive_s": formula, "e2e_s": 0.5 + waits + formula, "payload_bytes": size}
        return {**spent, **times, "score": 1.0, "reference_score": 1.0, "answer_tokens": None}

    change(path, told)
    (choice,) = naive.choices(load(path))
    assert (choice.measured, choice.named) == ("int8", "int4")
    formulas = [size * 8 / 30e6 for size in (2_000_000, 1_000_000)]
    assert choice.fastest_s == pytest.approx(0.6 + formulas[0])
    assert choice.promised_s == pytest.approx(0.5 + formulas[1])
    assert choice.takes_s == pytest.approx(1.5 + formulas[1])
    assert choice.slower.value == pytest.approx(choice.takes_s / choice.fastest_s)
    assert (choice.apart, choice.n) == (12, 12)
    said = naive.sentence(load(path))
    assert "names another fastest setting on 1 of 1 link" in said and "in 12 of 12 examples" in said


def test_what_a_pipeline_hid_is_not_taken_away_twice(pipelines: Path) -> None:
    rows = load(pipelines).rows
    shortened = rows["latency_s"] - naive.naive_latencies(rows)
    assert (shortened <= rows["connect_s"] + rows["transmit_s"] + 1e-9).all()
    in_turn = rows[(rows["overlap_s"] < 1e-9) & (rows["payload_bytes"] > 0)]
    expected = in_turn["connect_s"] + in_turn["transmit_s"] - in_turn["naive_s"]
    assert shortened[in_turn.index].to_numpy() == pytest.approx(expected.to_numpy())


def test_links_without_a_rate_are_left_out_and_said(
    pipelines: Path, tmp_path: Path, command: Command
) -> None:
    path = make_pipeline(tmp_path / "run", examples=3)
    free = {"rate_up_bps": None, "naive_s": None}
    change(path, lambda row: free if row["profile"] == RATES[0] and row["placement"] != "edge" else {})
    loaded = load(path)
    assert naive.left_out(loaded) == [RATES[0]]
    assert f"no rate, so no formula: {RATES[0]}" in naive.text(loaded)
    assert f"No rate, so no formula: {RATES[0]}." in words("naive_error", path)
    status, out, _ = command("plot", path, "naive_error")
    assert status == 0 and "naive_error.csv" in out
    assert set(pd.read_csv(path / "naive_error.csv")["link"]) == set(RATES[1:])
    rewrite(path, [row | free for row in lines(path)])
    loaded = load(path)
    assert (
        naive.text(loaded) == f"no rate, so no formula: {', '.join(RATES)}" and naive.sentence(loaded) == ""
    )
    assert "bandwidth" in report.render(load(pipelines), []) and naive.write(loaded) is None


def test_the_figure_says_what_the_table_says(pipelines: Path) -> None:
    said = words("naive_error", pipelines)
    choices = naive.choices(load(pipelines))
    assert (
        f"on {sum(c.named != c.measured for c in choices)} of 4 links" in said
        or "names the fastest setting on 4" in said
    )
    assert "n = 6 examples" in said and "measured ÷ formula" in said
