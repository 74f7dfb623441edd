"""Figures are written whole, are legible, and say what they show."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from testbed.analysis.figures import FIGURES, figure
from testbed.analysis.figures.retention import split_selection
from testbed.analysis.figures.style import PAPERS, marks, style
from testbed.analysis.names import LONGEST, short
from testbed.analysis.run import load
from testbed.errors import UsageError
from tests.analysis.conftest import Command
from tests.analysis.make_load import make_load
from tests.analysis.make_run import (
    CODECS,
    PROFILES,
    SWEEP,
    change,
    draw,
    lines,
    make_run,
    rewrite,
    write_calibration,
    write_diagnosis,
)


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
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links that differ in rate alone and in delay alone."""
    path = tmp_path_factory.mktemp("sweep") / "run"
    return make_run(path, tuple(SWEEP), ("fp16", "int8", "q2c@0.25+int4"), tasks=("needle",), examples=6)


def drawn(name: str, path: Path) -> Figure:
    with style():
        made = figure(name, load(path))
        FigureCanvasAgg(made).draw()
    return made


#: A figure of a run that stays as it is, drawn once.
once = functools.cache(drawn)


def texts(made: Figure) -> list[str]:
    shown = (t.get_text() for t in made.findobj(Text) if isinstance(t, Text) and t.get_visible())
    return [text.replace("\n", " ") for text in shown if text.strip()]


def by_gid(ax: Axes, gid: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_gid() == gid]


def words(name: str, path: Path) -> str:
    return " ".join(texts(drawn(name, path)))


@pytest.mark.slow
def test_all_figures_are_written_as_picture_and_vector(small: Path) -> None:
    run = small
    paths = draw(run)
    left_out = {
        "regimes",
        "link_sweep",
        "fidelity_traces",
        "layer_sensitivity",
        "who_prefills",
        "pipeline",
        "adaptive",
        "deadlines",
        "load_latency",
        "goodput",
        "load_timeline",
        "programs",
    }  # one link, no trace, no diagnosis, no spans, no deadline, no load
    assert [p.relative_to(run / "figures").name for p in paths] == [
        f"{n}.{s}" for n in FIGURES if n not in left_out for s in ("png", "pdf")
    ]
    assert sorted(p.name for p in (run / "figures").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        if path.suffix == ".png":
            picture = matplotlib.image.imread(path)
            assert picture.shape[1] == PAPERS["screen"].drawn * 200
            assert picture.std() > 0.05
        else:
            assert path.read_bytes().startswith(b"%PDF")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_load(tmp_path_factory.mktemp("loaded") / "run")


@pytest.fixture(scope="module")
def of_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "run"
    of = {"placement": "program", "delivery": "", "transport": "", "model": ""}
    return make_run(path, codecs=("fp16", "int8"), placements=("split",), tasks=("needle",), examples=6, **of)


@pytest.mark.slow
def test_the_same_rows_give_the_same_bytes(small: Path) -> None:
    first = [p.read_bytes() for p in draw(small, ["stages"])]
    assert [p.read_bytes() for p in draw(small, ["stages"])] == first


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_leaves_the_picture(
    name: str,
    run: Path,
    wide: Path,
    sweep: Path,
    pipelines: Path,
    changing: Path,
    loaded: Path,
    of_programs: Path,
) -> None:
    others = {
        "programs": of_programs,
        "latency_quality_by_task": run,
        "link_sweep": sweep,
        "who_prefills": pipelines,
    }
    others |= dict.fromkeys(("load_latency", "goodput", "load_timeline"), loaded)
    others |= dict.fromkeys(("pipeline", "adaptive", "deadlines"), changing)
    path = others.get(name, wide)
    if name == "layer_sensitivity":
        write_diagnosis(path / "diagnosis.json")
    made = once(name, path)
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
    assert any(text.startswith("1 setting on 2 emulated links") for text in texts(made))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latency_quality", "latency_nll", "latency_quality_by_task"])
def test_labels_in_a_panel_cover_neither_each_other_nor_a_mark(name: str, run: Path) -> None:
    made = once(name, run)
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
    said = words("latency_quality", run)
    for part in (
        "smollm2-135m",
        "n = 8 examples",
        "userspace emulator",
        "95 %",
        "end-to-end latency (s)",
        "mean score",
    ):
        assert part in said
    assert "5g-edge" in said
    assert "5  ↓ 15 Mbit/s · 30 ms one way · 1% loss" in said


def test_intervals_are_those_of_the_fronts_alone(run: Path) -> None:
    rows = load(run).rows
    for ax, profile in zip(once("latency_quality", run).axes, PROFILES, strict=True):
        own = rows[rows["profile"] == profile]
        points = own.groupby(["placement", "codec"]).agg(e2e=("e2e_s", "median"))
        points["score"] = (
            own.groupby(["placement", "codec", "task"])["score"].mean().groupby(level=[0, 1]).mean()
        )
        best = set()
        for these in (points, points.loc[["split"]]):
            for one in these.itertuples():
                least = these["score"][these["e2e"] <= one.e2e].drop(one.Index)
                best |= {(one.e2e, one.score)} if one.score > max(least, default=-1) else set()
        drawn = {
            (np.mean(a.get_xdata()) if len(set(a.get_xdata())) == 1 else 0, b.get_ydata()[0])
            for b, a in itertools.pairwise(by_gid(ax, "interval"))
            if len(set(b.get_ydata())) == 1
        }
        assert np.asarray(sorted(drawn)) == pytest.approx(np.asarray(sorted(best)))


def test_what_is_not_shown_to_be_fastest_has_no_ring(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), ("split",), ("needle",), examples=80)

    def rings(**changes: float) -> tuple[int, int]:
        change(path, lambda row: {"score": 1.0, "reference_score": 1.0})
        change(path, lambda row: {"e2e_s": changes[row["codec"]]})
        (ax,) = drawn("latency_quality", path).axes
        return sum(line.get_markersize() == 16 for line in ax.lines), len(ax.collections)

    assert rings(int8=1.0, int4=2.0)[0] > 0
    assert rings(int8=1.0, int4=1.0) == (0, 2)


