"""The server against queueing theory, and what each discipline does with whom."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.load.poisson import Poisson
from testbed.serving.job import Job
from testbed.serving.server import Server, simulate
from testbed.serving.serving import parse


def alone(jobs: Sequence[Job]) -> float:
    return sum(job.token_s[job.told] for job in jobs)


def shared(jobs: Sequence[Job]) -> float:
    """One pass for all."""
    return max(job.token_s[job.told] for job in jobs)


def served(text: str, offered: Sequence[tuple[float, Job]], step: Callable[..., float] = alone) -> list[Job]:
    return simulate(Server(parse(text), step), offered)


def waits(rate: float, service: Callable[[random.Random], float], seed: int) -> float:
    """The mean wait of a queue's customers, of one of several long stretches that know nothing of each other."""
    numbers = random.Random(seed)
    arrivals = Poisson(rate).arrivals(["n1"], 4000 / rate, f"{seed}")
    jobs = [(at, Job(service(numbers), 0.0)) for at, _ in arrivals]
    return fmean(job.began - job.arrived for job in served("fifo", jobs)[200:])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("law", ["M/D/1", "M/M/1"])
def test_waits_are_those_of_queueing_theory(law: str, load: float) -> None:
    # Pollaczek and Khinchine: load * service / (2 (1 - load)) * (1 + squared variation).
    times = {"M/D/1": lambda numbers: 1.0, "M/M/1": lambda numbers: numbers.expovariate(1.0)}
    expected = load / (2 * (1 - load)) * {"M/D/1": 1, "M/M/1": 2}[law]
    found = [waits(load, times[law], seed) for seed in range(20)]
    # t with 19 degrees of freedom, at 99.9 %: fixed seeds, so that this holds or not, always.
    assert fmean(found) == pytest.approx(expected, abs=3.88 * stdev(found) / 20**0.5)


def test_fifo_serves_in_the_order_of_arrival_each_up_to_its_last_token() -> None:
    first, second = Job(1.0, 0.5, (0.25, 0.25)), Job(1.0, 0.5)
    served("fifo", [(0.0, first), (0.1, second)])
    assert (first.began, first.rebuilt, first.first, first.done) == (0.0, 1.0, 1.5, 2.0)
    assert (second.began, second.first, second.done) == (2.0, 3.5, 3.5)


def test_shortest_lets_a_short_request_pass_those_that_wait_and_no_other() -> None:
    running, long, short = Job(5.0, 0.0), Job(3.0, 0.0), Job(1.0, 0.0)
    served("shortest", [(0.0, running), (0.1, long), (0.2, short)])
    assert (running.began, short.began, long.began) == (0.0, 5.0, 6.0)


def test_a_batch_decodes_those_who_are_there_in_one_pass_and_lets_others_in_between_passes() -> None:
    first, second = Job(1.0, 1.0, (1.0,) * 4), Job(1.0, 1.0, (1.0,) * 2)
    served("batch(max=2)", [(0.0, first), (2.5, second)], shared)
    # Up to 3 the first one by itself; until 5 the second is read; then two passes of both, and one more.
    assert (first.first, second.began, second.first) == (2.0, 3.0, 5.0)
    assert (second.done, first.done) == (7.0, 8.0)
    assert first.together == second.together == 2


def test_a_batch_takes_no_more_than_its_most_at_a_time() -> None:
    jobs = [(0.0, Job(0.0, 0.0, (1.0,) * 3)) for _ in range(5)]
    answered = served("batch(max=2)", jobs, shared)
    assert [job.done for job in answered] == [3, 3, 6, 6, 9]


def test_who_finds_no_room_is_turned_away_with_the_reason_and_takes_none() -> None:
    server = Server(parse("fifo(waiting=1)"), alone)
    jobs = [Job(1.0, 0.0) for _ in range(3)]
    assert server.offer(jobs[0], 0.0) == ""
    work = server.begin(0.0)
    assert work is not None
    assert server.offer(jobs[1], 0.1) == ""
    assert server.offer(jobs[2], 0.2) == "1 requests wait already, which are as many as may"
    assert server.refused == 1


def test_who_is_waited_for_no_longer_leaves_the_queue_and_its_memory_unless_it_is_being_served() -> None:
    server = Server(parse("fifo(memory=3b)"), alone)
    served_now, waiting = Job(1.0, 0.0, memory=1), Job(1.0, 0.0, memory=2)
    assert server.offer(served_now, 0.0) == server.offer(waiting, 0.0) == ""
    assert server.begin(0.0) is not None
    assert server.withdraw(waiting) and not server.withdraw(served_now)
    assert server.memory == 1 and server.waiting == []


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 100), st.floats(0, 2)), max_size=40))
def test_memory_is_never_more_than_allowed_and_all_of_it_is_free_in_the_end(
    offered: list[tuple[float, int, float]],
) -> None:
    server, at, jobs = Server(parse("batch(max=3, memory=100b)"), shared), 0.0, []
    for gap, memory, takes in offered:
        at += gap
        jobs.append((at, Job(takes, takes, (takes, takes), memory=memory)))
    seen: list[int] = []

    class Watched(Server):
        def begin(self, now: float):  # type: ignore[no-untyped-def]
            seen.append(self.memory)
            return super().begin(now)

    server = Watched(server.serving, shared)
    answered = simulate(server, jobs)
    assert all(memory <= 100 for memory in seen)
    assert server.memory == 0 and len(answered) + server.refused == len(jobs)
    assert all(job.arrived <= job.began <= job.rebuilt <= job.first <= job.done for job in answered)


@given(
    st.sampled_from(["fifo", "shortest", "batch(max=4)"]),
    st.lists(st.tuples(st.floats(0.01, 3), st.floats(0.01, 2), st.integers(0, 3)), min_size=1, max_size=30),
)
def test_no_discipline_loses_time_or_does_two_things_at_once(
    text: str, offered: list[tuple[float, float, int]]
) -> None:
    at, jobs = 0.0, []
    for gap, takes, tokens in offered:
        at += gap
        jobs.append((at, Job(takes, takes, (takes,) * tokens)))
    answered = served(text, jobs)
    # A server that never idles while there is work ends when an ideal one does: a pass here costs as much as its parts.
    ideal = 0.0
    for came, job in jobs:
        ideal = max(ideal, came) + job.work_s
    assert max(job.done for job in answered) == pytest.approx(ideal)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("fifo", "fifo"),
        ("batch(max=8)", "batch"),
        ("batch(max=4, memory=40gb)", "batch(memory=40gb, max=4)"),
        ("shortest(waiting=10)", "shortest(waiting=10)"),
    ],
)
def test_each_has_one_canonical_text(written: str, canonical: str) -> None:
    assert str(parse(written)) == canonical
    assert parse(canonical) == parse(written)


@pytest.mark.parametrize(
    ("written", "why"),
    [("lifo", "unknown; did you mean 'fifo'"), ("batch(max=0)", "1 to 1024"), ("fifo(memory=8)", "no unit")],
)
def test_a_mistake_is_told_with_its_place(written: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        parse(written)
