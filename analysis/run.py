"""A run's directory as data: rows in a typed table, the manifest, the calibration, and what is missing of
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from testbed import files
from testbed.errors import UsageError
from testbed.experiment import compute
from testbed.experiment.compute import Start
from testbed.experiment.results import RunDirectory
from testbed.experiment.row import STAGES, Row
from testbed.identity import behind_sudo


@dataclass(frozen=True)
class Run:
    """One run. `rows` are the finished trials, `failed` those whose `error` is not empty; both have every
    column of `Row`.
    """

    path: Path
    manifest: dict[str, Any]
    calibration: dict[str, Any]
    rows: pd.DataFrame
    failed: pd.DataFrame
    where: str = ""  #: the expression that selected the rows; empty: all of them
    #: compute as it was measured before, between and after trials: each start of the run, in order
    compute: tuple[Start, ...] = ()
    notes: tuple[str, ...] = field(default=())  #: what was missing or unreadable in the directory
    #: requests of loads' warm-up, finished or not: what is under way when the part that counts begins
    warming: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def attempts(self) -> pd.DataFrame:
        """Finished and failed trials, told apart by the column `failed`. What failed took for ever (infinite `latency_s`)
        and answered nothing: what figures and tables of latency count, lest failures make a setting faster.
        """
        failed = self.failed.assign(latency_s=math.inf)
        both = [part for part in (self.rows.assign(failed=False), failed.assign(failed=True)) if len(part)]
        return pd.concat(both, ignore_index=True) if both else self.rows.assign(failed=False)

    @property
    def latency(self) -> str:
        """What `latency_s` is here, for an axis: the end-to-end latency, or the time to the first token where answers to
        the same question differ in length, so that a codec is not faster for having been told to say less.
        """
        return "time to first token" if _lengths_differ(self.rows) else "end-to-end latency"

    @property
    def untimed(self) -> str:
        """Why its rows have no times, in words; empty where they have."""
        unlinked = len(self.rows) > 0 and bool((self.rows["emulator"] == "none").all())
        none = unlinked and bool(self.rows["e2e_s"].isna().all())
        return "made without a link (placement-free): its rows have no times" if none else ""

    @property
    def scenario(self) -> dict[str, Any]:
        """The scenario's settings; empty where the manifest is missing or has none."""
        return self._kept("settings")

    @property
    def inputs(self) -> dict[str, str]:
        """A digest of each thing that the run read by name (a task's file, its model, a trace); empty where it kept none."""
        digests = {name: str(digest) for name, digest in self._kept("inputs").items()}
        traces = self._kept("traces").items()
        return digests | {
            f"trace {n}": str(kept.get("sha256")) for n, kept in traces if isinstance(kept, dict)
        }

    @property
    def diagnosis(self) -> dict[str, Any]:
        """The diagnosis that lies in the directory; empty where none does that can be read."""
        with contextlib.suppress(UsageError):
            return RunDirectory(self.path).read("diagnosis.json")
        return {}

    @property
    def ended_loads(self) -> list[dict[str, Any]]:
        """What ``loads.json`` has of each load that was put on; empty where it cannot be read."""
        with contextlib.suppress(UsageError):
            entries = RunDirectory(self.path).entries("loads.json", "ended")
            return [each for each in entries if isinstance(each, dict)]
        return []

    @property
    def alone(self) -> Run:
        """The run without requests that were made under a load: what is said of a single request is said of these."""
        loaded = sum(int((part["load"] != "sequential").sum()) for part in (self.rows, self.failed))
        if not loaded:
            return self
        said = f"{loaded:,} request{'' if loaded == 1 else 's'} under a load left out here"
        rows, failed = (
            part[part["load"] == "sequential"].reset_index(drop=True) for part in (self.rows, self.failed)
        )
        return dataclasses.replace(self, rows=rows, failed=failed, notes=(*self.notes, said))

    def _kept(self, key: str) -> dict[str, Any]:
        value = self.manifest.get(key)
        return value if isinstance(value, dict) else {}

    def gaps(self) -> list[str]:
        """What is not in `rows` and should be: failed trials, missing files, unreadable lines."""
        failed = len(self.failed)
        left_out = [f"{failed:,} failed trial{'' if failed == 1 else 's'} left out"] if failed else []
        return [*left_out, *self.notes]

    def require(self, rows: int = 1) -> Run:
        """This run. Raises UsageError where it has fewer finished trials than `rows`."""
        have = len(self.rows)
        if have >= rows:
            return self
        what = f"{self.path} has {'no' if have == 0 else have} finished trial{'' if have == 1 else 's'}"
        if self.where:
            what += f" where {self.where}"
        if have:
            what += f"; a figure compares at least {rows}"
        if len(self.failed):
            first = str(self.failed["error"].iloc[0]).splitlines()[0][:200]
            what += f" ({len(self.failed)} failed, the first with: {first})"
        elif not have and not self.where:
            what += f"; continue the run with: testbed run --resume {self.path}"
        raise UsageError(what)

    def write(self, name: str, produce: Callable[[Path], object]) -> Path:
        """Have `produce` write a temporary file and move it to `name` (relative to the directory) in one
        step.

        What root writes belongs to the directory's owner. Raises StorageError where writing fails.
        """
        target, owner = self.path / name, self._owner()
        with files.storing(target):
            if not target.parent.is_dir():
                target.parent.mkdir()
                if owner is not None:
                    os.chown(target.parent, *owner, follow_symlinks=False)
        with files.replacing(target, owner=owner) as temporary:
            produce(temporary)
        return target

    def _owner(self) -> tuple[int, int] | None:
        if os.geteuid() != 0 or behind_sudo():  # then files are already whose they are to be
            return None
        owner = self.path.stat()
        return owner.st_uid, owner.st_gid


