"""Jitter, bursts, and traces of delay and loss: verdicts on made-up probes, against independent formulas and simulated chains."""

from __future__ import annotations

import random
from itertools import groupby
from statistics import mean, median, pvariance

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.net.calibration.checks import (
    burst_check,
    burst_lengths,
    delay_check,
    distance,
    jitter_checks,
    loss_check,
)
from testbed.net.calibration.probes import Arrived
from testbed.net.calibration.traces import Probe, delay_track_check, expected, loss_track_checks
from testbed.net.emulators.relay.jitter import Jitter
from testbed.net.emulators.relay.loss import loss_of
from testbed.net.emulators.relay.orders import direction_conditions
from testbed.net.profile.jitter import LAWS, spread, table
from testbed.net.profile.loss import FourState, GilbertElliott
from testbed.net.profile.profile import Direction, parse_profile
from testbed.net.profile.schedule import Schedule

GAP_S = 1e-3


def arrived(delays: list[float | None]) -> Arrived:
    """Probes a millisecond apart, each with its delay; None: lost."""
    got = [(n, n * GAP_S, n * GAP_S + d) for n, d in enumerate(delays) if d is not None]
    numbers, sent, arrivals = (list(column) for column in zip(*got, strict=True))
    return Arrived(len(delays), 1.0, 0.0, numbers, sent, arrivals)


def jittery(direction: Direction, n: int, seed: int = 1) -> Arrived:
    draw = Jitter(direction.jitter_s, table(direction.jitter_law), random.Random(seed))
    return arrived([direction.delay_s + draw.deviation() for _ in range(n)])


@pytest.mark.parametrize("law", LAWS)
def test_jitter_of_the_law_that_was_asked_for_is_in_tolerance_and_of_another_size_is_not(law: str):
    asked = Direction(delay_s=0.03, jitter_s=0.004, jitter_law=law)
    verdicts = [
        check.ok for seed in range(20) for check in jitter_checks("up", asked, jittery(asked, 250, seed), 44)
    ]
    assert verdicts.count(False) <= 1  # of 40 at 99 %, with some slack
    twice = Direction(delay_s=0.03, jitter_s=0.008, jitter_law=law)
    assert [check.ok for check in jitter_checks("up", asked, jittery(twice, 250), 44)] == [False, False]
    steady = arrived([0.03] * 250)
    assert [check.ok for check in jitter_checks("up", asked, steady, 44)] == [False, False]


def test_a_few_packets_that_the_machine_held_up_are_no_jitter():
    asked = Direction(delay_s=0.03, jitter_s=0.004)
    flow = jittery(asked, 300)
    late = [a + (0.1 if n % 100 == 50 else 0.0) for n, a in enumerate(flow.arrived_s)]
    held_up = Arrived(300, 1.0, 0.0, flow.numbers, flow.sent_s, late)
    assert [check.ok for check in jitter_checks("up", asked, held_up, 44)] == [True, True]


def test_a_law_of_the_same_deviation_and_another_shape_is_found_out_by_its_distance():
    asked = Direction(delay_s=0.03, jitter_s=0.004, jitter_law="pareto")
    normal = Direction(delay_s=0.03, jitter_s=0.004)
    deviation, shape = jitter_checks("up", asked, jittery(normal, 1000), 44)
    assert (deviation.what, deviation.ok) == ("jitter", True)
    assert (shape.what, shape.ok) == ("law", False)


def test_the_median_asked_for_is_that_of_the_law():
    asked = Direction(delay_s=0.03, jitter_s=0.008, jitter_law="pareto")
    check = delay_check("up", asked, jittery(asked, 2000), 44)
    drawn = jittery(asked, 50_000, seed=2)
    middle = median(a - s for s, a in zip(drawn.sent_s, drawn.arrived_s, strict=True))
    assert check.asked == pytest.approx(middle, abs=0.0001)
    assert check.asked < 0.03 - 0.002  # its mean is 30 ms
    assert check.ok


def test_few_probes_are_reported_and_not_judged():
    asked = Direction(delay_s=0.03, jitter_s=0.004)
    assert [check.ok for check in jitter_checks("up", asked, jittery(asked, 20), 44)] == [None, None]
    assert jitter_checks("up", Direction(delay_s=0.03), arrived([0.03] * 100), 44) == []


def test_delays_below_nothing_are_cut_in_what_is_expected_too():
    law = spread("normal", 0.01, 0.01)
    assert min(law.delays) == 0
    assert law.deviation_s < 0.01


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=60), st.lists(st.floats(-3, 3), min_size=1, max_size=60)
)
def test_the_distance_is_kolmogorovs(sample: list[float], law: list[float]):
    law.sort()
    points = sorted({*sample, *law})
    gaps = [
        abs(sum(x <= p for x in sample) / len(sample) - sum(x <= p for x in law) / len(law)) for p in points
    ]
    assert distance(sample, law, 0.0) == pytest.approx(max(gaps), abs=1e-12)
    assert distance(sample, law, 10.0) == 0


CHAINS = (
    GilbertElliott.bursty(0.05, 4),
    GilbertElliott.correlated(0.1, 0.25),
    GilbertElliott(0.02, 0.2, 0.8, 0.01),
    FourState(0.02, 0.2, 0.1, 0.3, 0.01),
    FourState(0.0, 0.2, p14=0.05),
)


