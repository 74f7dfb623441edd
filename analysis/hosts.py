"""The machines on which a run's trials were made, side by side: what each computed, and by how much it was slower.

Shards are dealt out by example: all settings of an example meet one host, and what is paired by example stays within it. Medians
over examples mix hosts; so how unlike they are is said here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from testbed.analysis import layout, settings
from testbed.analysis.run import Run

#: Hosts that compute the same piece in times further apart than this are told apart in a sentence: what one host is allowed to
#: drift by within a run (`testbed.experiment.compute.WARNED`).
UNLIKE = 1.25


@dataclass(frozen=True)
class HostFigures:
    """One host's share of a run. shards: empty where it was not made in any; examples: of all tasks; edge_s, cloud_s: medians
    of a fixed prefill (s), NaN where none was measured; latency: the median, over the cells (link, setting, task) that it shares
    with others, of its median latency over that of all hosts; cells: how many; uncalibrated: trials on links out of tolerance.
    """

    host: str
    cpu: str
    shards: str
    trials: int
    examples: int
    edge_s: float
    cloud_s: float
    latency: float
    cells: int
    uncalibrated: int


def names(rows: pd.DataFrame) -> list[str]:
    """The hosts that rows name, in the order in which they come."""
    return [str(host) for host in rows["host"].unique() if host]


def figures(run: Run) -> list[HostFigures]:
    """Each host's."""
    rows = settings.labelled(run.rows)
    keys = ["panel", "setting", "task"]
    shared = rows.groupby(keys)["host"].transform("nunique") > 1
    all_of = rows[shared].groupby(keys)["latency_s"].median()
    found = []
    for host in names(rows):
        own = rows[rows["host"] == host]
        ratios = (own[shared[own.index]].groupby(keys)["latency_s"].median() / all_of).dropna()
        starts = [start for start in run.compute if start.host == host]
        measurements = [measurement for start in starts for measurement in start.measurements]
        found.append(
            HostFigures(
                host,
                str(own["cpu"].iloc[0]),
                ", ".join(_shards(run, host)),
                len(own),
                int(settings.clusters(own).nunique()),
                median([m.edge.median_s for m in measurements] or [math.nan]),
                median([m.cloud.median_s for m in measurements] or [math.nan]),
                float(ratios.median()) if len(ratios) else math.nan,
                len(ratios),
                int((~own["calibrated"]).sum()),
            )
        )
    return found


def _shards(run: Run, host: str) -> list[str]:
    machines = run.manifest.get("machines")
    about: Any = machines.get(host) if isinstance(machines, dict) else None
    shards = about.get("shards") if isinstance(about, dict) else None
    return [str(shard) for shard in shards] if isinstance(shards, list) else []


def text(run: Run, width: int | None = None) -> str:
    """The table for people, in lines of `width` characters at most; empty where all rows are of one host."""
    if len(names(run.rows)) < 2:
        return ""
    rows = []
    for each in figures(run):
        fixed = [f"{1e3 * s:.1f} ms" if math.isfinite(s) else "-" for s in (each.edge_s, each.cloud_s)]
        ratio = f"×{each.latency:.2f}" if math.isfinite(each.latency) else "-"
        off = f"links out of tolerance in {each.uncalibrated:,} trials" if each.uncalibrated else ""
        about = " · ".join(filter(None, [each.shards, each.cpu, off]))
        rows.append(
            [each.host, f"{each.trials:,}", f"{each.examples:,}", *fixed, ratio, f"{each.cells:,}", about]
        )
    header = ["host", "trials", "examples", "edge", "cloud", "latency", "cells", "shards · processor"]
    note = (
        "edge, cloud: a prefill of fixed length, median; latency: the host's median over that of all hosts, of the cells (link, "
        "setting, task) that several have, their median"
    )
    return layout.table(rows, header, width, texts=(0, 7)) + "\n" + layout.sentences(note, width)


def caveats(run: Run) -> list[str]:
    """What a reader must know of rows of several hosts, a sentence each."""
    rows = run.rows
    if len(named := names(rows)) < 2:
        return []
    of = rows[rows["host"] != ""].groupby(settings.clusters(rows))["host"].nunique()
    split = int((of > 1).sum())
    sentences = [
        f"Trials were made on {len(named)} hosts: what is paired by example stays within one; medians are over all of them."
    ]
    if split:
        sentences.append(
            f"{split:,} of {len(of):,} examples met several hosts: of these, pairs are of the one that made most trials."
        )
    for side in ("edge", "cloud"):
        times = [(getattr(each, f"{side}_s"), each.host) for each in figures(run)]
        known = sorted((seconds, host) for seconds, host in times if math.isfinite(seconds))
        if known and known[-1][0] > UNLIKE * known[0][0]:
            (fast, first), (slow, last) = known[0], known[-1]
            sentences.append(
                f"Hosts are unlike: the {side} computes {slow / fast:.2f} times as long on {last} as on {first}."
            )
    return sentences
