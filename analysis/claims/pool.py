"""What claims are judged by: the rows of all runs, and which models and tasks take part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from testbed import stats
from testbed.analysis import comparisons, settings
from testbed.analysis.run import Run

#: A model and task take part where the full cache's mean score has its 95 % interval above this: fixed, since a run
#: knows no score without the right context. docs/tasks.md has what was measured.
LEAST_REFERENCE = 0.1
LEAST_REFERENCE_CHOICE = 0.3  #: four options: chance is 0.25

#: What a diagnosis says of INT4's damage by the published rule; "robust" is the third.
CONCENTRATED, DISTRIBUTED = "concentrated", "distributed"


@dataclass(frozen=True)
class Evidence:
    """The rows of all runs, and by model the examples of the admitted tasks; `diagnoses`: what one in a run's directory says of
    a model by the published rule.
    """

    rows: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    diagnoses: dict[str, str]

    def damage(self, model: str) -> str:
        """Whether INT4's damage sits in few layers of a model or is spread; empty: no run has a diagnosis of it."""
        return self.diagnoses.get(model, "")

    def parts(self) -> Iterator[tuple[str, str, pd.DataFrame]]:
        """(model, task, its examples): all tasks of a model together (an empty task), then each alone."""
        for model, table in self.tables.items():
            yield model, "", table
            tasks = list(table["task"].unique())
            for task in tasks if len(tasks) > 1 else ():
                yield model, str(task), table[table["task"] == task]

    def by_model(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """(model, all its rows): for what is judged by bytes and times, whatever the answers are worth."""
        for model, own in self.rows.groupby("model", sort=False):
            yield str(model), own

    def of(self, model: str) -> pd.DataFrame:
        """A model's rows of admitted tasks."""
        tasks = set(self.tables[model]["task"])
        return self.rows[(self.rows["model"] == model) & self.rows["task"].isin(tasks)]


def collect(runs: list[Run]) -> tuple[Evidence, list[str]]:
    """The evidence of these runs, and a sentence for each model and task that is left out."""
    rows = settings.labelled(pd.concat(_told_apart(runs), ignore_index=True))
    table = comparisons.by_example(rows)
    kept, said = [], []
    for (model, task), own in table.groupby(["model", "task"], sort=False):
        found = stats.mean(own["reference_score"], own["example"], bounds=(0.0, 1.0))
        least = LEAST_REFERENCE_CHOICE if str(task).startswith("choice") else LEAST_REFERENCE
        if found.low > least:
            kept.append(own)
        else:
            said.append(
                f"{model} · {task} is left out: the full cache scores {found.value:.2f} [{found.low:.2f}, "
                f"{found.high:.2f}] (n = {found.n}), not surely above {least}"
            )
    whole = pd.concat(kept) if kept else table.iloc[:0]
    tables = {str(m): own for m, own in whole.groupby("model", sort=False)}
    return Evidence(rows, tables, dict(filter(None, map(diagnosed, runs)))), said


def diagnosed(run: Run) -> tuple[str, str] | None:
    """The model of a diagnosis that lies in the run's directory, and what it found by the published rule; None: there is none."""
    try:
        found = json.loads((run.path / "diagnosis.json").read_text(encoding="utf-8"))
        return str(found["model"]), str(found["published"]["damage"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _told_apart(runs: list[Run]) -> list[pd.DataFrame]:
    """The runs' rows, examples named with their seed where runs have several: one question among other distractors is
    another example.
    """
    seeds = [str(run.settings.get("seed", 0)) for run in runs]
    several = len(set(seeds)) > 1
    rows = [run.require().rows for run in runs]
    return [
        own.assign(example=own["example"] + f" (seed {seed})") if several else own
        for own, seed in zip(rows, seeds, strict=True)
    ]
