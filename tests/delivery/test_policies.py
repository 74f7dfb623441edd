"""Policies: they choose what their papers say; and nobody does better than who knows the link."""

from __future__ import annotations

import itertools
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policies import Played, Request, play
from testbed import kinds
from testbed.delivery.delivery import SKIP, TEXT
from testbed.delivery.policies.ewma import EWMA
from testbed.delivery.policies.fixed import Fixed
from testbed.delivery.policies.mpc import MPC, cautious
from testbed.delivery.policies.oracle import Oracle
from testbed.delivery.policies.policy import POLICIES, Arrival, Policy, Rung, Sent, Situation
from testbed.delivery.policies.prediction import Link, best_level, observed_rates
from testbed.delivery.policies.throughput import Throughput
from testbed.errors import SpecError
from testbed.net.profile.schedule import Schedule

LEVELS = ("int8", "int4", TEXT, SKIP)
#: A megabyte, half of one, a text that takes half a second, nothing.
CHUNK = (Rung(1_000_000), Rung(500_000), Rung(512, cloud_s=0.5), Rung(0))

Steps = list[tuple[float, float]]


def situation(**changes: object) -> Situation:
    values: dict[str, object] = {
        "now_s": 1.0, "deadline_s": 3.0, "levels": LEVELS, "chunks": (CHUNK,) * 2,
        "arrivals": (Arrival(1_000_000, 0.0, 1.0),),
    }  # fmt: skip
    return Situation(**{**values, **changes})  # type: ignore[arg-type]


def ascending(gaps: list[float], rates: list[float]) -> Steps:
    times = [0.0, *itertools.accumulate(gaps)]
    return list(zip(times, rates, strict=False))


rates = st.sampled_from([0.0, 1e5, 8e5, 4e6, 1e7, 8e7])
links = st.builds(
    ascending, st.lists(st.sampled_from([0.05, 0.3, 1.0, 2.5]), max_size=6), st.lists(rates, min_size=7, max_size=7)
)  # fmt: skip


@given(links, st.floats(0, 12), st.integers(0, 5_000_000))
def test_a_link_sends_when_the_schedule_of_an_emulator_would(steps: Steps, begin: float, size: int) -> None:
    times = [time for time, _ in steps]
    schedule = Schedule(times, times[-1] + 1, rates=[rate / 8 for _, rate in steps], loop=False)
    ours, theirs = Link(steps).finish(begin, size), schedule.finish(begin, size)
    assert ours == pytest.approx(theirs, abs=1e-6) or (size == 0 and ours == begin)


def test_a_link_without_a_limit_sends_at_once() -> None:
    link = Link([(0.0, 8e6), (1.0, inf), (2.0, 8e6)])
    assert [link.finish(at, 1_000_000) for at in (0.0, 0.5, 1.5, 2.0)] == [1.0, 1.0, 1.5, 3.0]


def test_rates_are_those_while_the_link_sent_a_chunk_and_no_earlier_one() -> None:
    arrivals = (
        Arrival(1_000_000, 0.0, 1.1),  # a tenth of a second on the way, the rest at 8 Mbit/s
        Arrival(512, 0.5, 1.2),  # too small to tell
        Arrival(500_000, 1.0, 1.7),  # handed over before the other had left: sent from 1.2 on
        Arrival(500_000, 5.0, 5.6),  # an idle link between
    )
    assert observed_rates(situation(arrivals=arrivals, delay_s=0.1)) == pytest.approx([8e6] * 3)


@pytest.mark.parametrize("policy", [Throughput(), EWMA(), MPC()])
def test_parts_that_are_each_too_small_to_tell_a_rate_tell_it_together(policy: Policy) -> None:
    small = (Rung(13_000), Rung(6_500), Rung(0))
    request = Request(("int8", "int4", SKIP), (small,) * 24, 2.0, delay_s=0.02)
    link = [(0.0, 1e6)]  # which takes 2.5 s for all of the better level, 1.3 s for the other
    assert play(policy, request, link).met and not play(Fixed(0), request, link).met
    few = (Arrival(13_000, 0.0, 0.124), Arrival(700, 0.1, 0.2), Arrival(13_000, 0.124, 0.248))
    assert observed_rates(situation(arrivals=few, delay_s=0.02)) == pytest.approx([26_000 * 8 / 0.152])