def test_distributions_are_few_and_named_where_they_are(run: Path) -> None:
    for ax in once("latency_cdf", run).axes:
        curves = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
        looks = {(line.get_linestyle(), str(line._dash_pattern)) for line in curves}  # type: ignore[attr-defined]
        assert 2 <= len(curves) == len(looks) <= 5
        names = [t.get_text() for t in ax.texts if t.get_text() in [*CODECS, "cloud", "edge"]]
        assert len(names) == len(set(names)) == len(curves)


def test_kept_fractions_are_joined_where_they_were_measured_alone(run: Path) -> None:
    for ax in once("retention", run).axes:
        (line,) = by_gid(ax, "joined")  # q2c with INT8, the only one of two fractions
        assert 0.2 < line.get_xdata()[0] < 0.3 and line.get_xdata()[1] == pytest.approx(0.5)
        whole = [x for line in ax.lines if line.get_marker() != "None" for x in line.get_xdata() if x > 0.7]
        assert len(whole) == 2 and np.sqrt(np.prod(whole)) == pytest.approx(1)  # INT8 and INT4, once each


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
    ax = once("stages", run).axes[0]
    rows = load(run).rows
    own = rows[(rows["profile"] == "5g-good") & (rows["codec"] == "fp16")]
    place = [label.get_text() for label in ax.get_yticklabels()].index("fp16")
    bar = [p for p in ax.patches if abs(p.get_y() + p.get_height() / 2 - place) < 0.01]
    assert sum(p.get_width() for p in bar) == pytest.approx(own["e2e_s"].median())


@pytest.mark.slow
def test_two_rows_are_drawn_without_intervals(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), ("split",), ("needle",), examples=1)
    drawn = {p.stem for p in draw(path)}
    assert {"latency_quality", "latency_nll", "stages", "rate_distortion", "timeline"} <= drawn
    assert not {"latency_cdf", "retention", "link_sweep"} & drawn


@pytest.mark.slow
def test_figures_that_the_run_has_no_data_for_are_left_out(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8",), tasks=("needle",), examples=3, nll=None)
    drawn = {p.stem for p in draw(path)}
    assert {"latency_quality", "stages", "latency_cdf", "timeline"} <= drawn
    assert not {"latency_nll", "retention", "rate_distortion", "link_sweep"} & drawn


def test_equal_latencies_and_scores_are_drawn(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), examples=3, e2e_s=1.0, score=1.0)
    assert draw(path, ["latency_quality"])


