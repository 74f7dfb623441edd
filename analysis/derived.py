"""What a run's directory has that follows from its rows, derived again and compared: tables, and ``trials.parquet``."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from testbed.analysis import comparisons, loads, naive, programs, summary
from testbed.analysis.run import Run, load
from testbed.errors import UsageError
from testbed.experiment.results import RunDirectory

#: A table's six digits, the last of which another machine may round the other way.
_RELATIVE, _ABSOLUTE = 2e-5, 1e-9
_TABLES: dict[str, Callable[[Run], object]] = {
    "summary.csv": summary.write,
    "comparisons.csv": comparisons.write,
    "naive_error.csv": naive.write,
    "loads.csv": loads.write,
    "programs.csv": programs.write,
}


@dataclass(frozen=True)
class _Aside(Run):
    """A run whose files are written elsewhere."""

    aside: Path = field(default=Path())

    def write(self, name: str, produce: Callable[[Path], object]) -> Path:
        target = self.aside / name
        target.parent.mkdir(exist_ok=True)
        produce(target)
        return target


def check(
    directory: RunDirectory, rows: list[dict[str, Any]], notes: list[str], counts: Counter[str]
) -> Iterator[str]:
    """A line for each figure in a file that the rows do not give."""
    yield from _parquet(directory, rows, notes)
    run = load(directory.path)
    with tempfile.TemporaryDirectory() as scratch:
        aside = _Aside(**{f.name: getattr(run, f.name) for f in fields(run)}, aside=Path(scratch))
        for name, write in _TABLES.items():
            if (kept := directory.path / name).is_file():
                yield from _table(kept, write, aside, counts)


def _table(kept: Path, write: Callable[[Run], object], aside: _Aside, counts: Counter[str]) -> Iterator[str]:
    try:
        write(aside)
    except UsageError as error:
        yield f"{kept.name}: is there, and the rows give none: {error}"
        return
    if not (again := aside.aside / kept.name).exists():
        yield f"{kept.name}: is there, and the rows give none"
        return
    try:
        before, now = (pd.read_csv(path, keep_default_na=False, dtype=str) for path in (kept, again))
    except (ValueError, OSError) as error:
        yield f"{kept.name}: cannot be read: {str(error).splitlines()[0]}"
        return
    counts["table cells"] += before.size
    yield from different(kept.name, before, now)


def different(name: str, before: pd.DataFrame, now: pd.DataFrame) -> Iterator[str]:
    """Where two tables of texts differ, numbers by more than their last digit."""
    if list(before.columns) != list(now.columns):
        apart = [str(c) for c in before.columns.symmetric_difference(now.columns, sort=False)]
        yield f"{name}: its columns are others: {', '.join(apart) or 'in another order'}"
        return
    if len(before) != len(now):
        yield f"{name}: has {len(before)} lines, the rows give {len(now)}"
        return
    for column in before.columns:
        pairs = zip(before[column], now[column], strict=True)
        for line, (old, new) in enumerate(pairs, 2):
            if old != new and not _close(old, new):
                yield f"{name}:{line}: {column} is {old or 'empty'}, the rows give {new or 'nothing'}"


def _close(old: str, new: str) -> bool:
    try:
        return math.isclose(float(old), float(new), rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    except ValueError:
        return False


def _parquet(directory: RunDirectory, rows: list[dict[str, Any]], notes: list[str]) -> Iterator[str]:
    """``trials.parquet`` has what ``trials.jsonl`` has."""
    if not all((directory.path / name).is_file() for name in ("trials.jsonl", "trials.parquet")):
        return
    typed = directory.parquet_rows()
    if len(typed) != len(rows):
        yield f"trials.parquet: has {len(typed)} rows, trials.jsonl {len(rows)}"
        return
    for number, (one, other) in enumerate(zip(rows, typed, strict=True)):
        for column in one:
            if not _same(one[column], other.get(column)):
                yield f"trials.parquet: row {number}: {column} is {other.get(column)!r}, in trials.jsonl {one[column]!r}"


def _same(one: Any, other: Any) -> bool:
    missing = [value is None or (isinstance(value, float) and math.isnan(value)) for value in (one, other)]
    if any(missing):
        return all(missing)
    return bool(one == other) or _moment(one) == _moment(other) is not None


def _moment(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
