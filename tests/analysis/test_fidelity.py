"""Figures of links as they were measured: each error where it belongs, and in words how many links were off."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from testbed.analysis.run import load
from testbed.errors import UsageError
from testbed.net.calibration.outcome import Check, Track
from tests.analysis.make_run import draw, lines, make_run, rewrite, write_calibration
from tests.analysis.test_figures import drawn, texts, words


def test_fidelity_draws_each_profile_s_last_errors_and_says_how_many_links_were_off(wide: Path) -> None:
    made = drawn("fidelity", wide)
    said = " ".join(texts(made))
    assert "1 of 11 links was out of tolerance" in said
    assert "n = " in said
    assert "lte  ✗" in said
    measured = load(wide).calibration["measurements"]
    places = [m["profile"] for m in measured]
    assert len(measured[places.index("lte")]["attempts"]) == 2
    for ax, what, scale in zip(made.axes, ("rate", "delay", "loss"), (None, 1e3, 100.0), strict=True):
        points = {
            (round(float(line.get_xydata()[0][1]), 2)): float(line.get_xydata()[0][0])
            for line in ax.lines
            if line.get_marker() in ("^", "v")
        }
        expected = {}
        for row, one in enumerate(measured):
            for check in one["attempts"][-1]["checks"]:
                if check["what"] == what and check["asked"] is not None:
                    asked, y = check["asked"], round(row + (-0.17 if check["way"] == "up" else 0.17), 2)
                    off = check["measured"] - (0 if what == "loss" else asked)
                    expected[y] = off * (scale or 100 / asked)
        assert points == pytest.approx(expected)
        assert len(points) == 2 * len(places) - 2 * (what == "rate")  # one has no rate
    rate = made.axes[0]
    assert (
        sum(p.get_xydata()[0][0] == pytest.approx(-10, abs=0.1) for p in rate.lines if p.get_marker() in "^v")
        == 2
    )
    edges = {round(float(x), 9) for band in rate.collections for x in band.get_paths()[0].vertices[:, 0]}
    assert edges == {-3.0, 3.0}


def test_fidelity_lays_what_a_trace_delivered_over_what_it_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte", "5g-mid"), ("int8",), examples=2)
    write_calibration(run, ("lte", "5g-mid"), trace="lte")
    made = drawn("fidelity_traces", run)
    assert "followed their traces, within tolerance" in " ".join(texts(made))
    curves = next(m for m in load(run).calibration["measurements"] if m["profile"] == "lte")
    for ax, raw in zip(made.axes, curves["attempts"][-1]["curves"], strict=True):
        steps = [p.get_data() for p in ax.patches]
        for step, key in zip(steps, ("asked_bytes", "delivered_bytes"), strict=True):
            assert step.values == pytest.approx(np.array(raw[key]) / 1e3)
            assert (step.edges[0], step.edges[-1]) == (0.0, pytest.approx(8.0))
        shape = np.corrcoef(raw["asked_bytes"], raw["delivered_bytes"])[0, 1]
        off = 100 * (sum(raw["delivered_bytes"]) / sum(raw["asked_bytes"]) - 1)
        assert f"correlation {shape:.4f} · total {off:+.2f} %" in [t.get_text() for t in ax.texts]


@pytest.fixture
def beyond(tmp_path: Path) -> Path:
    """Two links, one with jitter and bursts, and one whose delay and loss follow a trace."""
    path = make_run(tmp_path / "run", ("lte", "5g-mid"), ("int8",), examples=2)
    write_calibration(path, ("lte", "5g-mid"))
    calibration = json.loads((path / "calibration.json").read_text())
    first, second = (one["attempts"][-1] for one in calibration["measurements"])
    for what, asked, measured in (("jitter", 0.004, 0.0042), ("burst", 4.0, 3.8)):
        check = Check("up", what, asked, measured, 0.9 * measured, 1.1 * measured, 200, True, "±10%")
        first["checks"].append(asdict(check))
    second["checks"].append(asdict(Check("up", "delay trace", 0.0, 6e-5, None, None, 8000, True, "≤ 1ms")))
    second["tracks"] = [
        asdict(Track("up", "delay", 2.0, 0.1, (0.02, 0.03, None), (0.0201, 0.0301, None))),
        asdict(Track("up", "loss", 2.0, 0.1, (0.01, 0.02, 0.0), (0.011, 0.019, 0.0))),
        {"way": "up", "what": "delay", "asked": [1], "measured": []},
    ]
    (path / "calibration.json").write_text(json.dumps(calibration))
    return path


def test_fidelity_shows_jitter_and_bursts_where_there_are_any(beyond: Path) -> None:
    made = drawn("fidelity", beyond)
    assert len(made.axes) == 5
    for ax, off in zip(made.axes[3:], (5.0, -5.0), strict=True):
        points = [float(line.get_xydata()[0][0]) for line in ax.lines if line.get_marker() == "^"]
        assert points == [pytest.approx(off)]
        edges = {round(float(x), 6) for band in ax.collections for x in band.get_paths()[0].vertices[:, 0]}
        assert edges == {-10.0, 10.0}


def test_fidelity_lays_delay_and_loss_over_what_the_trace_says(beyond: Path) -> None:
    made = drawn("fidelity_traces", beyond)
    delay, loss = made.axes
    asked, measured = (patch.get_data() for patch in delay.patches)
    assert asked.values[:2] == pytest.approx([20, 30])
    assert measured.values[:2] == pytest.approx([20.1, 30.1])
    assert (asked.edges[0], asked.edges[-1]) == (2.0, pytest.approx(2.3))
    assert np.isnan(measured.values[2])
    assert loss.patches[1].get_data().values == pytest.approx([1.1, 1.9, 0.0])
    assert "median error 0.06 ms" in " ".join(texts(made))


def test_fidelity_of_a_run_that_its_links_stopped_needs_no_trial(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8",))
    write_calibration(path, ("lte",), off=("lte",))
    (path / "trials.jsonl").unlink()
    assert len(draw(path, ["fidelity"])) == 2


def test_fidelity_says_that_trials_ran_before_the_link_was_measured_well(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), ("split",), ("needle",), examples=4)
    write_calibration(path, ("lte",))
    rows = lines(path)
    rewrite(path, [row | {"calibrated": index > 1} for index, row in enumerate(rows)])
    said = words("fidelity", path)
    assert "Within tolerance when last measured; trials ran while it was not" in said
    assert "a measurement before them was out of tolerance: lte (in 2 of 8 trials)" in said


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[1]",
        '{"measurements": 3}',
        '{"measurements": [7, {"profile": "a", "attempts": [{"checks": "x", "curves": [{"way": "up"}]}]}]}',
        '{"measurements": [{"attempts": [{"checks": [{"way": "up", "what": "rate", "asked": 0, "measured": 1}]}]}]}',
    ],
)
def test_a_calibration_without_measurements_is_said_in_words(tmp_path: Path, content: str) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), examples=1)
    (path / "calibration.json").write_text(content)
    with pytest.raises(UsageError, match="has no measured link"):
        draw(path, ["fidelity"])


def test_a_measurement_is_written_in_its_own_unit() -> None:
    values = {
        "rate": 20e6,
        "delay": 0.0205,
        "loss": 0.001,
        "jitter": 0.004,
        "rate trace": 2_500_000,
        "burst": 3.5,
        "jitter distribution": 0.03,
    }
    checks = (Check("up", what, value, value, None, None, 9, True, "") for what, value in values.items())
    shown = [check.line()["measured"] for check in checks]
    assert shown == ["20mbit", "20.5ms", "0.1%", "4ms", "2.5mb", "3.5", "0.030"]
