"""Figures of runs that are damaged, of long names, and of diagnoses."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed import analysis
from testbed.analysis.figures import figure
from testbed.analysis.figures.style import LONGEST, short
from testbed.analysis.run import load
from testbed.cli import main
from testbed.errors import UsageError
from tests.analysis.make_run import make_run, write_diagnosis
from tests.analysis.test_figures import drawn, texts
from tests.analysis.test_run_directory import lines, rewrite


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", ("5g-mid",), ("fp16", "int8"), ("split",), ("needle",), examples=3)


def test_a_damaged_directory_gives_figures_of_what_is_there_and_says_what_is_missing(run: Path) -> None:
    rows = lines(run)
    rewrite(run, [rows[0] | {"error": "the cloud died"}, *rows[1:]])
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"trial": "cut o')
    for name in ("manifest.json", "calibration.json"):
        (run / name).unlink()
    assert analysis.draw(run, ["stages"])
    said = " ".join(t.get_text() for t in texts(drawn("stages", run))).replace("\n", " ")
    for words in (
        "1 trial failed (",
        "manifest.json is missing",
        "calibration.json is missing",
        "1 unreadable line of trials.jsonl passed over",
    ):
        assert words in said, words


def test_a_newer_format_and_an_older_one_are_told_apart(run: Path) -> None:
    (run / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match="a newer testbed wrote it"):
        load(run)
    (run / "manifest.json").write_text('{"format": 1}')
    assert analysis.draw(run, ["latency_quality"])


def test_short_names_stay_apart() -> None:
    long = "q2c@0.25(pool=7, sinks=4)+mixed(low=4, high=8, protect=K0.V7)+zstd"
    names = ["int8", long, long.replace("V7", "V8"), "x" * 80]
    found = short(names)
    assert found["int8"] == "int8"
    assert found[long] == "q2c@0.25(…)+mixed(…)+zstd"
    assert len(set(found.values())) == len(names)
    assert max(map(len, found.values())) <= LONGEST + 12


def test_regimes_puts_in_brackets_what_its_interval_does_not_show(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-mid", "lte"), ("int8",), ("split",), ("needle",), examples=80)
    even = [r | {"score": 1.0, "reference_score": 1.0} for r in lines(path)]
    rewrite(path, even)
    assert "int8" in [t.get_text() for t in texts(drawn("regimes", path))]
    few = [r for r in even if int(r["example"].split("-")[1]) < 10]  # none changed, but ten show little
    rewrite(path, few)
    assert "(int8)" in [t.get_text() for t in texts(drawn("regimes", path))]


def test_a_diagnosis_is_plotted_from_its_file_its_directory_and_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_diagnosis(tmp_path / "tiny-int4.json")
    (tmp_path / "other.json").write_text("[]")
    for subject in (file, tmp_path):
        with pytest.raises(SystemExit) as ended:
            main(["plot", str(subject)])
        assert ended.value.code == 0
        assert str(tmp_path / "tiny-int4-layer_sensitivity.png") in capsys.readouterr().out
    with pytest.raises(UsageError, match="has no diagnosis; layer_sensitivity draws one"):
        figure("layer_sensitivity", load(run))
    write_diagnosis(run / "diagnosis.json")
    made = drawn("layer_sensitivity", run)
    assert "bottleneck: K1" in " ".join(t.get_text() for t in texts(made))
    ticks = [t.get_text() for t in made.axes[1].get_xticklabels()]
    assert {"0", "1", "2"} <= set(ticks) and not any("." in t for t in ticks)  # layers are counted
