"""The gate of compute: what it measures on real endpoints, what it complains of, and what it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.endpoints.protocol import Computed
from testbed.errors import EndpointError
from testbed.experiment import compute
from testbed.experiment.compute import Gate
from testbed.experiment.deployment import Pair
from tests.endpoints.pair import started
from tests.tiny_models import tiny_model_directory


class Told:
    """Sides whose times and shares are given, one after the other; the last ones stay."""

    def __init__(self, **given: list[tuple[float, float | None]]) -> None:
        self.given = given
        self.asked = 0

    def compute(self, side: str) -> Computed:
        self.asked += 1
        own = self.given.get(side, [(0.1, 1.0)])
        seconds, share = own.pop(0) if len(own) > 1 else own[0]
        return Computed(128, seconds, share)


def gate(sides: Told, alike: bool = True) -> tuple[Gate, list[dict[str, Any]]]:
    written: list[dict[str, Any]] = []
    return Gate(sides, alike, written.append), written


def test_a_quiet_machine_passes_without_a_word_and_every_measurement_is_kept() -> None:
    made, written = gate(Told())
    made.open(accept=False)
    assert made.complaints == []
    made.between()  # the last time was just now
    made.close()
    kept = json.loads(json.dumps(written[-1]))["measurements"]
    assert len(kept) == 2
    assert kept[0]["ratio"] == 1.0 and kept[0]["edge"]["median_s"] == 0.1 and kept[0]["complaints"] == []
    assert {"load", "pressure", "steal", "measured_at"} <= set(kept[0])


@pytest.mark.parametrize(
    ("edge", "said"),
    [
        ((0.3, 1.0), "the edge takes 3.00 times as long as the cloud"),
        ((0.1, 0.4), "the edge had a processor for 40%"),
    ],
)
def test_a_machine_that_is_grossly_unfair_stops_the_run_unless_that_is_accepted(
    edge: tuple[float, float], said: str
) -> None:
    made, written = gate(Told(edge=[edge]))
    with pytest.raises(EndpointError, match=rf"{said}.*--accept-uncalibrated"):
        made.open(accept=False)
    assert len(written[-1]["measurements"]) == 2  # one more chance
    made, _ = gate(Told(edge=[edge]))
    made.open(accept=True)
    assert any(said in complaint for complaint in made.complaints)


def test_what_is_out_of_tolerance_and_not_gross_is_told_and_stops_nothing() -> None:
    made, _ = gate(Told(edge=[(0.14, 0.75)]))
    made.open(accept=False)
    assert made.complaints == [
        "the edge had a processor for 75% of the time it wanted one",
        "the edge takes 1.40 times as long as the cloud",
    ]


def test_a_disturbance_that_is_gone_the_second_time_stops_nothing() -> None:
    made, _ = gate(Told(edge=[(0.5, 0.2)] * 6 + [(0.1, 1.0)]))
    made.open(accept=False)
    assert made.complaints == []


def test_drift_since_the_beginning_is_told_also_of_sides_that_are_not_alike() -> None:
    made, _ = gate(Told(cloud=[(0.01, None)] * 6 + [(0.02, None)]), alike=False)
    made.open(accept=False)
    assert made.complaints == []
    made.close()
    assert made.complaints == ["the cloud takes 2.00 times as long as before the trials"]


def test_between_trials_measuring_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(compute, "time", SimpleNamespace(monotonic=lambda: now))

    class Slow(Told):
        def compute(self, side: str) -> Computed:
            nonlocal now
            now += 0.5
            return super().compute(side)

    sides = Slow()
    made, _ = gate(sides)
    made.open(accept=False)
    began, asked = now, sides.asked
    while now < began + 2000:
        now += 1.0  # a trial
        made.between()
    measuring = 0.5 * (sides.asked - asked)
    assert 0.01 * 2000 < measuring < 0.04 * 2000


def test_both_endpoints_measure_the_same_by_their_own_pace_whatever_slows_them(tmp_path: Path) -> None:
    with started(tmp_path, tiny_model_directory("llama", tmp_path / "model"), edge=50.0) as both:
        pair = Pair(SimpleNamespace(scenario=None), both.edge, both.cloud)  # type: ignore[arg-type]
        measured = compute.measure(pair, 5)
    assert measured.tokens == 128
    assert measured.edge.least_s < 10 * measured.cloud.most_s
    assert measured.edge.least_s <= measured.edge.median_s <= measured.edge.most_s
    assert measured.edge.share is None or 0 < measured.edge.share <= 1


def test_a_processor_that_is_shared_shows(tmp_path: Path) -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count how long threads wait for a processor")
    code = (
        "import sys; from testbed.models.loading import load_model; from testbed.endpoints.side import measure\n"
        "model = load_model(sys.argv[1], 'cpu', threads=1)\n"
        "print(sorted(measure(model).share for _ in range(15))[7])"
    )
    core = str(min(os.sched_getaffinity(0)))
    model = str(tiny_model_directory("llama", tmp_path / "model"))
    with subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", "while True: pass"]) as busy:
        try:
            shares = subprocess.run(
                ["taskset", "-c", core, sys.executable, "-c", code, model],
                capture_output=True, text=True, check=True, timeout=300,
            ).stdout  # fmt: skip
        finally:
            busy.kill()
    assert float(shares) < 0.95
