"""The deployment procedure, from rows whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.analysis.run import load
from testbed.cli import main
from testbed.guide import procedure
from tests.analysis.make_run import lines, rewrite, losing


def test_the_walk_ends_at_the_smallest_setting_that_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codecs = ("int8", "int4", "mixed(protect=3)")
    path = _made(tmp_path / "run", codecs, {"int8": 0.001, "int4": 0.3, "mixed(protect=3)": 0.004})
    found, _ = procedure.answered([load(path)])
    steps = found["smollm2-135m"]
    assert [s.answer for s in steps] == ["yes", "no", "yes", "not measured"]
    with pytest.raises(SystemExit) as ended:
        main(["guide", str(path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "→ deploy mixed(protect=3)" in said
    assert "--codec q2c@0.5+int8" in said


def test_int4_is_judged_in_every_form_and_the_smallest_that_holds_is_taken(tmp_path: Path) -> None:
    sizes = {"int4(group=0, symmetric=true)": 265, "int4(symmetric=true)": 281, "int4": 312}
    rise = dict(zip(sizes, (0.4, 0.004, 0.001), strict=True))
    path = _made(tmp_path / "run", tuple(sizes), rise)
    rewrite(path, [r | {"payload_bytes": sizes[r["codec"]], "kv_bytes": 1000} for r in lines(path)])
    found, _ = procedure.answered([load(path)])
    step = found["smollm2-135m"][1]
    assert (step.setting, step.answer) == ("int4(symmetric=true)", "yes")
    assert step.smaller == pytest.approx(1000 / 281)
    assert "int4(group=0, symmetric=true): 3.77× smaller, ΔNLL +0.4" in step.figures
    assert "int4: 3.21× smaller, ΔNLL +0.001, yes" in step.figures


def test_too_few_examples_leave_a_step_undecided(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int8",), {"int8": 0.001}, n=20)
    found, _ = procedure.answered([load(path)])
    assert found["smollm2-135m"][0].answer == "undecided"
