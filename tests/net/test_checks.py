"""Verdicts on made-up probes, against published values, independent formulas and simulated chains."""

from __future__ import annotations

import random
from collections.abc import Set
from itertools import groupby
from statistics import mean, median, pvariance

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.net.calibration.checks import (
    burst_check,
    burst_lengths,
    clopper_pearson,
    delay_check,
    distance,
    jitter_checks,
    loss_check,
    rate_check,
)
from testbed.net.calibration.outcome import Curve, outcomes
from testbed.net.calibration.probes import Arrived
from testbed.net.calibration.traces import (
    Observation,
    curve_checks,
    delay_track_check,
    expected,
    loss_track_checks,
)
from testbed.net.emulators.netem.netem import Netem
from testbed.net.emulators.relay.impairments.delay import Jitter
from testbed.net.emulators.relay.impairments.loss import loss_of
from testbed.net.emulators.relay.orders import direction_conditions
from testbed.net.emulators.relay.userspace import Userspace
from testbed.net.profile.jitter import LAWS, spread, table
from testbed.net.profile.loss import FourState, GilbertElliott
from testbed.net.profile.profile import Direction, parse_profile
from testbed.net.profile.schedule import Schedule

GAP_S = 1e-3
LINK = Direction(rate_bps=10e6, delay_s=0.02, loss=0.01)


def arrived(delays: list[float | None], gap_s: float = GAP_S) -> Arrived:
    """Probes so far apart, each with its delay; None: lost."""
    got = [(n, n * gap_s, n * gap_s + d) for n, d in enumerate(delays) if d is not None]
    numbers, sent, arrivals = (list(column) for column in zip(*got, strict=True))
    return Arrived(len(delays), len(delays) * gap_s, 0.0, numbers, sent, arrivals)


def alike(sent: int, delay_s: float, gap_s: float = GAP_S, lost: Set[int] = frozenset()) -> Arrived:
    """Probes with the same delay."""
    return arrived([None if n in lost else delay_s for n in range(sent)], gap_s)


def test_the_rate_is_that_between_arrivals_and_not_of_the_filling():
    # 1,000 packets of 1,250 bytes, one a millisecond: 10 Mbit/s; the first 30 arrive as a burst.
    flow = alike(1000, 0.02, 1e-3)
    early = [flow.arrived_s[30] - 1e-5 * (30 - n) for n in range(30)] + flow.arrived_s[30:]
    check = rate_check("up", LINK, Arrived(1000, 1.0, 0.0, flow.numbers, flow.sent_s, early), 1250)
    assert check.measured == pytest.approx(10e6, rel=1e-3)
    assert check.ok
    assert check.low is not None
    assert check.high is not None
    assert check.low <= 10e6 <= check.high


@pytest.mark.parametrize(("factor", "ok"), [(1.02, True), (0.98, True), (1.04, False), (0.96, False)])
def test_a_rate_is_in_tolerance_up_to_three_per_cent(factor: float, ok: bool):
    assert rate_check("up", LINK, alike(1000, 0.02, 1e-3 / factor), 1250).ok is ok


def test_an_unlimited_rate_is_reported_and_not_judged():
    check = rate_check("up", Direction(), alike(1000, 0, 1e-4), 1250)
    assert check.ok is None
    assert check.measured == pytest.approx(100e6, rel=1e-3)


@pytest.mark.parametrize(("extra", "ok"), [(0.0, True), (0.0009, True), (0.0012, False), (-0.002, False)])
def test_a_delay_is_in_tolerance_up_to_a_millisecond_above(extra: float, ok: bool):
    own = 64 * 8 / 10e6  # what the probe takes to be sent is not the link's delay
    check = delay_check("up", LINK, alike(500, 0.02 + own + extra, 1e-3), 64)
    assert check.ok is ok
    assert check.measured == pytest.approx(0.02 + extra, abs=1e-6)


def test_a_few_jittery_probes_are_judged_by_what_they_can_tell():
    draw = random.Random(3)
    flow = alike(25, 0.0, 0.05)
    jittery = Arrived(
        25, 1.0, 0.0, flow.numbers, flow.sent_s, [s + draw.gauss(0.3, 0.01) for s in flow.sent_s]
    )
    assert delay_check("up", Direction(delay_s=0.3, jitter_s=0.01), jittery, 64).ok
    assert not delay_check("up", Direction(delay_s=0.2, jitter_s=0.01), jittery, 64).ok


def test_clopper_pearson_agrees_with_published_values():
    # Agresti and Coull, The American Statistician 52 (1998): 0 of 10 at 95 %: (0, 0.3085); 5 of 10: (0.1871, 0.8129)
    assert clopper_pearson(0, 10, 0.95) == pytest.approx((0, 0.3085), abs=1e-4)
    assert clopper_pearson(5, 10, 0.95) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert clopper_pearson(10, 10, 0.95)[1] == 1


@pytest.mark.parametrize(("lost", "ok"), [(20, True), (30, True), (10, True), (50, False), (0, False)])
def test_a_loss_is_in_tolerance_inside_its_binomial_interval(lost: int, ok: bool):
    assert loss_check("up", LINK, alike(2000, 0.02, 1e-3, set(range(lost)))).ok is ok


def test_any_loss_on_a_loss_free_link_is_out_of_tolerance():
    assert not loss_check("up", Direction(), alike(1000, 0, 1e-3, {500})).ok


def test_a_duplicate_does_not_hide_a_loss():
    flow = Arrived(3, 1.0, 0.0, [0, 2, 2], [0.0, 0.2, 0.2], [0.1, 0.3, 0.3])
    assert loss_check("up", Direction(), flow).measured == pytest.approx(1 / 3)


