"""What benchmarks compute from runs, where no clock is asked: bounds of sweeps, shards on lanes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import progressive, replayed_delay
from benchmarks.scale import cut, makespan
from benchmarks.study_quality import Table, deltas, figures, quantization, selection
from benchmarks.sweep_bound import account, must_s
from testbed.experiment.row import STAGES
from testbed.net.profile.profile import parse_profile
from tests.analysis.make_run import make_run, rewrite

ROW: dict[str, Any] = {
    **dict.fromkeys(STAGES, 0.0),
    "error": "", "reused": "", "replayed": False, "edge_device": "", "placement": "split", "example": "a",
    "edge_slowdown": 4.0, "edge_decode_slowdown": 2.0,
}  # fmt: skip


def row(second: int, **values: Any) -> dict[str, Any]:
    made = {**ROW, "started_at": f"2026-01-01T00:00:{second:02d}+00:00", **values}
    return {**made, "e2e_s": sum(made[stage] for stage in STAGES)}


def test_a_trial_must_take_what_it_waited_for_and_not_what_was_stretched_or_taken_over() -> None:
    stages = {"prefill_s": 4.0, "transmit_s": 2.0, "first_token_s": 0.5, "generate_s": 1.0}
    assert must_s(row(0, **stages)) == 1.0 + 2.0 + 0.5 + 1.0
    assert must_s(row(0, **stages, reused="prefill,first_token,generate")) == 2.0 + 0.5
    assert must_s(row(0, **stages, placement="cloud", reused="prefill,first_token,generate")) == 6.5
    assert must_s(row(0, **stages, edge_device="here")) == 7.5
    assert must_s(row(0, **stages, placement="edge")) == 1.0 + (0.5 + 1.0) / 2
    assert must_s(row(0, **stages, placement="edge", reused="prefill,first_token,generate")) == 0
    assert must_s(row(0, **stages, error="it broke")) == 0


def test_what_a_sweep_took_is_what_it_must_and_the_rest_by_where_it_went() -> None:
    rows = [
        row(0, transmit_s=2.0),
        row(3, transmit_s=1.0, reused="first_token"),
        row(6, transmit_s=4.0),
        row(12, transmit_s=1.0, example="b"),
    ]
    found = account(rows, ["2026-01-01T00:00:14+00:00"])
    assert (found["wall_s"], found["must_s"]) == (14.0, 8.0)
    assert sorted(found["rest_s"].values()) == [1.0, 2.0, 3.0]
    assert found["ratio"] == pytest.approx(14 / 8)


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=50), st.integers(1, 20))
def test_lanes_end_within_list_schedulings_bound(shards: list[float], lanes: int) -> None:
    least = max(max(shards), sum(shards) / lanes)
    assert least * (1 - 1e-9) <= makespan(shards, lanes) <= 2 * least
    assert makespan(shards, 1) == pytest.approx(sum(shards))


@given(st.integers(1, 60))
def test_shards_share_all_examples_and_each_pays_for_its_start(count: int) -> None:
    times = {"small": np.arange(1.0, 21.0), "large": np.arange(100.0, 130.0)}
    shards = cut(times, {"small": 5.0, "large": 7.0}, count)
    small, large = min(count, 20), min(count, 30)
    assert len(shards) == small + large
    assert sum(shards) == pytest.approx(sum(each.sum() for each in times.values()) + 5 * small + 7 * large)


def test_answers_that_were_not_verified_are_no_part_of_what_is_said_of_verifying() -> None:
    whole = {
        "example": "a",
        "delivery": "whole",
        "payload_bytes": 9,
        "ttft_s": 2.0,
        "e2e_s": 3.0,
        "score": 1.0,
        "kl": 0.0,
        "answer": "x",
    }
    unverified = dict.fromkeys(("changed", "saved_s", "verified_s", "verified_score"))
    draft = {**whole, **unverified, "delivery": "progressive", "ttft_s": 1.0, "answer": "y", "score": 0.0}
    checked = {
        "changed": True,
        "saved_s": 0.5,
        "verified_s": 2.5,
        "verified_score": 1.0,
        "verified_answer": "x",
    }
    lines = progressive.table([{**whole, **unverified}, draft, {**draft, **checked}])
    assert [line["n"] for line in lines] == [1, 2] and "changed" not in lines[0]
    assert (lines[1]["changed"], lines[1]["as_whole"], lines[1]["saved_s"], lines[1]["score"]) == (
        1,
        1,
        0.5,
        0.0,
    )
    assert "changed" not in progressive.table([{**whole, **unverified}, draft])[1]


@pytest.mark.parametrize(("jitter", "short"), [("0ms", False), ("5ms", True)])
def test_a_replay_of_times_alone_is_short_where_delays_vary_and_one_of_both_delays_is_not(
    tmp_path: Path, jitter: str, short: bool
) -> None:
    link = parse_profile(f"rate=10mbit,delay=25ms,jitter={jitter}")
    made = replayed_delay.replays(link, 4.0, 1, tmp_path)
    truth = median(replayed_delay.round_trips(link, 100, 3.0, 50))
    off = {how: median(replayed_delay.round_trips(p, 100, 2.0, 60)) / truth - 1 for how, p in made.items()}
    assert (off["times"] < -0.2) == short
    assert abs(off["light"]) < 0.06 and abs(off["pair"]) < 0.06


def test_the_studys_tables_set_our_shares_beside_the_published_ones(tmp_path: Path) -> None:
    whole, token = "int4(group=0, symmetric=true)", "mixed(high=16, protect=3, scale=token)"
    selector = "q2c@0.25(scope=global, layers=last, sinks=0, pool=1)"
    run = make_run(
        tmp_path / "run",
        ("5g-mid",),
        ("int8",),
        ("split",),
        ("passages",),
        examples=4,
        reference_score=0.8,
        score=0.6,
    )
    rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    more = [
        {**row, "codec": codec, "trial": f"{codec} {row['trial']}"}
        for codec in (whole, token, selector)
        for row in rows
    ]
    rewrite(run, [*rows, *({**row, "score": 0.2} for row in more)])
    lines = figures([run])
    assert {(line["setting"], line["n"]) for line in lines} == {
        (codec, 4) for codec in ("int8", whole, token, selector)
    }
    assert [round(line["kept"], 6) for line in lines] == [0.75, 0.25, 0.25, 0.25]
    table = Table(lines)
    ours = next(line for line in quantization(table) if "smollm2" in line)
    assert [cell.split(" [")[0].strip() for cell in ours.split("|")[3:6]] == ["75", "25", "25"]
    assert any("| .800 | .200 | – | – | – |" in line for line in selection(table))
    assert not any("smollm2" in line for line in deltas(table))
    assert sum("published" in line for line in quantization(table)) == 7 + 4
