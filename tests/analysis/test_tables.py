"""Every column of every table that a run's directory has is explained, and nothing is explained that is not there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from testbed import stats
from testbed.analysis import comparisons, loads, naive, programs, summary
from testbed.analysis.run import Run, load
from tests.analysis.make_load import make_load

DOCS = Path(__file__).parents[2] / "docs"
_ENDS = ("_lo", "_hi")


def explained(page: str, heading: str) -> set[str]:
    """The names in backticks in the first cells of the table below a heading."""
    below = (DOCS / page).read_text(encoding="utf-8").split(heading, 1)[1].split("\n## ")[0]
    first = [line.split("|")[1] for line in below.splitlines() if line.startswith("| `")]
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


def columns(path: Path) -> set[str]:
    names = set(pd.read_csv(path).columns)
    return {n for n in names if not (n.endswith(_ENDS) and n[:-3] in names)}


@pytest.mark.parametrize(
    ("table", "write"),
    [
        ("summary.csv", summary.write),
        ("comparisons.csv", comparisons.write),
        ("naive_error.csv", naive.write),
    ],
)
def test_each_column_is_explained(table: str, write: Callable[[Run], Path], pipelines: Path) -> None:
    assert columns(write(load(pipelines))) == explained("tables.md", f"## {table}")


def test_each_column_of_loads_is_explained(tmp_path: Path) -> None:
    path = loads.write(load(make_load(tmp_path / "run")))
    assert path is not None
    said = explained("load.md", "| column of `loads.csv` | |")
    assert columns(path) <= said and {"clients", "jain", "carried_per_s"} <= said


def test_each_column_of_programs_is_explained(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = programs.Figure("link", "setting", "column", stats.NOTHING, 1.0, 1.0)
    monkeypatch.setattr(programs, "figures", lambda run: [one])
    assert columns(programs.write(load(pipelines))) == explained("tables.md", "## programs.csv")