@pytest.mark.parametrize(("width", "inches"), [("column", 3.4), ("page", 7.0)])
def test_a_papers_figures_have_its_width_its_fonts_and_no_texts_but_in_a_file(
    run: Path, command: Command, width: str, inches: float
) -> None:
    asked = ["plot", run, "latency_quality", "stages", "fidelity", "--width", width, "--no-titles"]
    status, out, _ = command(*asked)
    assert status == 0 and out.count(f"/figures-{width}/") == 9
    for name in ("latency_quality", "stages", "fidelity"):
        page = (run / f"figures-{width}" / f"{name}.pdf").read_bytes()
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", page)
        assert box and float(box[1]) == pytest.approx(72 * inches, abs=0.1)
        assert b"/FontFile2" in page and b"/Type3" not in page
        picture = (run / f"figures-{width}" / f"{name}.png").read_bytes()
        assert int.from_bytes(picture[16:20], "big") == pytest.approx(300 * inches, abs=2)
    assert "settings on" in (run / f"figures-{width}" / "stages.txt").read_text()
    with style(replace(PAPERS[width], titles=False)):
        made = figure("stages", load(run))
    assert not made.texts and [ax.get_title() or ax.texts for ax in made.axes]


def test_a_filter_is_named_in_the_figure(run: Path) -> None:
    with style():
        made = figure("latency_quality", load(run, 'profile == "lte"'))
    assert len(made.axes) == 1
    assert any('Only rows where profile == "lte"' in text for text in texts(made))