@pytest.mark.parametrize("model", CHAINS, ids=str)
def test_bursts_and_the_spread_of_losses_are_those_of_the_relays_chain(model: GilbertElliott | FourState):
    profile = parse_profile(f"delay=1ms,loss={model}")
    chain = loss_of(direction_conditions(profile, "up"), random.Random(5))
    assert chain is not None
    lost = [chain.lost() for _ in range(200_000)]
    bursts = [len(list(run)) for was_lost, run in groupby(lost) if was_lost]
    assert model.burst == pytest.approx(mean(bursts), rel=0.05)
    blocks = [sum(lost[i : i + 1000]) for i in range(0, len(lost), 1000)]
    independent = 1000 * model.mean * (1 - model.mean)
    assert model.chain().spread == pytest.approx(
        pvariance(blocks) / independent, rel=0.4
    )  # 200 blocks: 10 % each


@given(*[st.floats(0, 1)] * 5)
def test_any_chain_has_a_burst_and_a_spread_or_none(
    p13: float, p31: float, p32: float, p23: float, p14: float
):
    try:
        # Most draws of five would not do: two of them sum up to more than one.
        model = FourState(p13, p31, p32 * (1 - p31), p23, p14 * (1 - p13))
    except SpecError:
        assume(False)
        return
    assert model.burst is None or model.burst >= 1 - 1e-6
    assert model.chain().spread >= 0


def test_a_bursty_loss_is_judged_by_an_interval_that_knows_of_bursts():
    model = GilbertElliott.bursty(0.02, 10)
    asked = Direction(loss_model=model)
    chain = loss_of(direction_conditions(parse_profile(f"delay=0ms,loss={model}"), "up"), random.Random(9))
    assert chain is not None
    flows = [arrived([None if chain.lost() else 0.0 for _ in range(2000)]) for _ in range(200)]
    checks = [loss_check("up", asked, flow) for flow in flows]
    # Independent losses' interval is too narrow by the root of some 19, and would fail half of them.
    assert sum(check.ok is False for check in checks) <= 8


def test_bursts_are_counted_as_runs_and_judged_by_their_mean():
    flow = arrived([0.0, None, None, 0.0, None, 0.0, 0.0, None])
    assert burst_lengths(flow) == [2, 1, 1]
    pattern: list[float | None] = [0.0] * 10 + [None] * 4
    model = GilbertElliott.bursty(0.25, 4)
    assert burst_check("up", model, arrived(pattern * 40)).ok
    assert burst_check("up", GilbertElliott.bursty(0.25, 8), arrived(pattern * 40)).ok is False
    assert burst_check("up", model, arrived(pattern * 5)).ok is None  # too few
    assert burst_check("up", model, arrived([0.0] * 50)).measured is None


def test_probes_are_beside_what_the_trace_says_at_their_time():
    schedule = Schedule([0.0, 0.05], 0.1, delays=[0.020, 0.010], losses=[0.0, 0.5], loop=False)
    delays: list[float | None] = [0.020] * 50 + [0.010] * 50
    for number in range(
        50, 60
    ):  # they may not overtake those of before: all arrive when the last of these does
        delays[number] = max(0.010, 0.049 + 0.020 - number * GAP_S)
    delays[70] = None
    probes = expected(Direction(), schedule, arrived(delays))
    assert len(probes) == 100
    assert all(p.delay_s is None or p.delay_s == pytest.approx(p.asked_delay_s, abs=1e-9) for p in probes)
    assert [p.asked_loss for p in probes[::50]] == [0.0, 0.5]
    assert probes[70] == Probe(pytest.approx(0.070), pytest.approx(0.010), 0.5, None)


def test_a_probe_that_an_outage_holds_up_is_no_evidence():
    schedule = Schedule([0.0, 0.03], 0.08, rates=[1e6, 0.0], losses=[0.0, 0.0], loop=False, scale=1.0)
    probes = expected(Direction(), schedule, arrived([0.001] * 80))
    assert len(probes) == 30


def test_delay_along_a_trace_is_judged_by_the_median_error():
    good = [Probe(n * GAP_S, 0.02, 0.0, 0.0203) for n in range(100)]
    late = [Probe(n * GAP_S, 0.02, 0.0, 0.0215) for n in range(100)]
    assert delay_track_check("up", Direction(), good).ok
    assert delay_track_check("up", Direction(), late).ok is False
    assert delay_track_check("up", Direction(delay_s=0.1, jitter_s=0.01), late).ok is None


def test_loss_along_a_trace_is_judged_in_sum_and_in_shape():
    draw = random.Random(2)
    asked = [0.01 if n % 2000 < 1000 else 0.09 for n in range(8000)]

    def probes(real: list[float]) -> list[Probe]:
        lost = [draw.random() < p for p in real]
        return [
            Probe(n * GAP_S, 0.0, a, None if gone else 0.0)
            for n, (a, gone) in enumerate(zip(asked, lost, strict=True))
        ]

    assert [check.ok for check in loss_track_checks("up", probes(asked))] == [True, True]
    assert [check.ok for check in loss_track_checks("up", probes([0.05] * 8000))] == [True, False]
    assert [check.ok for check in loss_track_checks("up", probes([2 * p for p in asked]))] == [False, False]
