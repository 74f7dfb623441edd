"""Figures of papers can be read, are in an order, and say in their files what they show."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from testbed.analysis import loads, report, settings
from testbed.analysis.figures import draw_all, figure
from testbed.analysis.figures.load_timeline import _busy
from testbed.analysis.figures.stages import by_latency
from testbed.analysis.figures.style import PAPERS, style
from testbed.analysis.run import load
from tests.analysis.make_load import make_load
from tests.analysis.make_run import CODECS, lines, make_run, rewrite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("legible") / "run", examples=4, tasks=("needle",))


@pytest.mark.parametrize("width", ["column", "page"])
@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("stages", "run"), ("regimes", "run"), ("naive_error", "run"), ("latency_quality", "run"),
        ("timeline", "changing"), ("pipeline", "changing"), ("adaptive", "changing"),
    ],
)  # fmt: skip
def test_no_letter_is_printed_smaller_than_six_points(
    name: str, of: str, width: str, request: pytest.FixtureRequest
) -> None:
    with style(replace(PAPERS[width], titles=False)):
        made = figure(name, load(request.getfixturevalue(of)))
        FigureCanvasAgg(made).draw()
    scale = PAPERS[width].printed / float(made.get_size_inches()[0])
    sizes = {
        text.get_text(): text.get_fontsize() * scale
        for text in made.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip()
    }
    assert len(sizes) > 10 and {t: size for t, size in sizes.items() if size < 5.99} == {}


def test_a_long_name_is_written_smaller_before_it_is_cut(run: Path, tmp_path: Path) -> None:
    long = "up:rate=10mbit,delay=20ms,jitter=5ms,loss=0.5%,queue=2bdp;down:rate=50mbit,delay=20ms,loss=0.1%"
    path = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), tasks=("needle",), examples=3)
    rewrite(path, [row | {"profile": long} for row in lines(path)])
    with style():
        made = figure("stages", load(path))
    assert any(text.get_text() == long and text.get_fontsize() < 9.5 for text in made.axes[0].texts)


def test_stages_stand_in_the_order_of_their_latencies(run: Path) -> None:
    rows = settings.labelled(load(run).attempts)
    order = by_latency(rows)
    assert len(order) == rows["setting"].nunique() == len(CODECS) + 2
    medians = rows.groupby(["setting", "panel"])["e2e_s"].median().unstack()
    for before, after in pairwise(order):
        assert not (medians.loc[after] < medians.loc[before]).all()
    assert order.index("q2c@0.25+int4") < order.index("int4") < order.index("int8") < order.index("fp16")
    with style():
        shown = figure("stages", load(run)).axes[0].get_yticklabels()
    assert [label.get_text() for label in shown] == order


def test_what_failed_stands_last_and_the_slowest_of_many_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(tmp_path / "run", ("lte",), ("fp16", "int8", "int4"), tasks=("needle",), examples=3)
    rewrite(
        path,
        [row | ({"error": "no", "e2e_s": None} if row["codec"] == "int4" else {}) for row in lines(path)],
    )
    assert by_latency(settings.labelled(load(path).attempts))[-1] == "int4"
    monkeypatch.setattr("testbed.analysis.figures.stages.MOST", 3)
    with style():
        made = figure("stages", load(path))
    assert len(made.axes[0].get_yticklabels()) == 3 and "2 slower settings left out" in made.get_label()


def test_a_request_over_a_link_that_changes_has_its_rate_above_it(changing: Path) -> None:
    with style():
        made = figure("timeline", load(changing))
    for ax in made.axes:
        assert [label.get_text() for label in ax.get_yticklabels()] == ["rate", "edge", "link", "cloud"]
        assert any("Mbit/s" in text.get_text() for text in ax.texts)


def test_a_loads_handovers_are_drawn(tmp_path: Path) -> None:
    path = make_load(tmp_path / "run")
    shown = max(loads.served(load(path)), key=_busy)
    met = {"edge": "n1", "links": "a to b", "begun_s": 60.0, "ended_s": 62.5}
    ended = [
        {"cell": shown.cell, "repeat": 0, "handovers": [met]},
        {"cell": "another", "repeat": 0, "handovers": [met, met]},
        "no load",
    ]
    (path / "loads.json").write_text(json.dumps({"ended": ended}))
    with style():
        made = figure("load_timeline", load(path))
    for ax in made.axes:
        spans = [p.get_x() for p in ax.patches if p.get_alpha() == 0.35]
        assert spans == [60.0]
    assert "Purple: a handover" in made.get_label()
    (path / "loads.json").write_text("[")
    with style():
        assert "Purple" not in figure("load_timeline", load(path)).get_label()


def test_the_page_says_of_each_picture_what_its_file_says(run: Path) -> None:
    drawn = draw_all(load(run), ["stages", "timeline"])
    page = html.unescape(report.render(load(run), [path for path in drawn if path.suffix == ".png"]))
    for path in drawn:
        if path.suffix == ".png":
            with Image.open(path) as image:
                said = image.info["Description"]
            assert f'alt="{said}"' in page and len(said) > 80
    assert "12 settings on 4 emulated links" in page