def load(path: Path, where: str | None = None) -> Run:
    """Read a run's directory; files that are missing and lines that a kill cut off become `Run.notes`.

    `where` selects rows with a pandas query over the columns. Raises UsageError where `path` is no run
    directory, was written in another format, or `where` cannot be evaluated.
    """
    directory = RunDirectory.open(Path(path))
    notes: list[str] = []
    manifest = _part(directory.manifest, directory, "manifest.json", notes)
    calibration: dict[str, Any] = {}
    if not _placement_free(manifest):  # which has no link to measure
        calibration = _part(lambda: directory.read("calibration.json"), directory, "calibration.json", notes)
    rows, lost = directory.all_rows()
    table = _latest(_typed(pd.DataFrame(rows)))
    if where:
        table = select(table, where)
    early = table["warmup"].astype(bool)
    warming, table = table[early].reset_index(drop=True), table[~early]
    if len(warming):
        notes.append(f"{len(warming):,} requests of loads' warm-up left out")
    failed = table["error"] != ""
    done = table[~failed].reset_index(drop=True)
    return Run(
        path=directory.path,
        manifest=manifest,
        calibration=calibration,
        rows=done.assign(
            latency_s=done["ttft_s" if _lengths_differ(done) else "e2e_s"], one_format=_one_format(manifest)
        ),
        failed=table[failed].reset_index(drop=True),
        where=where or "",
        compute=_compute(directory, notes),
        notes=(*notes, *lost),
        warming=warming,
    )


def read_apart(runs: Sequence[Run]) -> str:
    """What these runs read by one name though it was not one thing, a list in words; empty: nothing."""
    digests: dict[str, set[str]] = {}
    for run in runs:
        for name, digest in run.inputs.items():
            digests.setdefault(name, set()).add(digest)
    return ", ".join(name for name, known in digests.items() if len(known) > 1)


def _placement_free(manifest: dict[str, Any]) -> bool:
    settings = manifest.get("settings")
    return isinstance(settings, dict) and settings.get("placement_free") is True


def _part(
    read: Callable[[], dict[str, Any]], directory: RunDirectory, name: str, notes: list[str]
) -> dict[str, Any]:
    if not (directory.path / name).is_file():
        notes.append(f"{name} is missing")
        return {}
    try:
        return read()
    except UsageError:
        notes.append(f"{name} cannot be read")
        return {}


