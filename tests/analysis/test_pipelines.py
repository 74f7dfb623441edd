"""Requests that are pipelines: how settings are called, what figures show of chunks, and what the model makes of overlap."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.analysis import adaptive, paired_latency, settings, summary
from testbed.analysis.describe import caveats, subject
from testbed.analysis.latency_model import LatencyModel, leave_one_out, link_of, median_error
from testbed.analysis.levels import counts, ladder, mean_rung
from testbed.analysis.link_rates import rates
from testbed.analysis.names import short
from testbed.analysis.run import load
from testbed.analysis.spans import spans
from testbed.analysis.stage_sums import Sums, speed_ratio
from tests.analysis.conftest import Command
from tests.analysis.make_pipeline import ADAPTIVE, CHANGING, LEVELS, RATES, SETTINGS, make_pipeline
from tests.analysis.make_run import change, lines, make_run, rewrite
from tests.analysis.test_figures import drawn, texts, words

_NAMES = st.sampled_from(["int8", "q2c@0.25(pool=1, sinks=2)+int4", "text", "skip"])


def labels(path: Path) -> list[str]:
    return list(settings.labelled(load(path).rows)["setting"].unique())


def test_settings_are_told_apart_by_placement_codec_delivery_and_transport(
    pipelines: Path, tmp_path: Path
) -> None:
    assert labels(pipelines) == [
        "cloud",
        "edge",
        "int4",
        "store fp16",
        "store int8",
        "store int4",
        "store q2c@0.25+int4",
        "int4 · stream(by=tokens)",
        "store int4 · stream(by=tokens)",
        "store int4 · meet",
    ]
    path = make_pipeline(tmp_path / "run", RATES[:1], (("split", "int4", "whole"), ("edge", "", "whole")), 2)
    rows = lines(path)
    quic = {"transport": "quic", "congestion": "reno"}
    rewrite(
        path,
        rows + [row | quic | {"trial": row["trial"] + "q"} for row in rows if row["placement"] == "split"],
    )
    assert labels(path) == ["int4 · tcp", "edge", "int4 · quic"]


def test_a_long_delivery_is_called_by_what_tells_it_apart() -> None:
    both = [f"store · {ADAPTIVE.format(policy)}" for policy in ("oracle", "ewma(alpha=0.5)")]
    assert list(short([*both, "store int8"]).values()) == [
        "store · adaptive(oracle)",
        "store · adaptive(ewma(alpha=0.5))",
        "store int8",
    ]
    assert short(["int4 · stream(by=tokens)"]).popitem()[1] == "int4 · stream(by=tokens)"  # not long


@given(st.lists(_NAMES, max_size=12))
def test_runs_of_levels_are_read_as_they_are_written(sent: list[str]) -> None:
    written = ((level, len(list(same))) for level, same in groupby(sent))
    assert counts(",".join(f"{level}*{n}" if n > 1 else level for level, n in written)) == Counter(sent)


def test_a_ladder_is_read_and_its_rungs_are_averaged() -> None:
    delivery = ADAPTIVE.format("oracle")
    assert ladder(delivery) == LEVELS and ladder("stream(by=tokens)") == ladder("whole") == ()
    assert mean_rung(delivery, "int8*3,skip") == pytest.approx(4 / 4)
    assert np.isnan(mean_rung("stream(by=tokens)", "int8*4")) and counts("int8)*2") == {}


def test_pipelines_are_drawn_chunk_by_chunk_at_their_levels(changing: Path) -> None:
    made = drawn("pipeline", changing)
    said = " ".join(texts(made))
    assert "transmit: int8" in said and "transmit: q2c@0.25+int4" in said and "deadline 1.5 s met" in said
    assert "24 Mbit/s" in said  # the trace's
    table = spans(load(changing))
    names = list(short(labels(changing), 60).values())
    for ax, name in zip(made.axes, names, strict=True):
        assert any(t.get_text() == name for t in ax.texts)
        ends = {round(p.get_x() + p.get_width(), 9) for p in ax.patches if hasattr(p, "get_width")}
        assert ends & set(table["end_s"].round(9))


def test_a_changing_link_s_rate_is_its_trace_s(changing: Path) -> None:
    run = load(changing)
    edges, values = rates(run, CHANGING, 0.25, 1.0) or (np.array([]), np.array([]))
    middles = (edges[1:] + edges[:-1]) / 2 + 0.25
    far = np.abs(middles % 0.5 - 0.25) < 0.2  # from a step
    expected = np.where((middles % 1.0) < 0.5, 24e6, 4e6)
    assert values[far] == pytest.approx(expected[far])
    assert rates(run, "other", 0.0, 1.0) is None


def test_the_first_token_is_paired_with_sending_the_text(pipelines: Path) -> None:
    run = load(pipelines)
    made = drawn("ttft", pipelines)
    table = pd.DataFrame(lines(pipelines))
    own = table[table["profile"] == RATES[2]]
    times = own.assign(who=own["placement"] + own["codec"] + own["delivery"]).pivot(
        index="example", columns="who", values="ttft_s"
    )
    expected = (times["storeint8whole"] - times["cloudwhole"]).median()
    (_, rows) = next((name, rows) for name, rows in settings.panels(run.attempts) if name == RATES[2])
    found = paired_latency.first_token_differences(rows, "cloud")
    assert found["store int8"].value == pytest.approx(expected) and found["store int8"].n == 6
    assert any(f"{expected:+.2f} [" in text for text in texts(made))
    assert any("hid" in text for text in texts(made)) and "billed to the latest" in " ".join(texts(made))


def test_deadlines_met_are_counted_by_example_and_compared_with_the_oracle(changing: Path) -> None:
    rows = pd.DataFrame(lines(changing))
    found = {each.setting: each for each in adaptive.kept(load(changing))}
    for delivery, own in rows[rows["levels"] != ""].groupby("delivery"):
        name = f"store {own['codec'].iloc[0]} · {delivery}".replace("  ", " ")
        kept = found[name]
        assert kept.score.n == 8 and kept.score.value == pytest.approx(own["score"].mean())
        if ladder(str(delivery)):
            assert kept.met.value == pytest.approx(own["met"].astype(float).mean())
            assert kept.adaptive and np.isfinite(kept.level)
    oracle = rows[rows["delivery"].str.contains("oracle")]["met"].astype(float).mean()
    fixed = found[f"store · {ADAPTIVE.format('fixed')}"]
    assert fixed.behind_met.value == pytest.approx(oracle - fixed.met.value) and fixed.level == 0
    assert found["cloud"].met.value == 1  # its first token came in time
    said = adaptive.text(load(changing))
    assert "deadline 1.5 s" in said and "[" in said
    assert "deadline met" in words("deadlines", changing)
    said = words("adaptive", changing)
    assert "deadline missed" in said and "deadline met" in said and "bytes under way" in said


def flow_line(stages: tuple[float, float, float], chunks: int) -> float:
    """When the last of these chunks has left three machines in a row: simulated."""
    free = [0.0, 0.0, 0.0]
    for _ in range(chunks):
        at = 0.0
        for machine, whole in enumerate(stages):
            at = free[machine] = max(at, free[machine]) + whole / chunks
    return free[-1]


@given(st.tuples(*[st.floats(0.01, 10.0)] * 3), st.integers(1, 40))
def test_a_stream_s_time_is_a_flow_line_s(stages: tuple[float, float, float], chunks: int) -> None:
    edge, link, cloud = stages
    line = {
        "setting": "s",
        "placement": "store",
        "kind": "stream",
        "codec": "int4",
        "task": "t",
        "example": "e",
    }
    figures = {
        "edge": edge,
        "cloud": cloud,
        "last": 0.25,
        "payload_bytes": 1.0,
        "chunks": chunks,
        "opened": 1.0,
        "prefill": 0.0,
    }
    sums = Sums(pd.DataFrame([line | figures]))
    (found,) = sums.latencies(np.array([0.1]), np.array([link + 0.05]), 0.05)
    assert found == pytest.approx(0.1 + 0.05 + flow_line(stages, chunks) + 0.25)
    (faster,) = sums.latencies(np.array([0.1]), np.array([link + 0.05]), 0.05, slower=0.5)
    assert faster == pytest.approx(0.1 + 0.05 + flow_line((edge / 2, link, cloud), chunks) + 0.25)


def test_the_model_predicts_pipelines_and_leaves_away_what_adapts(pipelines: Path, changing: Path) -> None:
    rows = settings.labelled(load(pipelines).rows)
    model = LatencyModel.fit(rows)
    for profile in RATES:
        own = rows[rows["profile"] == profile]
        predicted = model.medians(link_of(own))
        measured = own.groupby("setting")["e2e_s"].median()
        assert set(predicted) == set(measured.index)
        for name, seconds in measured.items():
            assert predicted[str(name)] == pytest.approx(seconds, rel=0.15), name
    assert speed_ratio(rows) == pytest.approx(4.0, rel=0.1)
    twice = model.medians(link_of(own), slower=2.0)
    assert twice["edge"] == pytest.approx(2 * predicted["edge"]) and twice["cloud"] == predicted["cloud"]
    assert twice["store int4"] > predicted["store int4"]
    names = LatencyModel.fit(settings.labelled(load(changing).rows)).sums.table["setting"].unique()
    assert list(names) == ["cloud", "store int8 · stream(by=tokens)"]


def test_what_crosses_over_another_transport_than_tcp_is_not_forecast_by_its_fit(pipelines: Path) -> None:
    rows = load(pipelines).rows
    model = LatencyModel.fit(rows)
    moved = rows.assign(transport=rows["transport"].where(rows["placement"] != "store", "quic()"))
    found = LatencyModel.fit(moved)
    link = link_of(rows)
    assert not any("store" in name for name in found.medians(link))
    assert any("store" in name for name in model.medians(link)) and "edge" in found.medians(link)
    nothing = LatencyModel.fit(moved[moved["placement"] == "store"])
    assert nothing.predict(link).empty


@pytest.mark.slow
def test_the_map_of_speeds_prints_the_model_s_error(pipelines: Path) -> None:
    said = words("who_prefills", pipelines)
    held = [
        m.label for m in settings.holding(settings.measured(settings.labelled(load(pipelines).rows)), 0.5)
    ]
    held_out = leave_one_out(load(pipelines).rows, held)
    assert f"median error {median_error(held_out):.1%}" in said
    assert "Computed, not measured" in said and "one side prefills" in said


def test_commands_do_what_they_can_with_pipelines(
    pipelines: Path, changing: Path, few_figures: None, command: Command
) -> None:
    for path in (pipelines, changing):
        for arguments in (["report", path], ["claims", path], ["compare", path, path]):
            status, _, errors = command(*arguments)
            assert status == 0, errors
    status, out, _ = command(
        "recommend", pipelines, "--rate", "20mbit", "--delay", "25ms", "--quality", "0.01", "--held-out"
    )
    assert status == 0 and "store int4 · stream(by=tokens)" in out
    assert "Deadlines and levels" in (changing / "report.html").read_text()


def test_what_was_replayed_or_has_stand_in_values_is_said_and_kept_apart(
    tmp_path: Path, command: Command
) -> None:
    path = make_run(tmp_path / "run", ("5g-mid",), ("int8",), ("split", "cloud"), ("needle",), examples=4)
    rows = lines(path)
    elsewhere = {"edge_device": "jetson-orin", "model": "shape:qwen2.5-14b", "score": None, "nll": None}
    rewrite(path, rows + [row | elsewhere | {"trial": row["trial"] + "r"} for row in rows])
    run = load(path)
    panels = [name for name, _ in settings.panels(run.rows)]
    assert panels == ["5g-mid · smollm2-135m", "5g-mid · shape:qwen2.5-14b · edge as jetson-orin"]
    said = " ".join(caveats(run))
    assert "Replayed: the edge's compute takes as long as was measured for jetson-orin (8 trials)." in said
    assert "shape:qwen2.5-14b: a cache of that model's shape with stand-in values (8 trials)" in said
    assert "edge as jetson-orin" in subject(run.rows) and said.split(".")[0] in words("stages", path)
    change(path, lambda row: {"model": "smollm2-135m", "score": 1.0, "nll": row["reference_nll"]})
    assert "smollm2-135m (edge as jetson-orin)" in command("claims", path)[1]


def test_what_a_codec_loses_is_not_judged_by_chunks_of_other_levels(pipelines: Path, changing: Path) -> None:
    assert set(settings.encoded(load(pipelines).rows)["placement"]) == {"split"}
    stored = settings.encoded(load(changing).rows)
    assert set(stored["delivery"]) == {"stream(by=tokens)"} and len(SETTINGS) > 1


def test_what_is_not_known_on_another_link_is_said(changing: Path, tmp_path: Path, command: Command) -> None:
    path = make_pipeline(
        tmp_path / "run", RATES[:2], (*SETTINGS[:2], ("store", "", ADAPTIVE.format("oracle"))), 3
    )
    asked = ("--rate", "8mbit", "--delay", "25ms", "--quality", "0.01")
    _, out, _ = command("recommend", path, *asked)
    assert "not predicted, since what they do on another link is not known: store · adaptive(" in out
    scouts = [
        row | {"placement": "scout", "trial": row["trial"] + "s"}
        for row in lines(path)
        if row["delivery"] != "whole"
    ]
    rewrite(path, lines(path) + [row | {"delivery": "whole", "codec": "q2c@0.5"} for row in scouts])
    said = words("who_prefills", path)
    assert "Not in the map, since what they do elsewhere is not known:" in said and "scout q2c@0.5" in said


def test_the_summary_has_what_pipelines_add(pipelines: Path) -> None:
    table = summary.summarise(load(pipelines))
    rows = load(pipelines).rows
    own = rows[(rows["profile"] == RATES[0]) & (rows["delivery"] == "meet")]
    line = table[(table["profile"] == RATES[0]) & (table["delivery"] == "meet")].iloc[0]
    assert line["overlap_s_mean"] == pytest.approx(own["overlap_s"].mean())
    assert line["over_bound"] == pytest.approx((own["e2e_s"] / own["bound_s"]).median())
    assert line["amortized_s"] == pytest.approx(own["amortized_s"].median())
