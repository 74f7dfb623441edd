"""Runs of programs of one's own: what each setting's client came to on each link, for every column that it printed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from testbed import stats
from testbed.analysis import layout, settings
from testbed.analysis.describe import caveats, conditions
from testbed.analysis.run import Run
from testbed.experiment.row import COLUMNS
from testbed.units import positional

#: Of a row's own columns those that a program fills, in the order in which they are shown.
_OWN = ("e2e_s", "ttft_s", "token_s", "answer_tokens", "payload_bytes", "wire_bytes", "score", "em", "f1")
_IN_TERMINAL = 8  #: so many columns; programs.csv has all


@dataclass(frozen=True)
class Figure:
    """A column of a setting's finished trials on a link: median with its 95 % bootstrap interval, and mean."""

    panel: str
    setting: str
    column: str
    median: stats.Estimate
    mean: float
    deviation: float


def is_one(run: Run) -> bool:
    """Whether the run is of programs of one's own."""
    both = run.attempts
    return len(both) > 0 and bool((both["placement"] == "program").all())


def columns(run: Run) -> list[str]:
    """The columns of numbers that differ between trials: of a row's own, those that a program filled; then the client's."""
    rows = run.rows
    own = [name for name in _OWN if rows[name].notna().any()]
    if "ttft_s" in own and rows["ttft_s"].equals(rows["e2e_s"]):
        own.remove("ttft_s")
    asked = set(run.scenario.get("parameters", {}))
    known = {*COLUMNS, *asked, "latency_s", "one_format"}
    theirs = [
        str(name)
        for name in rows.columns
        if name not in known and pd.api.types.is_numeric_dtype(rows[name]) and rows[name].nunique() > 1
    ]
    return [*own, *theirs]


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `setting`, the parameters that are varied, and `panel`, the link."""
    labelled = settings.labelled(rows)
    setting = labelled["setting"].str.removeprefix("program").str.strip()
    return labelled.assign(setting=setting.where(setting != "", "client"))


def figures(run: Run) -> list[Figure]:
    """Every column of every setting on every link, in the run's order."""
    rows, wanted = named(run.attempts), columns(run)
    return [
        _figure(str(panel), str(setting), column, own)
        for (panel, setting), own in rows.groupby(["panel", "setting"], sort=False)
        for column in wanted
    ]


def _figure(panel: str, setting: str, column: str, own: pd.DataFrame) -> Figure:
    failed = own["failed"].astype(bool)
    # A client that failed took for ever, and told nothing.
    values = own[column].mask(failed, math.inf) if column in ("e2e_s", "ttft_s") else own.loc[~failed, column]
    known = values.astype("float64").dropna()
    finite = known[np.isfinite(known)]
    deviation = float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
    median = stats.median(known) if len(known) else stats.NOTHING
    return Figure(
        panel, setting, column, median, float(finite.mean()) if len(finite) else math.nan, deviation
    )


def write(run: Run) -> Path:
    """Write ``programs.csv``: a line for each link, setting and column."""
    lines = [
        {
            "link": each.panel,
            "setting": each.setting,
            "column": each.column,
            "n": each.median.n,
            "median": each.median.value,
            "median_lo": each.median.low,
            "median_hi": each.median.high,
            "mean": each.mean,
            "standard_deviation": each.deviation,
        }
        for each in figures(run)
    ]
    frame = pd.DataFrame(lines)
    return run.write("programs.csv", lambda to: frame.to_csv(to, index=False, float_format="%.6g"))


def text(run: Run, width: int | None = None) -> str:
    """The terminal's table: for each link its settings, from the fastest on, with the columns that the client printed."""
    every, wanted = figures(run), columns(run)
    shown = wanted[:_IN_TERMINAL]
    notes = [
        "medians over trials; brackets: 95 % bootstrap intervals; n: trials; a client that failed took for ever"
    ]
    if len(wanted) > len(shown):
        notes.append(
            f"programs.csv has {len(wanted) - len(shown)} columns more: {', '.join(wanted[len(shown) :])}"
        )
    blocks = list(_blocks(run, every, shown, width))
    told = "\n".join(layout.sentences(line, width, "   ") for line in [*notes, *_caveats(run)])
    return "\n\n".join([told, *blocks])


def _blocks(run: Run, every: list[Figure], shown: list[str], width: int | None) -> Iterator[str]:
    rows = named(run.attempts)
    for panel, own in rows.groupby("panel", sort=False):
        found = {(each.setting, each.column): each for each in every if each.panel == panel}
        lines = []
        for setting, trials in own.groupby("setting", sort=False):
            failed = int(trials["failed"].sum())
            cells = [_cell(found[str(setting), column].median) for column in shown]
            note = f"failed {failed} of {len(trials)}" if failed else ""
            lines.append(
                (found[str(setting), "e2e_s"].median.value, [str(setting), str(len(trials)), *cells, note])
            )
        lines.sort(key=lambda line: line[0])
        head = layout.sentences(f"{panel}: {conditions(own)}", width, "  ")
        header = ["setting", "n", *shown, ""]
        table = layout.table([line for _, line in lines], header, width, texts=(0, len(header) - 1), indent=2)
        yield f"{head}\n{table}"


def _cell(median: stats.Estimate) -> str:
    if not median.n:
        return "-"
    if not math.isfinite(median.value):
        return "none"
    interval = f" [{_number(median.low)}, {_number(median.high)}]" if math.isfinite(median.low) else ""
    return _number(median.value) + interval


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else positional(f"{value:.4g}")


def _caveats(run: Run) -> list[str]:
    return [sentence for sentence in caveats(run) if not sentence.startswith("Settings have from")]
