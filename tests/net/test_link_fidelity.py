"""The table that says how faithful links are: what it sums up, and the errors it allows for."""

from __future__ import annotations

import random
from statistics import stdev
from typing import Any

import pytest

from benchmarks.bulk_tcp import Bulk
from benchmarks.fidelity_table import burst_errors, merge, report
from testbed.net.profile.loss import GilbertElliott


def way(loss: float, ok: bool = True, **errors: float) -> dict[str, Any]:
    figures = {"rate_error": 0.0, "p50_over_s": 1e-4, "p99_over_s": 2e-4, "worst_lateness_s": 0.0} | errors
    return figures | {"loss": loss, "loss_asked": 0.01, "loss_ok": ok, "n": [1000, 9900, 10_000]}


def cell(profile: str, rate: float, up: dict[str, Any], down: dict[str, Any]) -> dict[str, Any]:
    return {"profile": profile, "rate_bps": rate, "cause": "", "up": up, "down": down}


def test_the_table_has_the_worst_of_each_rate_and_all_losses_together():
    slow = cell("rate=1mbit", 1e6, way(0.009, rate_error=-0.004), way(0.013, ok=False, p99_over_s=-3e-4))
    fast = cell("rate=10mbit", 10e6, way(0.010), way(0.010, rate_error=0.002))
    text = report({"emulator": "userspace", "busy": False, "cells": [slow, fast]})
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "1 Mbit/s     -0.400%    +0.100ms    -0.300ms   1 of 2" in text
    assert "10 Mbit/s     +0.200%    +0.100ms    +0.200ms   0 of 2" in text
    assert lines["all"].endswith("1 of 4")
    assert "all together: 1.050% of 40000" in text  # (90 + 130 + 100 + 100) / 40,000


def test_parts_are_put_together_and_the_later_measurement_of_a_profile_counts():
    first = {"emulator": "netem", "busy": False, "cells": [cell("a", 1e6, way(0.01), way(0.01))]}
    second = {"emulator": "netem", "busy": False, "cells": [cell("a", 1e6, way(0.02), way(0.02))]}
    busy = {"emulator": "netem", "busy": True, "tcp": [{"profile": "a", "share": 1.0}]}
    merged = merge([first, second, busy])
    assert [(one["busy"], sorted(set(one) - {"busy", "emulator"})) for one in merged] == [
        (False, ["cells"]),
        (True, ["tcp"]),
    ]
    assert [row["up"]["loss"] for row in merged[0]["cells"]] == [0.02]


def test_what_is_no_result_is_refused():
    with pytest.raises(ValueError, match="not what --json prints"):
        merge([{"cells": []}])


def test_the_standard_errors_of_bursts_are_those_of_simulated_chains():
    model, n, draw = GilbertElliott.bursty(0.05, 4), 4000, random.Random(1)
    losses, lengths = [], []
    for _ in range(300):
        bad, lost, bursts = False, 0, 0
        for _ in range(n):
            before = bad
            bad = draw.random() >= model.r if bad else draw.random() < model.p
            lost += bad
            bursts += bad and not before
        losses.append(lost / n / model.mean)
        lengths.append(lost / bursts / 4)
    expected = burst_errors(model, n)
    assert stdev(losses) == pytest.approx(expected["loss"], rel=0.15)
    assert stdev(lengths) == pytest.approx(expected["burst"], rel=0.15)


def test_the_first_full_second_is_the_first_at_nearly_full_rate():
    bins = (*[10_000] * 7, *[125_000] * 20)  # 10 Mbit/s from 0.7 s on
    assert Bulk(bins, "cubic").ramp_s(10e6) == pytest.approx(0.7)  # one slow bin in ten would be 8 % less
    assert Bulk(bins, "cubic").ramp_s(20e6) is None
    assert Bulk(bins, "cubic").goodput_bps(0.7, 1.0, 10e6) == pytest.approx(10e6)


def test_goodput_is_counted_between_moments_when_nothing_waits_behind_a_lost_packet():
    hole = [0, 0, 375_000]  # three bins' worth, all at once
    bins = (*[125_000] * 8, *hole, *[125_000] * 7, *hole, *[125_000] * 5)
    assert Bulk(bins, "cubic").goodput_bps(0.0, 1.0, 10e6) == pytest.approx(
        10e6
    )  # would end in the first hole
    assert Bulk(bins, "cubic").goodput_bps(0.9, 1.0, 10e6) == pytest.approx(
        10e6
    )  # would begin and end in one
    slow = tuple(round(0.9 * size) for size in bins)
    assert Bulk(slow, "cubic").goodput_bps(0.9, 1.0, 10e6) == pytest.approx(9e6, rel=0.01)
