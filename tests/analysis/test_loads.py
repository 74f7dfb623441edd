"""Loads in numbers: against queueing theory, where the answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from testbed.analysis import loads, recommend_load, settings
from testbed.analysis.figures import NotInThisRun, figure
from testbed.analysis.figures.load_timeline import waiting
from testbed.analysis.run import load
from testbed.stats import dependent
from tests.analysis.conftest import Command
from tests.analysis.make_load import (
    CLOSED,
    LASTS_S,
    RATES,
    SERVICE,
    WARMUP_S,
    arrivals,
    make_load,
    wait_below,
    wait_quantile,
    waits,
)
from tests.analysis.make_run import lines, make_run, rewrite


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_load(tmp_path_factory.mktemp("loads") / "run")


@pytest.fixture(scope="module")
def every(made: Path) -> list[loads.Served]:
    return loads.served(load(made))


def _one(every: list[loads.Served], codec: str, text: str) -> loads.Served:
    return next(each for each in every if each.setting == codec and each.load == text)


def _stable(every: list[loads.Served]) -> list[tuple[loads.Served, float, float]]:
    """The Poisson loads that the link can carry: with rate and service."""
    known = [(e, float(e.load[13:-3]), SERVICE[e.setting]) for e in every if e.family == "poisson"]
    return [each for each in known if each[1] * each[2] < 1]


def test_intervals_of_the_first_token_hold_the_quantiles_of_queueing_theory(
    every: list[loads.Served],
) -> None:
    """Of 20 intervals of 95 % one may miss; three would be one in 13."""
    missed = 0
    for each, rate, service in _stable(every):
        for q in (0.5, 0.95):
            estimate, true = each.first_token(q), service + wait_quantile(q, rate, service)
            missed += not estimate.low - 1e-9 <= true <= estimate.high + 1e-9
    assert missed <= 2


def test_the_share_in_time_is_erlangs(every: list[loads.Served]) -> None:
    for each, rate, service in _stable(every):
        share, true = each.within(2.0), wait_below(2.0 - service, rate, service)
        assert share.low - 0.02 <= true <= share.high + 0.02
        assert each.goodput(2.0).value == pytest.approx(share.value * each.offered)


def test_offered_and_carried_are_counted_by_hand(made: Path, every: list[loads.Served]) -> None:
    rows = pd.DataFrame(lines(made))
    for each in every:
        own = rows[(rows["load"] == each.load) & (rows["codec"] == each.setting)]
        inside = own["arrived_at"].between(WARMUP_S, WARMUP_S + LASTS_S, inclusive="left")
        ends = (own["arrived_at"] + own["e2e_s"]).between(WARMUP_S, WARMUP_S + LASTS_S, inclusive="left")
        assert each.offered == pytest.approx(inside.sum() / LASTS_S)
        assert each.carried.value == pytest.approx(ends.sum() / LASTS_S)


def test_an_overloaded_link_carries_what_it_can(every: list[loads.Served]) -> None:
    assert _one(every, "fp16", "poisson(rate=3/s)").carried.value == pytest.approx(1.0, abs=0.01)
    assert _one(every, "fp16", "closed(clients=8, think=3s)").carried.value == pytest.approx(1.0, abs=0.01)


def test_batch_means_hold_where_independent_requests_would_not() -> None:
    """The share of waits below their true median at a load of 0.9, 120 times."""
    held, alone, true = 0, 0, wait_quantile(0.5, 0.9, 1.0)
    for seed in range(120):
        at = arrivals(np.random.default_rng(seed), 0.9, 4200.0)
        own = waits(at, 1.0)[at >= 200]
        stretch = ((at[at >= 200] - 200) // 400).astype(int)
        for each, kind in (
            (dependent.quantile(own, 0.5, stretch), "batch"),
            (dependent.quantile(own, 0.5, np.arange(len(own))), ""),
        ):
            inside = each.low <= true <= each.high
            held, alone = held + (kind == "batch" and inside), alone + (kind == "" and inside)
    assert held >= 105
    assert alone <= 60


def test_an_end_that_requests_cannot_bound_is_infinite() -> None:
    few = dependent.quantile(np.arange(40.0), 0.99, np.arange(40) // 4)
    assert math.isinf(few.high)
    assert few.value == 39.0
    assert math.isnan(dependent.quantile([1.0, 2.0], 0.5, [0, 0]).low)
    assert dependent.quantile([], 0.5, []).n == 0


def test_capacity_is_where_theory_has_it(every: list[loads.Served]) -> None:
    """Within 2 s at 95 %: between the two rates measured of which theory says so of the lower and not of the higher."""
    for curve in loads.curves(every):
        if curve[0].family != "poisson":
            continue
        service = SERVICE[curve[0].setting]
        true = [r for r in RATES if r * service < 1 and wait_below(2 - service, r, service) >= 0.95]
        found = loads.capacity(curve, 2.0, 0.95)
        rates = [*RATES, math.inf]
        assert 0.8 * max(true) <= found.value <= 1.2 * rates[rates.index(max(true)) + 1]
        assert found.low <= found.value <= found.high


def test_capacity_never_goes_beyond_what_was_measured(every: list[loads.Served]) -> None:
    curve = next(c for c in loads.curves(every) if c[0].family == "poisson" and c[0].setting == "fp16")
    assert loads.capacity(curve, 1e4, 0.95).value == math.inf
    assert loads.capacity(curve, 1e4, 0.95).text().startswith("> ")
    assert loads.capacity(curve, 0.1, 0.95).value == 0.0
    assert loads.capacity(curve, 0.1, 0.95).text().startswith("< ")


def test_jains_index_is_one_where_all_get_alike_and_falls_where_one_starves(
    made: Path, every: list[loads.Served]
) -> None:
    assert _one(every, "int4", "closed(clients=4, think=3s)").jain == pytest.approx(1.0, abs=1e-3)
    run = load(made)
    starved = run.rows["client"].eq("n1") & run.rows["load"].eq("poisson(rate=0.5/s)")
    failed = run.rows[starved].assign(error="no room", refused=True)
    less = type(run)(**{**run.__dict__, "rows": run.rows[~starved].reset_index(drop=True), "failed": failed})
    one = _one(loads.served(less), "fp16", "poisson(rate=0.5/s)")
    assert one.jain == pytest.approx(0.75)
    assert one.refused == pytest.approx(len(one.rows[one.rows["client"] == "n1"]) / len(one.rows))
    assert one.failed == 0


def test_refused_requests_took_for_ever(tmp_path: Path) -> None:
    every = loads.served(load(make_load(tmp_path / "run", refused_every=10)))
    one = _one(every, "int4", "poisson(rate=3/s)")
    assert one.refused == pytest.approx(0.1, abs=0.01)
    assert one.first_token(0.95).value == math.inf
    assert one.within(1e9).value == pytest.approx(0.9, abs=0.01)


def test_closed_loops_are_one_family_by_their_clients(every: list[loads.Served]) -> None:
    curve = next(c for c in loads.curves(every) if c[0].closed)
    assert [each.at for each in curve] == list(CLOSED)
    assert curve[0].family == "closed(think=3s)"


def test_no_panel_mixes_loads_or_what_was_alone(made: Path, tmp_path: Path) -> None:
    alone = make_run(tmp_path / "both", ("5g-mid",), ("fp16",), ("split",), ("needle",), examples=4)
    rewrite(alone, [*lines(alone), *lines(made)])
    run = load(alone)
    panels = dict(settings.panels(run.attempts))
    assert len(panels) == 1 + len(RATES) + len(CLOSED)
    assert all(own["load"].nunique() == 1 for own in panels.values())
    assert len(run.alone.rows) == 4
    assert "under a load left out" in run.alone.notes[-1]


def test_figures_of_single_requests_are_not_drawn_of_loads(made: Path) -> None:
    run = load(made)
    for name in ("regimes", "who_prefills", "naive_error", "link_sweep"):
        with pytest.raises(NotInThisRun, match="under a load"):
            figure(name, run)


def test_recommending_for_a_link_says_that_loads_are_asked_otherwise(made: Path, command: Command) -> None:
    status, _, said = command("recommend", made, "--rate", "30mbit", "--delay", "15ms")
    assert status == 2
    assert "--clients" in said


def test_who_carries_a_load_is_named_by_intervals_and_what_lies_outside_is_flagged(
    made: Path, command: Command
) -> None:
    status, said, _ = command("recommend", made, "--clients", "8", "--deadline", "2s", "--json")
    (answer,) = json.loads(said)["answers"]
    options = {option["setting"]: option for option in answer["options"]}
    assert status == 0 and answer["choice"] == "int4" and answer["family"] == "closed(think=3s)"
    assert options["int4"]["known"] == "measured at 8 clients" and not options["int4"]["extrapolated"]
    assert options["int4"]["carries"] and options["int4"]["within"]["low"] >= 0.95
    assert not options["fp16"]["carries"] and options["fp16"]["within"]["high"] < 0.95
    status, said, _ = command("recommend", made, "--clients", "6", "--deadline", "2s", "--json")
    between = {each["setting"]: each for each in json.loads(said)["answers"][0]["options"]}
    assert between["fp16"]["known"] == "between 4 and 8 clients"
    assert between["fp16"]["within"]["value"] == pytest.approx((1 + options["fp16"]["within"]["value"]) / 2)
    status, said, _ = command("recommend", made, "--clients", "9", "--deadline", "2s")
    assert status == 1 and "no setting is shown to carry 9 clients" in said
    assert "extrapolated: heavier than 8 clients, the heaviest measured" in said
    status, said, _ = command("recommend", made, "--requests", "12/min", "--deadline", "2s", "--p", "0.9")
    assert status == 0 and "use int4" in said and "measured at 0.2/s" in said


def test_a_lighter_load_than_was_measured_is_carried_where_the_lightest_is(made: Path) -> None:
    found = recommend_load.recommend(load(made), recommend_load.Asked(0.1, False, 2.0, 0.9))
    (answer,) = found.answers
    assert answer.choice is not None and answer.choice.extrapolated.startswith("lighter than 0.2")
    assert "(extrapolated: lighter" in recommend_load.text(found)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--clients", "4"), "with --deadline"),
        (("--clients", "4", "--requests", "2/s", "--deadline", "1s"), "--clients or --requests"),
        (("--deadline", "1s"), "--clients 16"),
        (("--requests", "2", "--deadline", "1s"), "how many there are in which time"),
        (("--clients", "4", "--deadline", "1s", "--p", "1"), "a share between 0 and 1"),
    ],
)
def test_a_question_about_loads_that_is_none_is_told_in_one_line(
    made: Path, command: Command, asked: tuple[str, ...], why: str
) -> None:
    status, _, said = command("recommend", made, *asked)
    assert status == 2 and why in said


def test_the_terminal_and_the_file_have_every_load(made: Path, command: Command, few_figures: None) -> None:
    status, out, _ = command("plot", made, "stages")
    assert status == 0
    assert "loads.csv" in out
    table = pd.read_csv(made / "loads.csv")
    assert len(table) == len(SERVICE) * (len(RATES) + len(CLOSED))
    assert (table["ttft_p50_s"] <= table["ttft_p95_s"]).all()
    shown = loads.text(load(made))
    assert "poisson(rate=0.8/s)" in shown
    assert shown.count("\n") == len(table) + 2


def test_figures_show_the_numbers_of_the_loads(made: Path, every: list[loads.Served]) -> None:
    """Every mark's height is the percentile, or the share, that is counted by hand from the rows."""
    rows = pd.DataFrame(lines(made))
    counted = rows[~rows["warmup"]]
    first = {key: own["ttft_s"].to_numpy() for key, own in counted.groupby(["codec", "load"])}
    run = load(made)
    shown = figure("load_latency", run).axes
    for column, q in enumerate((0.5, 0.95, 0.99)):
        heights = _heights(shown[column]) + _heights(shown[3 + column])
        true = [float(np.quantile(values, q, method="inverted_cdf")) for values in first.values()]
        assert sorted(heights) == pytest.approx(sorted(true))
    shares = _heights(figure("goodput", run).axes[1])
    open_loads = [float((values <= 2.0).mean()) for (_, text), values in first.items() if "poisson" in text]
    assert sorted(shares) == pytest.approx(sorted(open_loads))


def _heights(ax: Axes) -> list[float]:
    """Of the marks that settings have in a panel."""
    marked = [line for line in ax.lines if line.get_marker() not in ("None", None, "")]
    return [float(y) for line in marked for y in np.asarray(line.get_ydata())]


def test_the_timeline_counts_who_waits(made: Path) -> None:
    """Of waits in a row at one link, as many are there as have come up and not begun."""
    run = load(made)
    own = run.rows[(run.rows["codec"] == "fp16") & (run.rows["load"] == "poisson(rate=0.8/s)")].assign(
        failed=False
    )
    times, counts = waiting(own, ("link_queue_s",), ("edge_queue_s",))
    for at, count in list(zip(times, counts, strict=True))[5:200:7]:
        moment = at + 1e-6
        begun = own["arrived_at"] + own["link_queue_s"]
        assert count == ((own["arrived_at"] <= moment) & (begun > moment)).sum()
    assert [label.get_text() for label in figure("load_timeline", run).axes[0].get_yticklabels()] == [
        "n1",
        "n2",
        "n3",
        "n4",
    ]