@pytest.mark.parametrize("policy", [Throughput(), EWMA(), MPC()])
def test_what_is_chosen_first_will_tell_the_links_rate(policy: Policy) -> None:
    rungs = (Rung(3_000_000), Rung(1_500_000), Rung(512), Rung(400_000), Rung(0))
    level = policy.choose(situation(levels=("a", "b", TEXT, "c", SKIP), chunks=(rungs,), arrivals=()))
    assert level == (1 if policy == Throughput() else 3)  # the middle, or the smallest
    assert policy.choose(situation(levels=(TEXT, SKIP), chunks=((Rung(512), Rung(0)),), arrivals=())) == 0


@pytest.mark.parametrize("policy", [Throughput(), EWMA(), MPC()])
@pytest.mark.parametrize(
    ("deadline", "sent_s", "level"),
    [
        (
            9.0,
            0.9,
            "int4",
        ),  # half a megabyte is on its way for a tenth of a second: it may well be there soon
        (9.0, 0.0, "int4"),  # for a second: at half a megabyte a second, two more are there in time
        (2.5, 0.0, TEXT),  # they are not, so the rate need not be known
        (1.6, 0.0, SKIP),  # nor is a text
        (None, 0.9, "int4"),  # which may be sooner than a text
        (None, 0.0, TEXT),  # and now cannot be
    ],
)
def test_without_a_rate_what_is_on_its_way_for_long_says_that_it_is_too_low(
    policy: Policy, deadline: float | None, sent_s: float, level: str
) -> None:
    texts = (CHUNK[1], Rung(512, cloud_s=0.5), Rung(0))
    under_way = (Sent(500_000, sent_s),)
    here = situation(
        levels=("int4", TEXT, SKIP),
        chunks=(texts,) * 2,
        arrivals=(),
        under_way=under_way,
        deadline_s=deadline,
    )
    assert here.levels[policy.choose(here)] == level


@pytest.mark.parametrize(
    ("deadline", "level"),
    [(3.0, 0), (2.9, 1), (2.0, 1), (1.99, 3), (1.0, 3)],  # two chunks at a megabyte a second, from 1 s on
)
def test_cachegens_takes_the_best_level_at_which_all_that_remains_comes_in_time(
    deadline: float, level: int
) -> None:
    assert Throughput().choose(situation(deadline_s=deadline)) == level


def test_cachegens_goes_by_the_last_chunk_alone() -> None:
    slow_then_fast = (Arrival(1_000_000, 0.0, 0.9), Arrival(1_000_000, 0.9, 1.0))
    assert Throughput().choose(situation(arrivals=slow_then_fast, deadline_s=1.21)) == 0
    assert Throughput().choose(situation(arrivals=slow_then_fast[:1], deadline_s=1.21)) == 3


def test_an_average_forgets_as_fast_as_asked_and_holds_a_part_back() -> None:
    arrivals = (Arrival(1_000_000, 0.0, 0.5), Arrival(500_000, 0.5, 1.0))  # 16, then 8 Mbit/s
    here = situation(arrivals=arrivals, deadline_s=1 + 2 / 1.5)  # two megabytes at 12 Mbit/s
    assert EWMA(alpha=0.5, safety=1.0).choose(here) == 0
    assert EWMA(alpha=0.6, safety=1.0).choose(here) == EWMA(alpha=0.5, safety=0.9).choose(here) == 1


def test_robust_mpc_discounts_by_its_greatest_recent_error() -> None:
    # Yin et al.: harmonic mean 2 / (1/8 + 1/16); it said 8 before 16 came, and was wrong by half of that.
    assert cautious([8e6, 16e6]) == pytest.approx(2 / (1 / 8e6 + 1 / 16e6) / 1.5)
    assert cautious([8e6] * 9) == 8e6
    old_error = [1e6, *[8e6] * 10]  # an error that is forgotten, as is the rate
    assert cautious(old_error) == 8e6


def test_mpc_mixes_levels_where_one_for_all_would_be_too_much_or_too_little() -> None:
    here = situation(deadline_s=2.5, chunks=(CHUNK,) * 2)  # one and a half megabytes
    assert Throughput().choose(here) == 1
    assert best_level(here, Link([(0.0, 8e6)]), 1) == 0


def test_fewer_tokens_are_left_out_among_plans_of_equal_levels() -> None:
    rungs = (Rung(1_000_000), Rung(500_000), Rung(0))
    here = situation(levels=("int8", "int4", SKIP), chunks=(rungs,) * 2, deadline_s=2.0)
    assert best_level(here, Link([(0.0, 8e6)]), 2) == 1  # and not 0, then 2


def test_without_a_deadline_the_earliest_wins_and_of_equals_the_better() -> None:
    rungs = (Rung(1_000_000), Rung(900_000), Rung(512, cloud_s=0.5))
    here = situation(deadline_s=None, levels=("int8", "int4", TEXT), chunks=(rungs,))
    assert Throughput().choose(here) == 2
    free = situation(deadline_s=None, levels=("int8", "int4", TEXT), chunks=(rungs,), rate=[(0.0, inf)])
    assert Oracle().choose(free) == 0


