"""The latency model finds what made the rows; the recommendation keeps to the floor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import recommend
from analysis.latency_model import LatencyModel, Link, Transport, leave_one_out, median_error
from analysis.run import load
from analysis.settings import labelled
from testbed.cli import main
from tests.analysis.make_run import SWEEP, make_run
from tests.analysis.test_run_directory import lines, rewrite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recommend") / "run"
    make_run(path, tuple(SWEEP), ("fp16", "int8", "q2c@0.25+int8"), tasks=("needle",), examples=90)
    rows = lines(path)
    exact = [r | {"nll": r["reference_nll"]} if r["codec"] in ("", "fp16") else r for r in rows]
    kept = {"": 1.0, "fp16": 1.0, "int8": 1.0, "q2c@0.25+int8": 0.5}
    rewrite(path, [r | {"reference_score": 1.0, "score": kept[r["codec"]]} for r in exact])
    return path


def _one(value: float) -> np.ndarray:
    return np.array([value])


def test_slow_start_doubles_until_the_window_fills_the_link() -> None:
    model = Transport(begin_s=0.0, efficiency=1.0, window=14_480.0)
    rate, rtt = 80e6, 0.04  # 400 kB a round trip at the wire; 14.48 kB (2^k - 1) sent after k rounds

    def time(payload: float) -> float:
        return float(model.transmit_s(_one(payload), _one(rate), _one(0.02), _one(rtt), _one(0.0))[0])

    assert time(14_480.0) == pytest.approx(0.02 + 0.04)
    assert time(14_480.0 * 3) == pytest.approx(0.02 + 2 * 0.04)
    goodput = rate / 8 * 1448 / 1500
    assert time(50e6) - time(40e6) == pytest.approx(10e6 / goodput)


def test_loss_limits_long_transfers_as_mathis_says() -> None:
    model = Transport(begin_s=0.0, loss=1.22)
    both = [
        float(model.transmit_s(_one(b), _one(1e12), _one(0.025), _one(0.05), _one(0.001))[0])
        for b in (40e6, 50e6)
    ]
    assert both[1] - both[0] == pytest.approx(10e6 / (1.22 * 1448 / (0.05 * 0.001**0.5)), rel=1e-3)


def test_the_fit_finds_the_numbers_that_made_the_rows(run: Path) -> None:
    rows = load(run).rows
    truth = Transport(begin_s=0.004, efficiency=0.93, window=20_000.0)
    across = rows["placement"] != "edge"
    own = rows[across]
    made = truth.transmit_s(
        own["payload_bytes"].to_numpy(float),
        own["rate_up_bps"].to_numpy(),
        own["delay_up_s"].to_numpy(),
        (own["delay_up_s"] + own["delay_down_s"]).to_numpy(),
        own["loss_up"].to_numpy(),
    )
    rows.loc[across, "transmit_s"] = made
    found = LatencyModel.fit(rows).transport
    again = found.transmit_s(
        own["payload_bytes"].to_numpy(float),
        own["rate_up_bps"].to_numpy(),
        own["delay_up_s"].to_numpy(),
        (own["delay_up_s"] + own["delay_down_s"]).to_numpy(),
        own["loss_up"].to_numpy(),
    )
    assert float(np.median(np.abs(again / made - 1))) < 0.02
    assert found.efficiency == pytest.approx(0.93, rel=0.02)


def test_links_that_were_left_out_are_predicted(run: Path) -> None:
    found = leave_one_out(load(run).rows)
    assert len(found) == len(SWEEP)
    assert median_error(found) < 0.1
    assert all(h.chosen_within <= 0.05 for h in found)


def test_the_fastest_setting_that_holds_is_chosen(run: Path) -> None:
    loaded = load(run)
    found = recommend.recommend(loaded, Link(40e6, 0.02, 0.02), 0.95)
    assert found.measured_as is None
    assert found.choice is not None
    holding = [o for o in found.options if o.holds(0.95)]
    assert {o.setting for o in holding} == {"fp16", "int8", "cloud", "edge"}
    assert found.choice.latency_s == min(o.latency_s for o in holding)
    only = recommend.recommend(load(run, 'placement == "split"'), Link(40e6, 0.02, 0.02), 0.95)
    assert only.choice is not None
    assert only.choice.setting == "int8"
    assert only.runners_up[0].setting == "fp16"
    loose = recommend.recommend(load(run, 'placement == "split"'), Link(40e6, 0.02, 0.02), 0.4)
    assert loose.choice is not None
    assert loose.choice.setting == "q2c@0.25+int8"


def test_the_error_of_every_held_out_cell_is_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recommend", str(run), "--rate", "40mbit", "--delay", "20ms", "--held-out"])
    said = capsys.readouterr().out.split("each profile predicted from the others")[1]
    found = leave_one_out(load(run).rows)
    row = next(line for line in said.splitlines() if line.startswith("  int8 "))
    assert row.split()[1:] == [f"{one.errors['int8']:+.1%}" for one in found]
    assert all(f"  {one.profile}" in said for one in found)


def test_a_measured_link_is_answered_from_its_measurements(run: Path) -> None:
    found = recommend.recommend(load(run), Link(20e6, 0.01, 0.01), 0.95)
    assert found.measured_as == "rate=20mbit,delay=10ms"
    rows = labelled(load(run).rows).query('profile == "rate=20mbit,delay=10ms" and setting == "int8"')
    int8 = next(o for o in found.options if o.setting == "int8")
    assert int8.latency_s == pytest.approx(rows["e2e_s"].median())


def test_too_few_examples_do_not_show_that_a_floor_holds(run: Path) -> None:
    loaded = load(run, 'example in ["needle-1", "needle-2", "needle-3"] and placement == "split"')
    found = recommend.recommend(loaded, Link(5e6, 0.02, 0.02), 0.95)
    assert found.choice is not None
    assert found.choice.setting == "fp16"  # bit for bit: needs no examples
    assert found.without_proof is not None
    assert found.without_proof.setting == "int8"
    assert "at least 72, none of them changed, would" in recommend.text(found)
    assert 0.95**72 < 0.025 <= 0.95**71


def test_a_deadline_that_nothing_meets_leaves_no_choice(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recommend", str(run), "--rate", "40mbit", "--delay", "20ms", "--deadline", "10ms", "--json"])
    assert ended.value.code == 1
    value = json.loads(capsys.readouterr().out)
    assert value["choice"] is None
    assert value["held_out"]["median_error"] < 0.1


@pytest.mark.parametrize(
    "wrong", [["--rate", "40"], ["--rate", "0mbit"], ["--quality", "2"], ["--deadline", "soon"]]
)
def test_a_wrong_request_is_one_line(run: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recommend", str(run), "--rate", "40mbit", "--delay", "20ms", *wrong])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_on_one_link_says_that_the_error_is_unknown(run: Path) -> None:
    one = load(run, 'profile == "rate=20mbit,delay=10ms"')
    assert "the model's error on other links is unknown" in recommend.text(
        recommend.recommend(one, Link(1e7, 0.01, 0.01))
    )


def test_an_unlimited_link_is_predicted(run: Path) -> None:
    predicted = LatencyModel.fit(load(run).rows).predict(Link(float("inf"), 0.0, 0.0))
    assert isinstance(predicted, pd.DataFrame)
    assert np.isfinite(predicted["e2e_s"]).all()
