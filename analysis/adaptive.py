"""What senders that choose each chunk's level came to: deadlines met, answers and levels, against the oracle and all others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.levels import ladder, mean_rung
from testbed.analysis.names import short
from testbed.analysis.run import Run

ORACLE = "policy=oracle"


@dataclass(frozen=True)
class Kept:
    """One setting on one link. `met`: share of examples whose first token came by the deadline, with Clopper and Pearson's
    interval; `level`: mean rung of its chunks, 0 being the first of its ladder (NaN: it has none); `left_out`: mean tokens;
    `behind_met`, `behind_score`: the oracle's less its own, paired by example (n = 0: nothing to compare with).
    """

    panel: str
    setting: str
    deadline_s: float
    met: stats.Estimate
    score: stats.Estimate
    level: float
    bits: float
    left_out: float
    behind_met: stats.Estimate
    behind_score: stats.Estimate
    adaptive: bool


def panels(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    """The links on which some setting has a deadline or chooses levels."""
    for panel, rows in settings.panels(run.rows):
        if rows["deadline_s"].notna().any() or any(map(ladder, rows["delivery"].unique())):
            yield panel, rows


def kept(run: Run) -> list[Kept]:
    """Every setting on those links, in the run's order."""
    return [each for panel, rows in panels(run) for each in _kept(panel, rows)]


def _kept(panel: str, rows: pd.DataFrame) -> list[Kept]:
    found = []
    rows = settings.at_home(_judged(rows))
    oracle = rows[rows["delivery"].str.contains(ORACLE, regex=False)]
    for setting, own in rows.groupby("setting", sort=False):
        examples = settings.clusters(own)
        rungs = pd.Series([mean_rung(d, of) for d, of in zip(own["delivery"], own["levels"], strict=True)])
        other = oracle if str(setting) not in set(oracle["setting"]) else oracle.iloc[:0]
        found.append(
            Kept(
                panel,
                str(setting),
                float(own["deadline_s"].median()),
                stats.share_above(own["met"], 0.5, examples),
                stats.mean(own["score"], examples, own["task"], bounds=settings.SCORE.bounds),
                float(rungs.mean()),
                float(own["bits_per_element"].mean()),
                float(own["tokens_left_out"].mean()),
                _behind(own, other, "met"),
                _behind(own, other, "score"),
                bool(ladder(str(own["delivery"].iloc[0]))),
            )
        )
    return found


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, where they have one deadline, with `met` of settings without one: whether their first token came by then."""
    deadlines = rows["deadline_s"].dropna().unique()
    if len(deadlines) != 1:
        return rows
    there = (rows["ttft_s"] <= deadlines[0]).astype(float)
    return rows.assign(met=rows["met"].where(rows["deadline_s"].notna(), there))


def _behind(own: pd.DataFrame, oracle: pd.DataFrame, column: str) -> stats.Estimate:
    """How much more the oracle has, on the same examples."""
    keys = ["task", "example"]
    means = [side.groupby(keys)[column].mean().reset_index() for side in (oracle, own)]
    both = means[0].merge(means[1], on=keys, suffixes=("_oracle", ""))
    if both.empty:
        return stats.NOTHING
    pair = (both[f"{column}_oracle"], both[column])
    return stats.difference(*pair, settings.clusters(both), both["task"], bounds=(0.0, 1.0))


def text(run: Run) -> str:
    """The table for people, a block a link; empty where no setting has a deadline or chooses levels."""
    every, blocks = kept(run), []
    names = short((each.setting for each in every), 60)
    wide = max([len(name) for name in names.values()] + [7])
    for panel in dict.fromkeys(each.panel for each in every):
        own = [each for each in every if each.panel == panel]
        deadlines = sorted({each.deadline_s for each in own if math.isfinite(each.deadline_s)})
        head = f"{panel} · deadline {' and '.join(f'{d:g} s' for d in deadlines) or 'none'}"
        columns = (
            f"  {'setting':<{wide}}  {'n':>4}  {'deadline met':>18}  {'score':>18}  {'level':>5}  {'bits':>5}  {'left out':>8}"
            f"  {'oracle: met':>20}  {'oracle: score':>20}"
        )
        lines = [
            f"  {names[e.setting]:<{wide}}  {e.score.n:>4}  {_share(e.met):>18}  {e.score.text(2):>18}  {_number(e.level):>5}"
            f"  {_number(e.bits):>5}  {_number(e.left_out, 0):>8}  {e.behind_met.text(2, '+'):>20}"
            f"  {e.behind_score.text(2, '+'):>20}"
            for e in own
        ]
        blocks.append("\n".join([head, columns, *(line.rstrip() for line in lines)]))
    if not blocks:
        return ""
    note = (
        "deadline met: share of examples, Clopper and Pearson's 95 % interval; of settings without one, whether their first "
        "token came by then;\nlevel: mean rung of the chunks, 0: the ladder's first; bits: of the payload an element of the "
        "cache; left out: mean tokens; oracle: what it has more, paired by example"
    )
    return "\n\n".join([*blocks, note])


def _share(estimate: stats.Estimate) -> str:
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]" if estimate.n else "-"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