@pytest.mark.parametrize("policy", [Throughput(), EWMA(), MPC(), Oracle()])
def test_nothing_is_left_out_for_a_deadline_that_is_lost(policy: Policy) -> None:
    lost = situation(deadline_s=1.5, rest_s=0.6, rate=[(0.0, 8e6)])
    # Half a second a chunk either way; the oracle sends the other one while the text is computed.
    assert LEVELS[policy.choose(lost)] == ("int4" if policy == Throughput() else TEXT)


def test_what_is_under_way_comes_first() -> None:
    here = situation(deadline_s=3.0, under_way=(Sent(500_000, 1.0),))
    assert Throughput().choose(here) == 1
    busy = situation(deadline_s=3.0, under_way=(Sent(1_000, 1.0, cloud_s=2.0),))
    assert (
        Throughput().choose(busy) == 0
    )  # lost: the cloud alone needs longer; then as early as can be, and as good
    assert Throughput().choose(situation(deadline_s=3.0, cloud_free_s=2.9)) == 0
    assert (
        Throughput().choose(situation(deadline_s=3.0, chunks=((CHUNK[0]._replace(ready_s=2.5), *CHUNK[1:]),)))
        == 1
    )


def test_a_level_that_is_not_there_is_told() -> None:
    with pytest.raises(SpecError, match=r"policy fixed\(level=3\): the levels are 0 to 1: int8, text"):
        Fixed(3).check(("int8", TEXT))
    with pytest.raises(ValueError, match="has not been told"):
        Oracle().choose(situation())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fixed(level=-1)", "level is -1, but must be 0 "),
        ("ewma(alpha=0)", "alpha is 0, but must be above 0 and at most 1"),
        ("ewma(safety=1.1)", "safety is 1.1, but must be"),
        ("mpc(horizon=0)", "horizon is 0, but must be from 1 to 20 chunks"),
        ("mcp", "policy 'mcp': unknown; did you mean 'mpc'?"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        kinds.parse(text, POLICIES, "policy")
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_described_and_reads_back(name: str) -> None:
    policy = kinds.parse(name, POLICIES, "policy")
    assert str(policy) == name
    assert policy.source and policy.__doc__


# What a request comes to, by a straight loop over an emulator's schedule.


def ends(request: Request, steps: Steps, levels: tuple[int, ...]) -> float:
    times = [time for time, _ in steps]
    schedule = Schedule(times, times[-1] + 1, rates=[rate / 8 for _, rate in steps], loop=False)
    sent, cloud, before = 0.0, 0.0, ""
    for chunk, level in zip(request.chunks, levels, strict=True):
        if chunk[level].bytes:
            sent = schedule.finish(max(sent, chunk[level].ready_s), chunk[level].bytes)
        cloud = max(cloud, sent + request.delay_s) + chunk[level].cloud_s
        cloud += 0.0 if before == TEXT else chunk[level].pass_s
        before = request.levels[level]
    return cloud + request.rest_s


def worth(request: Request, levels: tuple[int, ...], end: float) -> tuple[float, ...]:
    """Less is better: a deadline met, then levels; else nothing left out, then time, then levels."""
    left_out = sum(request.levels[level] == SKIP for level in levels)
    if request.deadline_s is not None and end <= request.deadline_s + 1e-6:
        return (0, sum(levels), left_out)
    return (1, left_out, round(end, 5), sum(levels))


@st.composite
def requests(draw: st.DrawFn, most: int) -> Request:
    names = draw(st.sampled_from([LEVELS, ("int8", TEXT), ("int8", "int4", SKIP), ("int8", "int4", "int2")]))
    sizes = {"int8": 400_000, "int4": 210_000, "int2": 110_000, TEXT: 512, SKIP: 0}

    def rung(level: str, ready: float) -> Rung:
        if level in (TEXT, SKIP):
            computed = draw(st.sampled_from([0.05, 0.2, 0.6]))
            return Rung(sizes[level]) if level == SKIP else Rung(sizes[level], computed, pass_s=once)
        return Rung(draw(st.integers(sizes[level] // 2, sizes[level])), 0.01, ready)

    pace, once = draw(st.sampled_from([0.0, 0.1, 0.5])), draw(st.sampled_from([0.0, 0.15]))
    count = draw(st.integers(1, most))
    chunks = tuple(tuple(rung(level, pace * (i + 1)) for level in names) for i in range(count))
    deadline = draw(
        st.sampled_from([0.4, 1.0, 2.0, 4.0]) | (st.none() if SKIP not in names else st.just(1.5))
    )
    return Request(
        names, chunks, deadline, draw(st.sampled_from([0.0, 0.03])), draw(st.sampled_from([0.0, 0.1]))
    )


def played(policy: Policy, request: Request, steps: Steps) -> tuple[Played, tuple[float, ...]]:
    outcome = play(policy, request, steps)
    assert outcome.first_token_s == pytest.approx(ends(request, steps, outcome.levels), abs=1e-6)
    return outcome, worth(request, outcome.levels, outcome.first_token_s)


@settings(max_examples=150)
@given(requests(most=4), links)
def test_no_choice_of_levels_is_better_than_the_oracles(request: Request, steps: Steps) -> None:
    everything = itertools.product(range(len(request.levels)), repeat=len(request.chunks))
    best = min(worth(request, levels, ends(request, steps, levels)) for levels in everything)
    assert played(Oracle(), request, steps)[1] == pytest.approx(best, abs=2e-5)


@settings(max_examples=60)
@given(requests(most=12), links, st.data())
def test_no_policy_beats_the_oracle(request: Request, steps: Steps, data: st.DataObject) -> None:
    _, best = played(Oracle(), request, steps)
    others = [Throughput(), EWMA(), EWMA(0.2, 1.0), MPC(), MPC(1), *map(Fixed, range(len(request.levels)))]
    for policy in others:
        assert best <= tuple(each + 2e-5 for each in played(policy, request, steps)[1])


@settings(max_examples=60)
@given(requests(most=4), links, st.integers(0, 3))
def test_a_plan_with_one_level_behind_its_horizon_is_the_best_of_all_such(
    request: Request, steps: Steps, ahead: int
) -> None:
    free, tied = min(ahead, len(request.chunks)), len(request.chunks) - ahead
    choices = itertools.product(range(len(request.levels)), repeat=free + (tied > 0))
    plans = [(*levels, *([levels[-1]] * (tied - 1))) for levels in choices]
    worths = {levels: worth(request, levels, ends(request, steps, levels)) for levels in plans}
    first = best_level(
        Situation(0.0, request.deadline_s, request.levels, request.chunks, delay_s=request.delay_s, rest_s=request.rest_s),
        Link(steps),
        ahead,
    )  # fmt: skip
    ours = min(value for levels, value in worths.items() if levels[0] == first)
    assert ours == pytest.approx(min(worths.values()), abs=2e-5)


def test_a_long_context_is_planned_in_time_to_be_of_use() -> None:
    rungs = (Rung(760_000), Rung(460_000), Rung(115_000), Rung(128, cloud_s=0.09), Rung(0))
    steps = [(0.1 * i, 1e6 * (20 + 15 * (i % 7))) for i in range(1200)]
    long = Request(("int8", "int4", "int2", TEXT, SKIP), (rungs,) * 128, 8.0, 0.02, 0.1)
    outcome = play(Oracle(), Request(long.levels, long.chunks[:16], 1.5, 0.02, 0.1), steps)
    assert outcome.met
    first = Situation(0.0, 8.0, long.levels, long.chunks, delay_s=0.02, rest_s=0.1, rate=steps)
    assert 0 <= Oracle().choose(first) < 5


@pytest.mark.parametrize("deadline", [0.2, 5.0, None])
@pytest.mark.parametrize(("policy", "chunks"), [(Oracle(), 32), (Oracle(), 256), (MPC(20), 32)])
def test_planning_among_the_most_levels_stays_a_small_part_of_a_request(
    policy: Policy, chunks: int, deadline: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = 0
    finish = Link.finish

    def counted(link: Link, begin_s: float, size: float) -> float:
        nonlocal followed
        followed += 1
        return finish(link, begin_s, size)

    monkeypatch.setattr(Link, "finish", counted)
    levels = (*(f"int{n}" for n in range(14)), TEXT, SKIP)
    caches = (200_000 // (n + 1) + 997 * (n % 5) for n in range(14))
    rungs = (*(Rung(size, 0.002) for size in caches), Rung(64, 0.03, pass_s=0.1), Rung(0))
    steps = [(0.1 * i, 1e6 * (2 + 3 * (i % 7))) for i in range(600)]
    arrivals = (Arrival(100_000, 0.0, 0.05),)
    request = Situation(
        0.1, deadline, levels, (rungs,) * chunks, arrivals, delay_s=0.01, margin_s=0.05, rate=steps
    )
    assert 0 <= policy.choose(request) < len(levels)
    assert followed <= 20_000  # as docs/pipeline.md says