def _compute(directory: RunDirectory, notes: list[str]) -> tuple[Start, ...]:
    """What compute.json has; a run from before there was one has none."""
    try:
        entries = directory.entries("compute.json", "starts")
    except UsageError:
        entries = [None]
    starts = compute.starts(entries)
    if entries and not starts:
        notes.append("compute.json cannot be read")
    return starts


def _lengths_differ(rows: pd.DataFrame) -> bool:
    """Whether settings answered a question in different numbers of tokens; False where the rows do not have them."""
    if "answer_tokens" not in rows:
        return False
    return bool((rows.groupby(["model", "task", "example"])["answer_tokens"].nunique() > 1).any())


def _one_format(manifest: dict[str, Any]) -> bool:
    """Whether edge and cloud hold the model in one number format, as far as the manifest tells."""
    settings = manifest.get("settings")
    dtype, device = (settings.get(k) if isinstance(settings, dict) else None for k in ("dtype", "device"))
    apart = [isinstance(sides, dict) and sides.get("edge") != sides.get("cloud") for sides in (dtype, device)]
    # What "auto" becomes depends on the device.
    return not apart[0] and not (apart[1] and isinstance(dtype, dict) and dtype.get("edge") == "auto")


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every column of `Row`, in its type and order, and unknown columns behind them."""
    columns: dict[str, pd.Series[Any]] = {}
    for column in dataclasses.fields(Row):
        values = table[column.name] if column.name in table else pd.Series([None] * len(table), dtype=object)
        kind = str(column.type)
        default = column.default if column.default is not dataclasses.MISSING else None
        if kind == "str":
            columns[column.name] = values.map(lambda v: v if isinstance(v, str) else "").astype(object)
        elif kind == "bool":
            known = values.map(lambda v: isinstance(v, bool | np.bool_))
            columns[column.name] = values.where(known, default).astype(bool)
        else:
            columns[column.name] = _numbers(values, kind == "int", default)
    extra = {str(name): table[name] for name in table.columns if name not in columns}
    return pd.DataFrame({**columns, **extra})


def _numbers(values: pd.Series[Any], whole: bool, default: Any) -> pd.Series[Any]:
    # Through Python floats: to_numeric raises on integers that do not fit in 64 bits.
    numbers = values.map(_number).astype("float64")
    if whole:
        return numbers.fillna(default or 0).clip(-(2.0**62), 2.0**62).round().astype("int64")
    return numbers if default is None else numbers.fillna(default)


def _number(value: Any) -> float:
    if not isinstance(value, int | float | np.number):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _latest(table: pd.DataFrame) -> pd.DataFrame:
    """One row per trial: a trial that failed and finished when the run was resumed counts as finished."""
    order = np.lexsort((np.arange(len(table)), (table["error"] == "").to_numpy()))
    kept = table.iloc[order]
    kept = kept[(kept["trial"] == "") | ~kept.duplicated("trial", keep="last")]
    return kept.sort_index()


def select(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows for which an expression over the columns holds. Raises UsageError where it cannot be evaluated."""
    outside_quotes = re.sub(r"'[^']*'|\"[^\"]*\"", "", where)
    if "@" in outside_quotes or "__" in where:
        raise UsageError(
            f"--where {where!r}: only columns, values and comparisons, such as 'profile == \"5g-mid\"'"
        )
    try:
        chosen = table.query(where, engine="python")
    except Exception as error:  # pandas raises whatever the expression makes Python raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--where {where!r}: {reason}; write it as 'profile == \"5g-mid\" and e2e_s < 2'"
        ) from error
    if not isinstance(chosen, pd.DataFrame):
        raise UsageError(f"--where {where!r}: does not select rows; write it as 'profile == \"5g-mid\"'")
    return chosen


def stage_names(rows: pd.DataFrame) -> list[str]:
    """The stages that take any time worth drawing in these rows, a thousandth of the whole, in the order in which they happen."""
    return [stage for stage in STAGES if (rows[stage] > 1e-3 * rows["e2e_s"]).any()]
