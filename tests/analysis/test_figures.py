"""Figures are written whole, are legible, and say what they show."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from testbed import analysis
from testbed.analysis.figures import FIGURES, figure
from testbed.analysis.figures.retention import split_selection
from testbed.analysis.figures.style import WIDTH, marks, style
from testbed.analysis.run import load
from testbed.errors import UsageError
from testbed.net.calibration.outcome import Check, Track
from tests.analysis.make_run import CODECS, PROFILES, SWEEP, make_run, write_calibration, write_diagnosis
from tests.analysis.test_run_directory import lines, rewrite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("figures") / "run", examples=8)
    write_calibration(path, tuple(PROFILES), trace="lte")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "run"
    make_run(path, profiles=("5g-mid",), codecs=("fp16", "int8", "q2c@0.25+int4"), examples=5)
    write_calibration(path, ("5g-mid",))
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many settings with long names, a link without a rate, one out of tolerance."""
    path = make_run(tmp_path_factory.mktemp("wide") / "run", examples=4, tasks=("needle",))
    rows = lines(path)
    longer = [
        r | {"codec": r["codec"].replace("snapkv@0.25", "snapkv@0.5(window=32)") + "+zstd"}
        for r in rows
        if r["codec"]
    ]
    inline = "up:rate=10mbit,delay=20ms,jitter=5ms,loss=1%;down:rate=50mbit,delay=20ms"
    odd = [
        r | {"profile": inline, "rate_up_bps": None, "calibrated": False}
        for r in rows
        if r["profile"] == "lte"
    ]
    rewrite(path, [r | {"trial": str(i)} for i, r in enumerate(rows + longer + odd)])
    write_calibration(path, (*PROFILES, *SWEEP, inline), off=("lte",), trace=inline)
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links that differ in rate alone and in delay alone."""
    path = tmp_path_factory.mktemp("sweep") / "run"
    return make_run(path, tuple(SWEEP), ("fp16", "int8", "q2c@0.25+int4"), tasks=("needle",), examples=6)


def drawn(name: str, path: Path) -> Figure:
    with style():
        made = figure(name, load(path))
        FigureCanvasAgg(made).draw()
    return made


@pytest.mark.slow
def test_all_figures_are_written_as_picture_and_vector(small: Path) -> None:
    run = small
    paths = analysis.draw(run)
    left_out = {
        "regimes",
        "link_sweep",
        "fidelity_traces",
        "layer_sensitivity",
    }  # one link, no trace, no diagnosis
    assert [p.relative_to(run / "figures").name for p in paths] == [
        f"{n}.{s}" for n in FIGURES if n not in left_out for s in ("png", "pdf")
    ]
    assert sorted(p.name for p in (run / "figures").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        if path.suffix == ".png":
            picture = matplotlib.image.imread(path)
            assert picture.shape[1] == WIDTH * 200
            assert picture.std() > 0.05
        else:
            assert path.read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_the_same_rows_give_the_same_bytes(small: Path) -> None:
    first = [p.read_bytes() for p in analysis.draw(small, ["stages"])]
    assert [p.read_bytes() for p in analysis.draw(small, ["stages"])] == first


def texts(made: Figure) -> list[Text]:
    return [t for t in made.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("which", ["run", "wide"])
def test_no_text_leaves_the_picture(name: str, which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    if name == "latency_quality_by_task" and which == "wide":
        pytest.skip("this run has one task")
    if name == "link_sweep":
        path = request.getfixturevalue("sweep")
    if name == "layer_sensitivity":
        write_diagnosis(path / "diagnosis.json")
    made = drawn(name, path)
    box = made.get_tightbbox(FigureCanvasAgg(made).get_renderer())  # inches, around all that is drawn
    width, height = made.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def test_one_setting_that_loses_nothing_is_drawn_whole_and_counted_as_one(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-mid", "lte"), ("fp16",), ("split",), ("needle",), examples=3)
    rewrite(path, [row | {"nll": row["reference_nll"]} for row in lines(path)])
    made = drawn("latency_nll", path)  # whose ticks are as wide as they get
    assert made.get_tightbbox(FigureCanvasAgg(made).get_renderer()).x0 >= 0
    assert any(t.get_text().startswith("1 setting on 2 emulated links") for t in texts(made))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latency_quality", "latency_nll", "latency_quality_by_task"])
def test_labels_in_a_panel_cover_neither_each_other_nor_a_mark(name: str, run: Path) -> None:
    made = drawn(name, run)
    renderer = FigureCanvasAgg(made).get_renderer()
    checked = 0
    for ax in made.axes:
        labels = [t for t in ax.texts if t.get_text() in [*CODECS, "cloud", "edge"]]
        boxes = [Text.get_window_extent(t, renderer) for t in labels]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), labels[i].get_text()
            for line in ax.lines:
                if line.get_marker() not in (None, "None") and line.get_markerfacecolor() != "none":
                    x, y = ax.transData.transform(line.get_xydata())[0]
                    assert not box.contains(x, y), labels[i].get_text()
            checked += 1
    assert checked >= 3 * len(made.axes)


def test_a_figure_says_what_was_run(run: Path) -> None:
    said = "\n".join(t.get_text() for t in texts(drawn("latency_quality", run)))
    for words in (
        "smollm2-135m",
        "n = 8 examples",
        "userspace emulator",
        "95 %",
        "end-to-end latency (s)",
        "mean score",
    ):
        assert words in said
    assert "5g-edge" in said
    assert "5  ↓ 15 Mbit/s · 30 ms one way · 1% loss" in said


def test_every_setting_has_its_own_mark() -> None:
    settings = [(c, "split", c) for c in CODECS] + [("cloud", "cloud", ""), ("edge", "edge", "")]
    settings += [
        (c, "split", c)
        for c in ("kivi(bits=2)", "cachegen(level=2)", "delta(anchor=10)+int4", "mixed(low=4, high=8)")
    ]
    found = marks(settings)
    assert len(set(found.values())) == len(settings)
    without_colour = {(m.marker, m.fill, round(m.size, 1)) for m in found.values()}
    assert len(without_colour) == len(settings)


def test_stage_bars_add_up_to_the_median_latency(run: Path) -> None:
    ax = drawn("stages", run).axes[0]
    rows = load(run).rows
    own = rows[(rows["profile"] == "5g-good") & (rows["codec"] == "fp16")]
    first = [p for p in ax.patches if abs(p.get_y() + p.get_height() / 2) < 0.01]
    assert sum(p.get_width() for p in first) == pytest.approx(own["e2e_s"].median())


def test_an_unknown_figure_is_a_usage_error_that_names_the_known_ones(run: Path) -> None:
    with pytest.raises(UsageError, match="unknown figure 'bars'; choose from latency_quality"):
        analysis.draw(run, ["stages", "bars"])


def test_one_row_is_refused_in_words(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run",
        profiles=("lte",),
        codecs=("int8",),
        placements=("split",),
        tasks=("needle",),
        examples=1,
    )
    with pytest.raises(UsageError, match="1 finished trial; a figure compares at least 2"):
        analysis.draw(path)
    assert not (path / "figures").exists()


@pytest.mark.slow
def test_two_rows_are_drawn_without_intervals(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run",
        profiles=("lte",),
        codecs=("fp16", "int8"),
        placements=("split",),
        tasks=("needle",),
        examples=1,
    )
    assert {p.stem for p in analysis.draw(path)} == {
        "latency_quality",
        "latency_nll",
        "stages",
        "rate_distortion",
        "timeline",
    }


@pytest.mark.slow
def test_figures_that_the_run_has_no_data_for_are_left_out_or_refused(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run", profiles=("lte",), codecs=("int8",), tasks=("needle",), examples=3, nll=None
    )
    found = {p.stem for p in analysis.draw(path)}
    assert found == {"latency_quality", "stages", "latency_cdf", "timeline"}
    with pytest.raises(UsageError, match="no finished trial has a nll"):
        analysis.draw(path, ["latency_nll"])
    with pytest.raises(UsageError, match="one task only"):
        analysis.draw(path, ["latency_quality_by_task"])


def test_equal_latencies_and_scores_are_drawn(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run", profiles=("lte",), codecs=("int8", "int4"), examples=3, e2e_s=1.0, score=1.0
    )
    assert analysis.draw(path, ["latency_quality"])


def test_a_filter_is_named_in_the_figure(run: Path) -> None:
    with style():
        made = figure("latency_quality", load(run, 'profile == "lte"'))
    assert len(made.axes) == 1
    assert any('Only rows where profile == "lte"' in t.get_text() for t in texts(made))


def test_analysis_never_imports_torch_nor_a_window_system(small: Path) -> None:
    code = (
        "import sys, pathlib, analysis; assert 'pandas' not in sys.modules\n"
        f"p = pathlib.Path({str(small)!r}); analysis.headline(p); analysis.draw(p, ['stages'])\n"
        "assert not {'torch', 'transformers', 'tkinter', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_marks_are_colours_of_the_colour_blind_safe_palette() -> None:
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert {m.color for m in marks([(c, "split", c) for c in CODECS]).values()} <= palette
    assert np.isfinite([m.size for m in marks([("x", "split", "q2c@1..2+int8")]).values()]).all()


def test_regimes_names_the_fastest_that_keeps_the_quality_and_the_next(sweep: Path) -> None:
    made = drawn("regimes", sweep)
    said = [t.get_text() for t in texts(made)]
    rows = load(sweep).rows
    for profile in SWEEP:
        own = rows[rows["profile"] == profile]
        full = own["reference_score"].mean()
        kept = own.groupby(["placement", "codec"])["score"].mean() >= 0.95 * full
        kept |= kept.index.isin([("cloud", ""), ("edge", ""), ("split", "fp16")])  # by construction
        medians = own.groupby(["placement", "codec"])["e2e_s"].median()[kept].sort_values()
        assert any(t.startswith(f"{medians.iloc[0]:.2f} s") for t in said)
        names = [placement if placement != "split" else codec for placement, codec in medians.index]
        times = own.assign(setting=own["codec"].where(own["placement"] == "split", own["placement"]))
        times = times.pivot_table(index="example", columns="setting", values="e2e_s")
        slower = (times[names[1]] / times[names[0]]).median() - 1
        assert any(t == f"{names[1]} +{slower:.0%}" or t.startswith(f"tied: {names[1]}") for t in said)
    assert {"5 Mbit/s", "20 Mbit/s", "80 Mbit/s", "10ms", "40ms"} <= set(said)


def test_link_sweep_draws_the_medians_of_links_that_differ_in_one_condition(sweep: Path) -> None:
    made = drawn("link_sweep", sweep)
    rows = load(sweep).rows
    edge = rows[(rows["delay_up_s"] == 0.01) & (rows["codec"] == "int8")].groupby("rate_up_bps")["e2e_s"]
    expected = edge.median()
    curves = [np.asarray(line.get_xydata()) for line in made.axes[0].lines if len(line.get_xdata()) == 3]
    assert any(np.allclose(c[:, 0], expected.index / 1e6) and np.allclose(c[:, 1], expected) for c in curves)


def test_link_sweep_s_qualities_stand_beside_each_other(sweep: Path) -> None:
    made = drawn("link_sweep", sweep)
    lower = made.axes[2]
    marks_at = [
        line.get_xdata()[0]
        for line in lower.lines
        if len(line.get_xdata()) == 3 and line.get_marker() != "None"
    ]
    assert len(marks_at) == len(set(marks_at)) == 5
    assert all(4.5 < x < 5.5 for x in marks_at)


def test_link_sweep_says_what_it_needs(run: Path, small: Path) -> None:
    with pytest.raises(UsageError, match="no two of its links differ in rate, delay or loss alone"):
        analysis.draw(small, ["link_sweep"])
    with pytest.raises(UsageError, match="one link only"):
        analysis.draw(small, ["regimes"])


def test_fidelity_draws_each_profile_s_last_errors_and_says_how_many_links_were_off(wide: Path) -> None:
    made = drawn("fidelity", wide)
    said = "\n".join(t.get_text() for t in texts(made))
    assert "1 of 11 links was out of tolerance" in said
    assert "n = " in said
    assert "lte  ✗" in said
    measured = load(wide).calibration["measurements"]
    places = [m["profile"] for m in measured]
    assert len(measured[places.index("lte")]["attempts"]) == 2
    for ax, what, scale in zip(made.axes, ("rate", "delay", "loss"), (None, 1e3, 100.0), strict=True):
        points = {
            (round(float(line.get_xydata()[0][1]), 2)): float(line.get_xydata()[0][0])
            for line in ax.lines
            if line.get_marker() in ("^", "v")
        }
        expected = {}
        for row, one in enumerate(measured):
            for check in one["attempts"][-1]["checks"]:
                if check["what"] == what and check["asked"] is not None:
                    asked, y = check["asked"], round(row + (-0.17 if check["way"] == "up" else 0.17), 2)
                    off = check["measured"] - (0 if what == "loss" else asked)
                    expected[y] = off * (scale or 100 / asked)
        assert points == pytest.approx(expected)
        assert len(points) == 2 * len(places) - 2 * (what == "rate")  # one has no rate
    rate = made.axes[0]
    assert (
        sum(p.get_xydata()[0][0] == pytest.approx(-10, abs=0.1) for p in rate.lines if p.get_marker() in "^v")
        == 2
    )
    edges = {round(float(x), 9) for band in rate.collections for x in band.get_paths()[0].vertices[:, 0]}
    assert edges == {-3.0, 3.0}


def test_fidelity_lays_what_a_trace_delivered_over_what_it_asked(run: Path) -> None:
    made = drawn("fidelity_traces", run)
    assert any("followed their traces, within tolerance" in t.get_text() for t in texts(made))
    curves = next(m for m in load(run).calibration["measurements"] if m["profile"] == "lte")
    for ax, raw in zip(made.axes, curves["attempts"][-1]["curves"], strict=True):
        steps = [p.get_data() for p in ax.patches]
        for step, key in zip(steps, ("asked_bytes", "delivered_bytes"), strict=True):
            assert step.values == pytest.approx(np.array(raw[key]) / 1e3)
            assert (step.edges[0], step.edges[-1]) == (0.0, pytest.approx(8.0))
        shape = np.corrcoef(raw["asked_bytes"], raw["delivered_bytes"])[0, 1]
        off = 100 * (sum(raw["delivered_bytes"]) / sum(raw["asked_bytes"]) - 1)
        assert f"correlation {shape:.4f} · total {off:+.2f} %" in [t.get_text() for t in ax.texts]


@pytest.fixture
def beyond(tmp_path: Path) -> Path:
    """Two links, one with jitter and bursts, and one whose delay and loss follow a trace."""
    path = make_run(tmp_path / "run", ("lte", "5g-mid"), ("int8",), examples=2)
    write_calibration(path, ("lte", "5g-mid"))
    calibration = json.loads((path / "calibration.json").read_text())
    first, second = (one["attempts"][-1] for one in calibration["measurements"])
    for what, asked, measured in (("jitter", 0.004, 0.0042), ("burst", 4.0, 3.8)):
        check = Check("up", what, asked, measured, 0.9 * measured, 1.1 * measured, 200, True, "±10%")
        first["checks"].append(asdict(check))
    second["checks"].append(asdict(Check("up", "delay trace", 0.0, 6e-5, None, None, 8000, True, "≤ 1ms")))
    second["tracks"] = [
        asdict(Track("up", "delay", 2.0, 0.1, (0.02, 0.03, None), (0.0201, 0.0301, None))),
        asdict(Track("up", "loss", 2.0, 0.1, (0.01, 0.02, 0.0), (0.011, 0.019, 0.0))),
        {"way": "up", "what": "delay", "asked": [1], "measured": []},
    ]
    (path / "calibration.json").write_text(json.dumps(calibration))
    return path


def test_fidelity_shows_jitter_and_bursts_where_there_are_any(beyond: Path) -> None:
    made = drawn("fidelity", beyond)
    assert len(made.axes) == 5
    for ax, off in zip(made.axes[3:], (5.0, -5.0), strict=True):
        points = [float(line.get_xydata()[0][0]) for line in ax.lines if line.get_marker() == "^"]
        assert points == [pytest.approx(off)]
        edges = {round(float(x), 6) for band in ax.collections for x in band.get_paths()[0].vertices[:, 0]}
        assert edges == {-10.0, 10.0}


def test_fidelity_lays_delay_and_loss_over_what_the_trace_says(beyond: Path) -> None:
    made = drawn("fidelity_traces", beyond)
    delay, loss = made.axes
    asked, measured = (patch.get_data() for patch in delay.patches)
    assert asked.values[:2] == pytest.approx([20, 30])
    assert measured.values[:2] == pytest.approx([20.1, 30.1])
    assert (asked.edges[0], asked.edges[-1]) == (2.0, pytest.approx(2.3))
    assert np.isnan(measured.values[2])
    assert loss.patches[1].get_data().values == pytest.approx([1.1, 1.9, 0.0])
    assert any("median error 0.06 ms" in t.get_text() for t in texts(made))


def test_fidelity_of_a_run_that_its_links_stopped_needs_no_trial(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8",))
    write_calibration(path, ("lte",), off=("lte",))
    (path / "trials.jsonl").unlink()
    assert len(analysis.draw(path, ["fidelity"])) == 2
    with pytest.raises(UsageError, match="none of its links was measured along a trace"):
        analysis.draw(path, ["fidelity_traces"])


def test_fidelity_says_that_trials_ran_before_the_link_was_measured_well(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), ("split",), ("needle",), examples=4)
    write_calibration(path, ("lte",))
    rows = lines(path)
    rewrite(path, [row | {"calibrated": index > 1} for index, row in enumerate(rows)])
    said = " ".join(t.get_text() for t in texts(drawn("fidelity", path))).replace("\n", " ")
    assert "Within tolerance when last measured; trials ran while it was not" in said
    assert "a measurement before them was out of tolerance: lte (in 2 of 8 trials)" in said


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[1]",
        '{"measurements": 3}',
        '{"measurements": [7, {"profile": "a", "attempts": [{"checks": "x", "curves": [{"way": "up"}]}]}]}',
        '{"measurements": [{"attempts": [{"checks": [{"way": "up", "what": "rate", "asked": 0, "measured": 1}]}]}]}',
    ],
)
def test_a_calibration_without_measurements_is_said_in_words(tmp_path: Path, content: str) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), examples=1)
    (path / "calibration.json").write_text(content)
    with pytest.raises(UsageError, match="has no measured link"):
        analysis.draw(path, ["fidelity"])


def test_retention_needs_a_selector(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), tasks=("needle",), examples=3)
    with pytest.raises(UsageError, match="no codec of it selects tokens"):
        analysis.draw(path, ["retention"])


def test_rate_distortion_draws_mean_kl_against_mean_bits(run: Path) -> None:
    made = drawn("rate_distortion", run)
    rows = load(run).rows.query('placement == "split" and task == "needle"')
    panel = next(ax for ax in made.axes if any(t.get_text() == "needle" for t in ax.texts))
    points = [line.get_xydata()[0] for line in panel.lines if line.get_marker() not in (None, "None")]
    expected = rows.groupby("codec", sort=False)[["bits_per_element", "kl"]].mean()
    assert np.asarray(points) == pytest.approx(expected.to_numpy())
    assert panel.get_ylabel() + made.axes[0].get_ylabel() == "KL from the full cache (nats/token)"


def test_rate_distortion_without_kl_draws_the_lost_likelihood_or_says_what_it_needs(tmp_path: Path) -> None:
    settings = {"profiles": ("lte",), "tasks": ("needle",), "examples": 3, "kl": None}
    path = make_run(tmp_path / "run", codecs=("int8", "int4"), **settings)
    assert "ΔNLL" in drawn("rate_distortion", path).axes[0].get_ylabel()
    path = make_run(tmp_path / "none", codecs=("int8", "int4"), nll=None, **settings)
    with pytest.raises(UsageError, match="no trial that sent KV has a kl, nor an nll"):
        analysis.draw(path, ["rate_distortion"])
    path = make_run(tmp_path / "one", codecs=("int8",), **settings)
    with pytest.raises(UsageError, match="one codec only"):
        analysis.draw(path, ["rate_distortion"])
    path = make_run(tmp_path / "cloud", codecs=(), placements=("cloud",), **settings)
    with pytest.raises(UsageError, match="no trial that sent KV"):
        analysis.draw(path, ["rate_distortion"])


def test_the_timeline_of_a_trial_adds_up_to_its_latency(run: Path) -> None:
    trial = load(run).rows.iloc[3]
    with style():
        made = figure("timeline", load(run, f'trial == "{trial["trial"]}"'))
    bars = made.axes[0].patches
    assert max(b.get_x() + b.get_width() for b in bars) == pytest.approx(trial["e2e_s"])
    assert len(made.axes) == 1


def test_the_distribution_marks_the_medians(run: Path) -> None:
    made = drawn("latency_cdf", run)
    own = load(run).rows.query('profile == "5g-good" and codec == "fp16"')["e2e_s"]
    marks_at = [float(line.get_xdata()[0]) for line in made.axes[0].lines if len(line.get_xdata()) == 1]
    assert any(x == pytest.approx(own.median()) for x in marks_at)


def test_links_that_change_have_no_place_on_the_axis_of_a_sweep(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tuple(SWEEP), ("fp16",), ("split",), tasks=("needle",), examples=2)
    profile = "rate=20mbit,delay=10ms"
    rewrite(run, [r | {"trace_s": 1.5} if r["profile"] == profile else r for r in lines(run)])
    figure = drawn("link_sweep", run)
    said = " ".join(t.get_text() for t in texts(figure)).replace("\n", " ")
    assert f"change over time: {profile}" in said
    assert [float(t) for t in figure.axes[0].get_xticks()] == [5.0, 20.0, 80.0]  # of the links with 40 ms
    assert "at 40 ms one way" in said
    assert any("means of a trace" in t.get_text() for t in texts(drawn("regimes", run)))


def test_a_codec_is_drawn_by_what_it_is_also_where_its_method_is_not_installed() -> None:
    assert split_selection("kvpress:SnapKV@0.5(window=32)+int4+zstd") == (
        "kvpress:SnapKV(window=32)",
        0.5,
        "int4+zstd",
    )
    assert split_selection("q2c@5e-05") == ("q2c", 5e-05, "fp16")
    assert split_selection("int4+zstd") is None and split_selection("unheard@0.5+int4") is None
    codecs = ("int4", "turbo", "mixed(protect=none)", "kvpress:SnapKV@0.5+int8", "kvpress:Knorm@0.5+int8")
    drawn = marks((codec, "split", codec) for codec in codecs)
    assert drawn["turbo"].fill == drawn["int4"].fill == "none"  # 4 bits, whoever says so
    assert drawn["kvpress:SnapKV@0.5+int8"].size < drawn["int4"].size
    assert len({mark.marker for mark in drawn.values()}) == len(codecs)