def test_nothing_arriving_is_a_verdict_and_not_a_crash():
    nothing = Arrived(100, 1.0, 0.0, [], [], [])
    checks = [rate_check("up", LINK, nothing, 1250), delay_check("up", LINK, nothing, 64)]
    assert [check.ok for check in checks] == [False, False]
    assert "nothing arrived" in str(checks[0])


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
    assert (shape.what, shape.ok) == ("jitter distribution", False)


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


def test_a_chain_is_made_of_what_one_measures():
    for chain in (GilbertElliott.bursty(0.02, 4), GilbertElliott.correlated(0.05, 0.5)):
        assert chain.mean in (pytest.approx(0.02), pytest.approx(0.05))
    assert GilbertElliott.bursty(0.02, 4).chain().burst == pytest.approx(4)
    # A loss is followed by another with 0.05 + 0.95 * 0.5.
    assert GilbertElliott.correlated(0.05, 0.5).chain().burst == pytest.approx(1 / (0.95 * 0.5))


@pytest.mark.parametrize("model", CHAINS, ids=str)
def test_bursts_and_the_spread_of_losses_are_those_of_the_relays_chain(model: GilbertElliott | FourState):
    profile = parse_profile(f"delay=1ms,loss={model}")
    chain = loss_of(direction_conditions(profile, "up"), random.Random(5))
    assert chain is not None
    lost = [chain() for _ in range(200_000)]
    bursts = [len(list(run)) for was_lost, run in groupby(lost) if was_lost]
    assert sum(lost) / len(lost) == pytest.approx(model.mean, rel=0.05)
    assert model.chain().burst == pytest.approx(mean(bursts), rel=0.05)
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
    chain = model.chain()
    assert chain.burst is None or chain.burst >= 1 - 1e-6
    assert chain.spread >= 0


def test_a_bursty_loss_is_judged_by_an_interval_that_knows_of_bursts():
    model = GilbertElliott.bursty(0.02, 10)
    asked = Direction(loss_model=model)
    chain = loss_of(direction_conditions(parse_profile(f"delay=0ms,loss={model}"), "up"), random.Random(9))
    assert chain is not None
    flows = [arrived([None if chain() else 0.0 for _ in range(2000)]) for _ in range(200)]
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
    assert probes[70] == Observation(pytest.approx(0.070), pytest.approx(0.010), 0.5, None)


def test_a_probe_that_an_outage_holds_up_is_no_evidence():
    schedule = Schedule([0.0, 0.03], 0.08, rates=[1e6, 0.0], losses=[0.0, 0.0], loop=False, scale=1.0)
    probes = expected(Direction(), schedule, arrived([0.001] * 80))
    assert len(probes) == 30


def test_delay_along_a_trace_is_judged_by_the_median_error():
    good = [Observation(n * GAP_S, 0.02, 0.0, 0.0203) for n in range(100)]
    late = [Observation(n * GAP_S, 0.02, 0.0, 0.0215) for n in range(100)]
    assert delay_track_check("up", Direction(), good).ok
    assert delay_track_check("up", Direction(), late).ok is False
    assert delay_track_check("up", Direction(delay_s=0.1, jitter_s=0.01), late).ok is None


def test_loss_along_a_trace_is_judged_in_sum_and_in_shape():
    draw = random.Random(2)
    asked = [0.01 if n % 2000 < 1000 else 0.09 for n in range(8000)]

    def probes(real: list[float]) -> list[Observation]:
        lost = [draw.random() < p for p in real]
        return [
            Observation(n * GAP_S, 0.0, a, None if gone else 0.0)
            for n, (a, gone) in enumerate(zip(asked, lost, strict=True))
        ]

    assert [check.ok for check in loss_track_checks("up", probes(asked))] == [True, True]
    assert [check.ok for check in loss_track_checks("up", probes([0.05] * 8000))] == [True, False]
    assert [check.ok for check in loss_track_checks("up", probes([2 * p for p in asked]))] == [False, False]


def curve(asked: list[float], delivered: list[int]) -> Curve:
    return Curve("up", 0.0, 0.1, tuple(asked), tuple(delivered))


def test_the_correlation_is_pearsons():
    made = curve([1000, 2000, 3000, 4000], [1100, 1900, 3200, 3800])
    # By hand: covariance 4.7e6 over the roots of 5e6 and 4.5e6.
    assert made.correlation == pytest.approx(4.7 / (5.0 * 4.5) ** 0.5)
    assert made.totals == (10_000, 10_000)


def test_shape_and_sum_are_judged_apart_and_by_emulator():
    late = curve([1000, 5000, 1000, 5000], [5000, 1000, 5000, 1000])
    assert [check.ok for check in curve_checks(late, Userspace)] == [False, True]
    short = curve([1000, 5000, 1000, 5000], [975, 4875, 975, 4875])
    assert [check.ok for check in curve_checks(short, Userspace)] == [True, False]
    assert [check.ok for check in curve_checks(short, Netem)] == [True, True]


def test_a_constant_stretch_has_no_shape_to_judge():
    assert [check.ok for check in curve_checks(curve([1000, 1000, 1000], [1200, 800, 1000]), Netem)] == [
        None,
        True,
    ]


def test_a_record_of_before_is_read_under_the_names_that_checks_have_today():
    was = {"way": "up", "low": None, "high": None, "n": 9, "ok": True, "tolerance": ""}
    checks = [
        was | {"what": what, "asked": 1.0, "measured": 1.0} for what in ("rate", "law", "curve", "total")
    ]
    (outcome,) = outcomes({"measurements": [{"profile": "lte", "attempts": [{"checks": [*checks, {}, 3]}]}]})
    names = [check.what for check in outcome.checks]
    assert names == ["rate", "jitter distribution", "rate shape", "rate trace"]
    assert outcome.check("up", "rate trace") == outcome.checks[-1]
