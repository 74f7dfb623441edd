"""The latency model finds what made the rows; the recommendation keeps to the floor."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from testbed.analysis import latency_model, recommend, report
from testbed.analysis.latency_model import LatencyModel, Link, Transport, leave_one_out, median_error
from testbed.analysis.run import load
from testbed.analysis.settings import labelled
from testbed.errors import UsageError
from tests.analysis.conftest import Command
from tests.analysis.make_run import (
    PROFILES,
    SWEEP,
    change,
    headline,
    lines,
    make_run,
    rewrite,
    write_manifest,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recommend") / "run"
    make_run(path, tuple(SWEEP), ("fp16", "int8", "q2c@0.25+int8"), tasks=("needle",), examples=90)
    kept = {"": 1.0, "fp16": 1.0, "int8": 1.0, "q2c@0.25+int8": 0.5}
    change(path, lambda row: {"nll": row["reference_nll"]} if row["codec"] in ("", "fp16") else {})
    return change(path, lambda row: {"reference_score": 1.0, "score": kept[row["codec"]]})


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


def _goodput(loss: float) -> float:
    """Bytes a second of a long transfer over a fast link with a round trip of 50 ms."""
    model = Transport(begin_s=0.0, loss=1.0)
    both = [
        float(model.transmit_s(_one(b), _one(1e12), _one(0.025), _one(0.05), _one(loss))[0])
        for b in (40e6, 50e6)
    ]
    return 10e6 / (both[1] - both[0])


def test_rare_loss_limits_long_transfers_as_mathis_says_and_frequent_loss_by_timeouts_as_padhye_says() -> (
    None
):
    """Equation 30 of the paper at p = 5 %, RTT = 50 ms, T0 = 250 ms, by hand: sqrt(2p/3) = 0.18257, 3 sqrt(3p/8) = 0.41079,
    1 + 32 p^2 = 1.08: 1 / (0.0091287 + 0.25 * 0.41079 * 0.05 * 1.08) = 1 / 0.0146744 = 68.146 segments a second; Mathis
    alone says 1.6 times that."""
    assert _goodput(1e-3) == pytest.approx(1448 / 0.05 * (3 / 2 / 1e-3) ** 0.5, rel=0.02)
    assert _goodput(0.05) == pytest.approx(68.146 * 1448, rel=1e-3)


def test_the_fit_finds_the_numbers_that_made_the_rows(run: Path) -> None:
    rows = load(run).rows
    truth = Transport(begin_s=0.004, efficiency=0.93, window=20_000.0)
    across = rows["placement"] != "edge"
    own = rows[across]
    columns = ("payload_bytes", "rate_up_bps", "delay_up_s", "delay_down_s", "loss_up")
    payload, rate, up, down, loss = (own[column].to_numpy(float) for column in columns)
    made = truth.transmit_s(payload, rate, up, up + down, loss)
    rows.loc[across, "transmit_s"] = made
    found = LatencyModel.fit(rows).transport
    again = found.transmit_s(payload, rate, up, up + down, loss)
    assert float(np.median(np.abs(again / made - 1))) < 0.02
    assert found.efficiency == pytest.approx(0.93, rel=0.02)


def test_links_that_were_left_out_are_predicted(run: Path) -> None:
    found = leave_one_out(load(run).rows)
    assert len(found) == len(SWEEP)
    assert median_error(found) < 0.1
    assert all(h.chosen_within <= 0.05 for h in found)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_error_of_every_held_out_cell_is_printed(run: Path, command: Command) -> None:
    _, out, _ = command("recommend", run, "--rate", "40mbit", "--delay", "20ms", "--held-out")
    said = out.split("each profile predicted from the others")[1]
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


@pytest.mark.parametrize("told", [{"fp16"}, set()])
def test_what_two_clocks_hide_is_not_predicted(told: set[str], tmp_path: Path, command: Command) -> None:
    run = make_run(tmp_path / "run", tuple(SWEEP), ("fp16", "int8"), tasks=("needle",), examples=12)
    change(
        run,
        lambda row: (
            {"first_token_s": None} if row["placement"] != "edge" and row["codec"] not in told else {}
        ),
    )
    status, out, _ = command("recommend", run, "--rate", "20mbit", "--delay", "20ms")
    assert status == 0
    assert "nan" not in out and "inf" not in out
    hidden = ", ".join(name for name in ("fp16", "int8", "cloud") if name not in told)
    assert f"not predicted, since what they do on another link is not known: {hidden}" in out
    assert ("next: fp16, " in out) == bool(told)
    assert ("unknown error of" in out) == (not told)


def test_a_deadline_that_nothing_meets_leaves_no_choice(run: Path, command: Command) -> None:
    link = ("--rate", "40mbit", "--delay", "20ms")
    status, out, _ = command("recommend", run, *link, "--deadline", "10ms", "--json")
    assert status == 1
    value = json.loads(out)
    assert value["choice"] is None
    assert value["held_out"]["median_error"] < 0.1


@pytest.mark.parametrize(
    "wrong", [["--rate", "40"], ["--rate", "0mbit"], ["--quality", "2"], ["--deadline", "soon"]]
)
def test_a_wrong_request_is_one_line(run: Path, wrong: list[str], command: Command) -> None:
    status, _, err = command("recommend", run, "--rate", "40mbit", "--delay", "20ms", *wrong)
    assert status == 2
    assert len(err.splitlines()) == 1


def test_a_run_on_one_link_says_that_the_error_is_unknown(run: Path) -> None:
    one = load(run, 'profile == "rate=20mbit,delay=10ms"')
    assert "the model's error on other links is unknown" in recommend.text(
        recommend.recommend(one, Link(1e7, 0.01, 0.01))
    )


def test_an_unlimited_link_is_predicted(run: Path) -> None:
    predicted = LatencyModel.fit(load(run).rows).predict(Link(float("inf"), 0.0, 0.0))
    assert isinstance(predicted, pd.DataFrame)
    assert np.isfinite(predicted["e2e_s"]).all()


def test_the_text_is_exact_and_is_chosen_on_a_slow_link(run: Path) -> None:
    """The cloud reads the same text with the same model, so that no interval of its score needs to show anything."""
    rows = [r | {"score": 0.9} if r["placement"] == "cloud" else r for r in lines(run)]
    slow = [r for r in rows if r["placement"] != "edge" and int(r["example"].split("-")[1]) < 8]
    path = make_run(run.parent / "slow", (next(iter(SWEEP)),), ("fp16",), examples=1)
    rewrite(path, slow)
    found = recommend.recommend(load(path), Link(1e6, 0.02, 0.02))
    assert found.choice is not None
    assert found.choice.setting == "cloud"
    assert {o.setting for o in found.options if o.exact} == {"cloud", "fp16"}


def test_the_text_is_not_exact_where_the_cloud_computes_something_else(run: Path, tmp_path: Path) -> None:
    """As another device may, in the same format; or a run whose manifest, which tells of formats, is gone."""
    path = make_run(tmp_path / "apart", ("lte",), ("fp16",), examples=3)
    rewrite(path, [r | {"nll": r["nll"] + 0.2 * (r["placement"] == "cloud")} for r in lines(path)])
    (path / "manifest.json").unlink()
    found = recommend.recommend(load(path), Link(10e6, 0.035, 0.035))
    assert {o.setting for o in found.options if o.exact} == {"fp16", "edge"}


def test_the_text_is_not_exact_where_edge_and_cloud_hold_the_model_in_different_formats(run: Path) -> None:
    path = make_run(run.parent / "formats", ("lte",), ("fp16",), examples=3)
    write_manifest(path, settings={"dtype": {"edge": "float32", "cloud": "bfloat16"}})
    assert not any(o.exact for o in recommend.recommend(load(path), Link(10e6, 0.035, 0.035)).options)


@pytest.mark.parametrize(
    ("link", "nearest"),
    [
        (Link(10e9, 0.02, 0.02), "80 Mbit/s"),
        (Link(20e6, 0.02, 0.02, 1.0), "0%"),
        (Link(20e6, 1.0, 1.0), "80 ms"),
    ],
)
def test_a_link_out_of_reach_is_refused_with_the_nearest_that_was_measured(
    run: Path, link: Link, nearest: str
) -> None:
    with pytest.raises(UsageError, match=f"nearest: {nearest}"):
        recommend.recommend(load(run), link)


def test_a_link_outside_of_what_was_measured_is_answered_as_extrapolated(run: Path) -> None:
    found = recommend.recommend(load(run), Link(20e6, 0.15, 0.15, 0.005))
    said = recommend.text(found)
    assert "extrapolated, round trip 300 ms (nearest measured: 80 ms)" in said
    assert "extrapolated, loss 0.5% (nearest measured: 0%)" in said
    assert "the error there is unknown" in said
    within = recommend.recommend(load(run), Link(40e6, 0.02, 0.02))
    assert "extrapolated" not in recommend.text(within)


def test_a_setting_measured_on_fewer_links_is_flagged_where_they_end_in_words_and_json(
    run: Path, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "fewer", tuple(SWEEP), ("fp16", "int8"), tasks=("needle",), examples=3)
    rates = sorted({row["rate_up_bps"] for row in lines(path)})
    rewrite(path, [r for r in lines(path) if r["codec"] != "int8" or r["rate_up_bps"] == rates[0]])
    found = recommend.recommend(load(path), Link(rates[-1] * 0.99, 0.02, 0.02), 0.1)
    flags = {o["setting"]: o["extrapolated"] for o in found.to_dict()["options"]}
    assert flags["int8"][0].startswith("rate ") and flags["fp16"] == flags["edge"] == []
    assert "extrapolated, rate" in recommend.text(found)
    beyond = recommend.recommend(load(path), Link(2 * rates[-1], 0.02, 0.02), 0.1).to_dict()
    assert all(bool(o["extrapolated"]) == (o["placement"] != "edge") for o in beyond["options"])


def test_less_loss_than_was_measured_is_extrapolated_too(tmp_path: Path) -> None:
    path = make_run(tmp_path / "lossy", ("lte",), ("fp16",), tasks=("needle",), examples=3, loss_up=0.01)
    rows = load(path).rows
    assert latency_model.beyond(rows, replace(latency_model.link_of(rows), loss_up=0.0)) == [
        "loss 0% (nearest measured: 1%)"
    ]


def test_a_setting_that_failed_is_never_chosen_and_says_so(run: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path / "failed", tuple(SWEEP), ("fp16", "int8"), ("split",), ("needle",), examples=3)
    change(path, lambda row: {"nll": row["reference_nll"], "score": 1.0, "reference_score": 1.0})
    change(path, lambda row: {"error": "timed out", "e2e_s": 0.0} if row["codec"] == "fp16" else {})
    for link in (Link(20e6, 0.01, 0.01), Link(30e6, 0.02, 0.02)):
        found = recommend.recommend(load(path), link, 0.1)
        assert found.choice is None or found.choice.setting == "int8"
        assert next(o for o in found.options if o.setting == "fp16").latency_s == float("inf")
        assert "failed" in recommend.text(found)


def test_the_task_that_keeps_least_stands_beside_the_mean_of_several(run: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path / "tasks", ("lte",), ("fp16", "int8"), ("split",), examples=4)
    kept = {("int8", "passages"): 0.25}
    change(path, lambda r: {"reference_score": 1.0, "score": kept.get((r["codec"], r["task"]), 1.0)})
    said = recommend.text(recommend.recommend(load(path), Link(10e6, 0.035, 0.035)))
    assert next(line for line in said.splitlines() if " int8 " in line).endswith("passages 0.25")
    assert "passages 0.25" in headline(path)
    assert "passages 0.25" in html.unescape(report.write(load(path), []).read_text())


def test_on_a_link_with_loss_the_error_is_that_of_links_with_loss(tmp_path: Path) -> None:
    path = make_run(tmp_path / "lossy", tuple(PROFILES), ("fp16",), tasks=("needle",), examples=3)
    found = recommend.recommend(load(path), Link(20e6, 0.02, 0.02, 0.002))
    lossy = [h for h in found.held_out if h.profile != "5g-good"]
    said = f"the model's median error is {median_error(lossy):.0%} over 3 of them"
    assert said in recommend.text(found)
    assert "on links with loss" not in recommend.text(recommend.recommend(load(path), Link(20e6, 0.02, 0.02)))


def test_the_textbook_alone_predicts_what_transfers_under_loss_took() -> None:
    """Medians of four transfers each over the userspace emulator at 20 Mbit/s with CUBIC; a law of long transfers alone says
    0.5 to 3.8 times these."""
    taken = {  # payload (bytes), one way (s), loss: seconds
        (1520704, 0.025, 0.0): 0.770,
        (231728, 0.025, 0.0): 0.250,
        (1520704, 0.025, 0.005): 1.338,
        (231728, 0.025, 0.005): 0.248,
        (1520704, 0.025, 0.02): 6.183,
        (231728, 0.025, 0.02): 0.336,
        (1520704, 0.025, 0.05): 13.696,
        (231728, 0.025, 0.05): 1.433,
        (1520704, 0.010, 0.05): 6.393,
        (231728, 0.010, 0.05): 0.362,
    }
    size, one_way, loss = np.array(list(taken)).T
    said = Transport().transmit_s(size, np.full(len(size), 20e6), one_way, 2 * one_way, loss)
    away = np.abs(said / np.array(list(taken.values())) - 1)
    assert np.median(away) < 0.15
    assert away.max() < 0.35