def test_analysis_never_imports_torch_nor_a_window_system(small: Path) -> None:
    code = (
        "import sys, pathlib, testbed.cli.run; assert not {'pandas', 'matplotlib'} & set(sys.modules)\n"
        f"testbed.cli.run.show_results(pathlib.Path({str(small)!r}))\n"
        "assert not {'torch', 'transformers', 'tkinter', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_marks_are_colours_of_the_colour_blind_safe_palette() -> None:
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert {m.color for m in marks([(c, "split", c) for c in CODECS]).values()} <= palette
    assert np.isfinite([m.size for m in marks([("x", "split", "q2c@1..2+int8")]).values()]).all()


def test_regimes_names_the_fastest_that_keeps_the_quality_and_the_next(sweep: Path) -> None:
    said = texts(once("regimes", sweep))
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
    made = once("link_sweep", sweep)
    rows = load(sweep).rows
    edge = rows[(rows["delay_up_s"] == 0.01) & (rows["codec"] == "int8")].groupby("rate_up_bps")["e2e_s"]
    expected = edge.median()
    curves = [np.asarray(line.get_xydata()) for line in made.axes[0].lines if len(line.get_xdata()) == 3]
    assert any(np.allclose(c[:, 0], expected.index / 1e6) and np.allclose(c[:, 1], expected) for c in curves)


def test_link_sweep_s_qualities_stand_beside_each_other(sweep: Path) -> None:
    made = once("link_sweep", sweep)
    lower = made.axes[2]
    marks_at = [
        line.get_xdata()[0]
        for line in lower.lines
        if len(line.get_xdata()) == 3 and line.get_marker() != "None"
    ]
    assert len(marks_at) == len(set(marks_at)) == 5
    assert all(2.5 < x < 10 for x in marks_at)  # nearer to 5 than to 20, as the axis has them
    assert by_gid(made.axes[0], "joined") and not by_gid(lower, "joined")
    bars = sorted(
        {lower.transData.transform((line.get_xdata()[0], 0))[0] for line in by_gid(lower, "interval")}
    )
    assert len(bars) == 15 and min(np.diff(bars)) > 4  # pixels


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("latency_nll", {"nll": None}, "no finished trial has a nll"),
        ("latency_quality_by_task", {}, "one task only"),
        ("link_sweep", {}, "no two of its links differ in rate, delay or loss alone"),
        ("regimes", {}, "one link only"),
        ("retention", {}, "no codec of it selects tokens"),
        ("rate_distortion", {"kl": None, "nll": None}, "no trial that sent KV has a kl, nor an nll"),
        ("rate_distortion", {"codecs": ("int8",)}, "one codec only"),
        ("rate_distortion", {"codecs": (), "placements": ("cloud",)}, "no trial that sent KV"),
        ("layer_sensitivity", {}, "has no diagnosis; layer_sensitivity draws one"),
        ("who_prefills", {}, "links of at least two rates"),
        ("pipeline", {}, "has no spans"),
        ("adaptive", {}, "no setting of it chooses its chunks' levels"),
        ("deadlines", {}, "no setting of it has a deadline"),
        ("naive_error", {"rate_up_bps": None, "naive_s": None}, "nothing crossed a link with a rate"),
        ("fidelity_traces", {}, "none of its links was measured along a trace"),
        ("bars", {}, "unknown figure 'bars'; choose from latency_quality"),
    ],
)
def test_a_figure_without_its_data_says_what_it_needs(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    plain = {"profiles": ("lte",), "codecs": ("int8", "int4"), "tasks": ("needle",), "examples": 3}
    path = make_run(tmp_path / "run", **plain | changes)
    with pytest.raises(UsageError, match=said):
        draw(path, [name])


def test_rate_distortion_draws_mean_kl_against_mean_bits(run: Path) -> None:
    made = drawn("rate_distortion", run)
    rows = load(run).rows.query('placement == "split" and task == "needle"')
    panel = next(ax for ax in made.axes if any(t.get_text() == "needle" for t in ax.texts))
    points = [line.get_xydata()[0] for line in panel.lines if line.get_marker() not in (None, "None")]
    expected = rows.groupby("codec", sort=False)[["bits_per_element", "kl"]].mean()
    assert np.asarray(points) == pytest.approx(expected.to_numpy())
    assert panel.get_ylabel() + made.axes[0].get_ylabel() == "KL from the full cache (nats/token)"


def test_rate_distortion_without_kl_draws_the_lost_likelihood(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("int8", "int4"), tasks=("needle",), examples=3, kl=None)
    assert "ΔNLL" in drawn("rate_distortion", path).axes[0].get_ylabel()


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
    said = " ".join(texts(figure))
    assert f"change over time: {profile}" in said
    assert [float(t) for t in figure.axes[0].get_xticks()] == [5.0, 20.0, 80.0]  # of the links with 40 ms
    assert "at 40 ms one way" in said
    assert "means of a trace" in words("regimes", run)


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


def test_short_names_stay_apart() -> None:
    long = "q2c@0.25(pool=7, sinks=4)+mixed(low=4, high=8, protect=K0.V7)+zstd"
    names = ["int8", long, long.replace("V7", "V8"), "x" * 80]
    found = short(names)
    assert found["int8"] == "int8"
    assert found[long] == "q2c@0.25(…)+mixed(…)+zstd"
    assert len(set(found.values())) == len(names)
    assert max(map(len, found.values())) <= LONGEST + 12


def test_senders_are_named_by_who_chooses_or_by_their_only_level() -> None:
    ladder = "levels=[int8, int4, q2c@0.25+int4, text, skip], deadline=2s"
    names = [f"adaptive({ladder}, chunk=64)", f"adaptive({ladder}, policy=mpc(horizon=3), chunk=64)"]
    names += [
        f"adaptive(levels=[{level}], deadline=2s, policy=fixed, chunk=64)"
        for level in ("int8", "q2c@0.25+int4")
    ]
    assert list(short(f"store · {name}" for name in names).values()) == [
        "store · adaptive(throughput)",
        "store · adaptive(mpc(horizon=3))",
        "store · adaptive(int8)",
        "store · adaptive(q2c@0.25+int4)",
    ]


def test_regimes_puts_in_brackets_what_its_interval_does_not_show(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-mid", "lte"), ("int8",), ("split",), ("needle",), examples=80)
    change(path, lambda row: {"score": 1.0, "reference_score": 1.0})
    assert "int8" in texts(drawn("regimes", path))
    few = [
        r for r in lines(path) if int(r["example"].split("-")[1]) < 10
    ]  # none changed, but ten show little
    rewrite(path, few)
    assert "(int8)" in texts(drawn("regimes", path))


def test_a_diagnosis_is_plotted_from_its_file_its_directory_and_a_run(
    tmp_path: Path, command: Command
) -> None:
    file = write_diagnosis(tmp_path / "tiny-int4.json")
    (tmp_path / "other.json").write_text("[]")
    for subject in (file, tmp_path):
        status, out, _ = command("plot", subject)
        assert status == 0
        assert str(tmp_path / "tiny-int4-layer_sensitivity.png") in out
    run = make_run(tmp_path / "run", ("5g-mid",), ("int8",), ("split",), ("needle",), examples=3)
    write_diagnosis(run / "diagnosis.json")
    made = drawn("layer_sensitivity", run)
    assert "bottleneck: K1" in " ".join(texts(made))
    ticks = [t.get_text() for t in made.axes[1].get_xticklabels()]
    assert {"0", "1", "2"} <= set(ticks) and not any("." in t for t in ticks)  # layers are counted
