"""The deployment procedure, from rows whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import guide
from analysis.run import load
from testbed.cli import main
from tests.analysis.test_claims import _made


def test_the_walk_ends_at_the_smallest_setting_that_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codecs = ("int8", "int4", "mixed(protect=3)")
    path = _made(tmp_path / "run", codecs, {"int8": 0.001, "int4": 0.3, "mixed(protect=3)": 0.004})
    found, _ = guide.walk([load(path)])
    steps = found["smollm2-135m"]
    assert [s.answer for s in steps] == ["yes", "no", "yes", "not measured"]
    with pytest.raises(SystemExit) as ended:
        main(["guide", str(path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "→ deploy mixed(protect=3)" in said
    assert "--codec q2c@0.5+int8" in said


def test_too_few_examples_leave_a_step_undecided(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int8",), {"int8": 0.001}, n=20)
    found, _ = guide.walk([load(path)])
    assert found["smollm2-135m"][0].answer == "undecided"
