"""Loads: how they are written, and when requests come up."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.load.arrivals import Arrivals
from testbed.load.closed import Closed
from testbed.load.load import Open, parse
from testbed.load.poisson import Poisson
from testbed.load.rounds import Rounds


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("sequential", "sequential"),
        ("closed", "closed"),
        ("closed( think = 1000ms, clients=8 )", "closed(clients=8, think=1s)"),
        ("poisson(rate=2/s)", "poisson(rate=2/s)"),
        ("poisson(rate=90/min)", "poisson(rate=1.5/s)"),
        ("rounds(every=8000ms)", "rounds(every=8s)"),
        ("arrivals:some/file.txt", "arrivals:some/file.txt"),
    ],
)
def test_each_has_one_canonical_text(written: str, canonical: str) -> None:
    assert str(parse(written)) == canonical
    assert parse(canonical) == parse(written)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("clsoed", r"load 'clsoed': unknown; did you mean 'closed'\?"),
        ("poisson", r"poisson needs rate"),
        ("poisson(rate=2)", r"rate '2': write how many there are in which time, such as 2/s"),
        ("poisson(rate=0/s)", r"rate is 0/s, but must be more than 0/s"),
        ("closed(clients=-1)", r"clients is -1, but must be 0 to 1024"),
        ("closed(think=1)", r"has no unit"),
        ("arrivals:", r"arrivals: which file is missing; write arrivals:FILE"),
        ("rounds", r"rounds needs every"),
        ("rounds(every=0s)", r"every is 0ms, but must be from 1ms to an hour"),
    ],
)
def test_a_mistake_is_told_with_its_place(written: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        parse(written)


@given(st.floats(1e-3, 1e5))
def test_a_rate_reads_back_as_it_was_written(rate: float) -> None:
    load = Poisson(rate)
    assert parse(str(load)) == load


@given(st.floats(0.01, 50), st.integers(1, 64), st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_arrivals_in_order_and_another_one_others(
    rate: float, edges: int, seed: int
) -> None:
    names = [f"n{number}" for number in range(edges)]
    first, again, other = (Poisson(rate).arrivals(names, 20, str(s)) for s in (seed, seed, seed + 1))
    assert first == again
    assert not first or first != other
    assert all(0 <= at < 20 and 0 <= edge < edges for at, edge in first)
    assert all(a.at <= b.at for a, b in itertools.pairwise(first))


def test_a_poisson_process_has_its_rate_and_its_gaps_are_exponential() -> None:
    arrivals = Poisson(5.0).arrivals(["a", "b"], 4000, "s")
    gaps = [b.at - a.at for a, b in itertools.pairwise(arrivals)]
    # Of n = 20,000 gaps the mean's standard error is 0.7 %, that of the share beyond the mean 0.34 points; four of them.
    assert fmean(gaps) == pytest.approx(1 / 5, rel=0.03)
    assert fmean(gap > 1 / 5 for gap in gaps) == pytest.approx(0.3679, abs=0.014)
    assert fmean(edge for _, edge in arrivals) == pytest.approx(0.5, abs=0.015)


def test_more_than_an_episode_holds_is_refused() -> None:
    with pytest.raises(SpecError, match="about 6,000,000 requests; an episode has at most 200,000"):
        Poisson(1000.0).arrivals(["a"], 6000, "s")


def test_clients_are_spread_over_the_edges_and_begin_within_their_time_to_think() -> None:
    clients = Closed(5, 2.0).starting(2, "s")
    assert [client.edge for client in clients] == [0, 1, 0, 1, 0]
    assert all(0 <= client.at <= 2 for client in clients)
    assert clients == Closed(5, 2.0).starting(2, "s") != Closed(5, 2.0).starting(2, "t")
    assert len(Closed().starting(7, "s")) == 7


def test_in_a_round_all_edges_ask_at_once() -> None:
    found = Rounds(2.0).arrivals(["a", "b"], 5.9, "s")
    assert found == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1)]
    assert len(Rounds(2.0).arrivals(["a"], 6.0, "s")) == 3
    with pytest.raises(SpecError, match="about 6,400,000 requests; an episode has at most 200,000"):
        Rounds(0.001).arrivals(["a"] * 64, 100, "s")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "came.txt"
    path.write_text("# seconds, edge\n0\n0.5 n2\n\n0.5, n1  # at once\n9\n")
    return path


def test_a_file_says_when_and_where_and_edges_take_turns_where_it_does_not(file: Path) -> None:
    load = parse(f"arrivals:{file}")
    assert isinstance(load, Open)
    assert load.arrivals(["n1", "n2"], 9, "") == [(0, 0), (0.5, 1), (0.5, 0)]
    assert load.arrivals(["n1", "n2"], 10, "")[-1] == (9, 1)


def test_a_file_may_be_from_where_lines_end_otherwise_and_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "came.txt"
    path.write_bytes(b"\xef\xbb\xbf0.5 n2\r\n1e0\r\n")
    assert Arrivals(str(path)).bound().arrivals(["n1", "n2"], 9, "") == [(0.5, 1), (1.0, 1)]


def test_a_file_is_known_by_what_it_says_wherever_it_lies(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(file.read_text())
    assert Arrivals(str(file)).identity == Arrivals(str(copy)).identity
    copy.write_text("0\n")
    assert Arrivals(str(file)).identity != Arrivals(str(copy)).identity


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0\nsoon\n", r"line 2: write seconds, and perhaps an edge"),
        ("-1\n", r"line 1: write seconds"),
        ("1_0\n", r"line 1: write seconds"),
        ("inf\n", r"line 1: write seconds"),
        ("nan\n", r"line 1: write seconds"),
        ("2\n1\n", r"line 2: 1 s behind 2 s; times must ascend"),
        ("0 n1 n2\n", r"line 1: write seconds"),
        ("# nothing\n", r"has no arrivals"),
        ("0 n9\n", r"line 1: there is no edge 'n9'; there is n1"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "came.txt"
    path.write_text(text)
    with pytest.raises(SpecError, match=why):
        Arrivals(str(path)).bound().arrivals(["n1"], 10, "")


@given(st.binary(max_size=200))
def test_any_file_is_arrivals_or_one_line_of_complaint(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        found = Arrivals(str(path)).bound().arrivals(["n1"], 1e6, "")
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert all(a.at <= b.at for a, b in itertools.pairwise(found))
