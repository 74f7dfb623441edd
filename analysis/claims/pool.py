"""What claims are judged by: the rows of several runs, pooled, and which models and tasks take part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from testbed import stats
from testbed.analysis import comparisons, hosts, loads, settings
from testbed.analysis.describe import failures
from testbed.analysis.loads import Served
from testbed.analysis.run import Run, read_apart
from testbed.errors import UsageError

#: A model and task take part where the full cache's mean score has its 95 % interval above this: fixed, since a run
#: knows no score without the right context. docs/tasks.md has what was measured.
LEAST_REFERENCE = 0.1
LEAST_REFERENCE_CHOICE = 0.3  #: four options: chance is 0.25

OF_FOUR = ("choice", "mmlu")  #: such tasks begin so

#: What a diagnosis says of INT4's damage by the published rule.
ROBUST, CONCENTRATED, DISTRIBUTED = "robust", "concentrated", "distributed"


@dataclass(frozen=True)
class Sample:
    """The examples of a model's task (empty: of all its admitted tasks together)."""

    model: str
    task: str
    table: pd.DataFrame


@dataclass(frozen=True)
class Pool:
    """The rows of all runs, and by model the examples of the admitted tasks; `damage`: whether INT4's sits in few layers of a
    model or is spread, as a diagnosis by the published rule in a run's directory says.
    """

    rows: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    damage: dict[str, str]
    loads: dict[str, list[Served]] = field(default_factory=dict)  #: what was asked under loads, by model

    def models(self) -> Iterator[Sample]:
        """All tasks of each model together."""
        return (Sample(model, "", table) for model, table in self.tables.items())

    def samples(self) -> Iterator[Sample]:
        """All tasks of a model together, then each alone."""
        for whole in self.models():
            yield whole
            tasks = list(whole.table["task"].unique())
            for task in tasks if len(tasks) > 1 else ():
                yield Sample(whole.model, str(task), whole.table[whole.table["task"] == task])

    def by_model(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """(model, all its rows): for what is judged by bytes and times, whatever the answers are worth."""
        for model, own in self.rows.groupby("model", sort=False):
            yield str(model), own

    def timed(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Of those the rows that have times: without a link there are none."""
        for model, own in self.by_model():
            yield model, own[own["e2e_s"].notna()]

    def of(self, model: str) -> pd.DataFrame:
        """A model's rows of admitted tasks."""
        tasks = set(self.tables[model]["task"])
        return self.rows[(self.rows["model"] == model) & self.rows["task"].isin(tasks)]


def collect(runs: list[Run]) -> tuple[Pool, list[str]]:
    """The pool of these runs, and a sentence for each model and task that is left out. Raises UsageError where one has no rows,
    and where two that read unlike things by one name have a task of a model in common: their rows are no one sample.
    """
    for pair in itertools.combinations(runs, 2):
        first, second = (set(zip(run.rows["model"], run.rows["task"], strict=True)) for run in pair)
        if (apart := read_apart(pair)) and first & second:
            names = " and ".join(str(run.path) for run in pair)
            raise UsageError(f"{names}: not the same in both: {apart}; judge runs that read the same ones")
    left_out = [
        f"{run.path.name}: requests under a load are judged by the claims on loads alone"
        for run in runs
        if run.alone is not run
    ]
    rows = pd.concat(_by_seed(runs), ignore_index=True)
    # What was replayed is another machine's: a model of its own, and never one sample with what was measured here.
    rows["model"] += settings.replayed(rows).map(lambda who: f" ({who})" if who else "")
    rows = settings.labelled(rows)
    table = comparisons.by_example(rows)
    admitted = []
    left_out += [
        f"{run.path.name}: {failures(run)}: left out, so that verdicts are on what was answered"
        for run in runs
        if len(run.failed)
    ]
    if apart := read_apart(runs):
        left_out.append(f"not the same in all of these runs: {apart} (those that differ share no task)")
    if len(named := hosts.names(rows)) > 1:
        left_out.append(f"made on {len(named)} hosts: settings are paired within each, and not across")
    for (model, task), own in table.groupby(["model", "task"], sort=False):
        full = stats.mean(own["reference_score"], own["example"], bounds=(0.0, 1.0))
        least = LEAST_REFERENCE_CHOICE if str(task).startswith(OF_FOUR) else LEAST_REFERENCE
        if full.low > least:
            admitted.append(own)
        else:
            left_out.append(
                f"{model} · {task} is left out: {settings.no_quality(own) or 'no full cache has a score'}"
                if full.n == 0
                else f"{model} · {task} is left out: the full cache scores {full.value:.2f} [{full.low:.2f}, "
                f"{full.high:.2f}] (n = {full.n}), not surely above {least}"
            )
    whole = pd.concat(admitted) if admitted else table.iloc[:0]
    tables = {str(m): own for m, own in whole.groupby("model", sort=False)}
    published = ((run.diagnosis.get("model"), run.diagnosis.get("published")) for run in runs)
    damage = {str(m): str(p["damage"]) for m, p in published if isinstance(p, dict) and "damage" in p}
    return Pool(rows, tables, damage, _loads(runs)), left_out


def _loads(runs: list[Run]) -> dict[str, list[Served]]:
    """Of each model, as `rows` name it."""
    found: dict[str, list[Served]] = {}
    for each in itertools.chain(*map(loads.served, runs)):
        row = each.rows.iloc[[0]]
        (who,) = settings.replayed(row)
        found.setdefault(row["model"].iloc[0] + (f" ({who})" if who else ""), []).append(each)
    return found


def _by_seed(runs: list[Run]) -> list[pd.DataFrame]:
    """The runs' rows, examples named with their seed where runs have several: one question among other distractors is
    another example.
    """
    seeds = [str(run.scenario.get("seed", 0)) for run in runs]
    several = len(set(seeds)) > 1
    rows = _with_lengths(runs)
    return [
        own.assign(example=own["example"] + f" (seed {seed})") if several else own
        for own, seed in zip(rows, seeds, strict=True)
    ]


def _with_lengths(runs: list[Run]) -> list[pd.DataFrame]:
    """The runs' rows, tasks of a run of one length named with it where another run, of several, has the task so."""
    rows = [run.require().alone.rows for run in runs]
    named = {task.rpartition("@")[0] for own in rows for task in map(str, own["task"]) if "@" in task}
    lengths = [run.scenario.get("context_tokens") for run in runs]
    ends = [f"@{length[0] if isinstance(length, list) else length or 'own'}" for length in lengths]
    return [
        own.assign(task=own["task"].where(~own["task"].isin(named), own["task"] + end))
        for own, end in zip(rows, ends, strict=True)
    ]
