"""The gate of compute: what it measures on real endpoints, what it complains of, and what it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.endpoints.protocol import Computed
from testbed.errors import EndpointError
from testbed.experiment import gate
from testbed.experiment.compute import Start


class Given:
    """Sides whose times and shares are given, one after the other; the last ones stay."""

    def __init__(self, **given: list[tuple[float, float | None]]) -> None:
        self.given = given
        self.calls = 0

    def compute(self, side: str) -> Computed:
        self.calls += 1
        own = self.given.get(side, [(0.1, 1.0)])
        seconds, share = own.pop(0) if len(own) > 1 else own[0]
        return Computed(128, seconds, share)


def gate_of(sides: Given, alike: bool = True) -> tuple[gate.Gate, list[Start]]:
    written: list[Start] = []
    return gate.Gate(sides, alike, written.append), written


def test_a_quiet_machine_passes_without_a_word_and_every_measurement_is_kept() -> None:
    opened, written = gate_of(Given())
    opened.open(accept=False)
    assert opened.complaints == ()
    opened.between()  # the last time was just now
    opened.close()
    kept = json.loads(json.dumps(written[-1].record()))["measurements"]
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
    opened, written = gate_of(Given(edge=[edge]))
    with pytest.raises(EndpointError, match=rf"{said}.*--accept-uncalibrated"):
        opened.open(accept=False)
    assert len(written[-1].measurements) == 2  # one more chance
    opened, _ = gate_of(Given(edge=[edge]))
    opened.open(accept=True)
    assert any(said in complaint for complaint in opened.complaints)


@pytest.mark.parametrize(
    ("given", "alike", "before", "behind"),
    [
        (  # out of tolerance, and not gross
            {"edge": [(0.14, 0.75)]},
            True,
            ("the edge had a processor for 75% of the time it wanted one", "the edge takes 1.40 times as long as the cloud"),
            None,
        ),
        ({"edge": [(0.5, 0.2)] * 6 + [(0.1, 1.0)]}, True, (), None),  # a disturbance that is gone the second time
        (  # drift, also of sides that are not alike
            {"cloud": [(0.01, None)] * 6 + [(0.02, None)]},
            False,
            (),
            ("the cloud takes 2.00 times as long as before the trials",),
        ),
    ],
)  # fmt: skip
def test_what_is_out_of_tolerance_is_told_and_stops_nothing(
    given: dict[str, list[Any]], alike: bool, before: tuple[str, ...], behind: tuple[str, ...] | None
) -> None:
    opened, _ = gate_of(Given(**given), alike)
    opened.open(accept=False)
    assert opened.complaints == before
    if behind is not None:
        opened.close()
        assert opened.complaints == behind


def test_between_trials_measuring_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: now))

    class Slow(Given):
        def compute(self, side: str) -> Computed:
            nonlocal now
            now += 0.5
            return super().compute(side)

    sides = Slow()
    opened, _ = gate_of(sides)
    opened.open(accept=False)
    began, calls = now, sides.calls
    while now < began + 2000:
        now += 1.0  # a trial
        opened.between()
    measuring = 0.5 * (sides.calls - calls)
    assert 0.01 * 2000 < measuring < 0.04 * 2000


def test_a_processor_that_is_shared_shows(tiny_model: Callable[[str], Path]) -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count how long threads wait for a processor")
    code = (
        "import sys; from testbed.models.loading import load_model; from testbed.endpoints.side import measure\n"
        "model = load_model(sys.argv[1], 'cpu', threads=1)\n"
        "print(sorted(measure(model).share for _ in range(7))[3])"
    )
    core = str(min(os.sched_getaffinity(0)))
    with subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", "while True: pass"]) as busy:
        try:
            shares = subprocess.run(
                ["taskset", "-c", core, sys.executable, "-c", code, tiny_model("llama")],
                capture_output=True, text=True, check=True, timeout=300,
            ).stdout  # fmt: skip
        finally:
            busy.kill()
    assert float(shares) < 0.95
