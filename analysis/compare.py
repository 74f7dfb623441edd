"""Two runs side by side: the same settings on the same links, paired where the examples match."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from testbed import stats
from testbed.analysis import comparisons, layout, paired_latency, settings
from testbed.analysis.describe import plain
from testbed.analysis.run import Run, read_apart
from testbed.errors import UsageError

_KEYS = ["task", "example"]
#: What stands in the place of a link where answers alone are compared, which are the same on all.
ANSWERS = "answers alone"


@dataclass(frozen=True)
class Line:
    """One setting on one profile in both runs. `ratio`: the second run's latency over the first's, median
    over the examples that both have (a failed trial is infinite); `quality`: mean scores on those that both answered, or
    without any on each run's own; `score`, `nll`: second − first; `p`: Wilcoxon's for the latency after Holm's correction over
    all lines; without matching examples these are empty (n = 0). `failed`: of how many `trials`. Where one of the runs has no
    times (placement-free), the panel is `ANSWERS`, and latencies are empty.
    """

    panel: str
    setting: str
    latency: tuple[stats.Estimate, stats.Estimate]
    quality: tuple[stats.Estimate, stats.Estimate]
    ratio: stats.Estimate
    score: stats.Difference
    nll: stats.Difference
    p: float
    failed: tuple[int, int] = (0, 0)
    trials: tuple[int, int] = (0, 0)


def compare(first: Run, second: Run, across_hosts: bool = False) -> list[Line]:
    """Every setting and profile that both runs have, in the first one's order.

    Raises UsageError where they share none, and where examples met other hosts in the one than in the other, unless
    `across_hosts`: then what differs may be the hosts' own.
    """
    column = "ttft_s" if any("first token" in run.latency for run in (first, second)) else "e2e_s"
    tables = [_timed(settings.labelled(run.require().attempts), column) for run in (first, second)]
    models = [set(t["model"]) for t in tables]
    if models[0] != models[1] and all(len(m) == 1 for m in models):
        # A model each: the runs are compared across models, so the panel must not name it.
        tables = [t.assign(panel=t["profile"]) for t in tables]
    timeless = bool(first.untimed or second.untimed)
    if timeless:
        tables = [t.assign(panel=ANSWERS) for t in tables]
    groups = [dict(iter(t.groupby(["panel", "setting"], sort=False))) for t in tables]
    shared = [key for key in groups[0] if key in groups[1]]
    if not shared:
        raise UsageError(f"{first.path} and {second.path} have no setting on the same link in common")
    if not across_hosts:
        _check_hosts(first, second)
    lines = []
    for key in shared:
        own = [g[key] for g in groups]
        pair = _pair(own[0], own[1], across_hosts)
        ratio, p = stats.NOTHING, math.nan
        if not timeless:
            ratio, p = paired_latency.compared(pair["latency_s_b"].to_numpy(), pair["latency_s_a"].to_numpy())
        clusters = settings.clusters(pair)
        lines.append(
            Line(
                panel=str(key[0]),
                setting=str(key[1]),
                latency=_both(
                    stats.NOTHING if timeless else stats.median(o["latency_s"], settings.clusters(o))
                    for o in own
                ),
                quality=_qualities(pair, own),
                failed=_both(int(o["failed"].sum()) for o in own),
                trials=_both(len(o) for o in own),
                ratio=ratio,
                score=stats.difference(
                    pair["score_b"], pair["score_a"], clusters, pair["task"], bounds=(0.0, 1.0)
                ),
                nll=stats.difference(pair["nll_b"], pair["nll_a"], clusters, pair["task"]),
                p=p,
            )
        )
    adjusted = stats.holm([line.p for line in lines])
    return [replace(line, p=float(p)) for line, p in zip(lines, adjusted, strict=True)]


def _check_hosts(first: Run, second: Run) -> None:
    """Raises UsageError where the runs' examples, or the runs that share none, met unlike hosts; of older rows nobody knows."""
    hosts = [_hosts(run.attempts) for run in (first, second)]
    both = hosts[0].keys() & hosts[1].keys()
    unlike = [key for key in both if hosts[0][key] != hosts[1][key]]
    every = [sorted(set().union(*of.values())) for of in hosts]
    if unlike or (not both and all(every) and every[0] != every[1]):
        where = [" and ".join(names[:3]) + (" and others" if len(names) > 3 else "") for names in every]
        some = f", {len(unlike):,} of {len(both):,} examples in both on another host" if both else ""
        raise UsageError(
            f"{first.path} was made on {where[0]}, {second.path} on {where[1]}{some}: what differs may be the hosts' own; "
            "compare them all the same with --across-hosts"
        )


def _hosts(rows: pd.DataFrame) -> dict[tuple[str, str], set[str]]:
    """The hosts, with their processors, that each example met; examples of which all are unknown are left out."""
    known = rows[rows["host"] != ""]
    named = known.assign(_of=known["host"] + known["cpu"].map(lambda cpu: f" ({cpu})" if cpu else ""))
    return {
        (str(task), str(example)): set(map(str, own)) for (task, example), own in named.groupby(_KEYS)["_of"]
    }


def _timed(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows with one kind of latency in both runs; infinite where a trial failed."""
    return rows.assign(latency_s=rows[column].mask(rows["failed"].astype(bool), math.inf))


def _qualities(pair: pd.DataFrame, own: list[pd.DataFrame]) -> tuple[stats.Estimate, stats.Estimate]:
    """Mean scores over the examples that both runs answered, lest failures make one of them better."""
    both = pair.dropna(subset=["score_a", "score_b"])
    sides = [both["score_a"], both["score_b"]] if len(both) else [o["score"] for o in own]
    rows = [both, both] if len(both) else own
    return _both(
        stats.mean(side, settings.clusters(r), r["task"], bounds=(0, 1))
        for side, r in zip(sides, rows, strict=True)
    )


def _both(estimates: Iterable[Any]) -> tuple[Any, Any]:
    a, b = estimates
    return a, b


def _pair(a: pd.DataFrame, b: pd.DataFrame, across_hosts: bool) -> pd.DataFrame:
    """The examples that both have, on one host unless `across_hosts`, repeats averaged; of latencies the median."""
    how = {"latency_s": "median", "score": "mean", "nll": "mean", "host": "first"}
    means = [t.groupby(_KEYS).agg(how).reset_index() for t in (a, b)]
    both = means[0].merge(means[1], on=_KEYS, suffixes=("_a", "_b"))
    unknown = (both["host_a"] == "") | (both["host_b"] == "")
    return both if across_hosts else both[(both["host_a"] == both["host_b"]) | unknown]


def differences(first: Run, second: Run) -> list[str]:
    """What the two runs were told differently, a line each; whose settings are unknown is said instead. In the end what they read
    by one name though it was not one thing.
    """
    old, new = first.scenario, second.scenario
    lines = [f"{name}: settings unknown" for name, known in (("A", old), ("B", new)) if not known] or [
        f"{key}: {old.get(key)} → {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in ("name", "description")
    ]
    for key in ("emulator", "threads", "host", "cpu"):
        if not all(key in run.rows and run.rows[key].notna().any() for run in (first, second)):
            continue
        values = [", ".join(sorted(map(_shown, set(run.rows[key].dropna())))) for run in (first, second)]
        if values[0] != values[1]:
            lines.append(f"{key}: {values[0]} → {values[1]}")
    if apart := read_apart([first, second]):
        lines.append(f"not the same in both, though named alike: {apart}")
    return list(dict.fromkeys(lines))  # what was asked for and what was, often the same


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def text(first: Run, second: Run, lines: list[Line], width: int | None = None) -> str:
    """The comparison for the terminal, in lines of `width` characters at most."""
    timed = lines[0].panel != ANSWERS
    note = "no latencies: a run without a link has none; brackets: 95 % intervals; n: examples in both"
    if timed:
        note = (
            "latency: medians, and the median of the examples' ratios (to the first token where answers differ in length); "
            "brackets: 95 % intervals; "
            "p: Wilcoxon signed-rank of the latencies after Holm's correction; n: examples in both"
        )
    about = [f"A {first.path}", f"B {second.path}"]
    about += [layout.sentences(f"  {d}", width, "  ") for d in differences(first, second)]
    out = ["\n".join(about), layout.sentences(note, width)]
    times = ["A", "B", "B/A latency", "p"] if timed else []
    header = ["setting", "n", *times, "A", "B", "B−A score", "B−A NLL", ""]
    for panel in dict.fromkeys(line.panel for line in lines):
        rows = [
            [
                line.setting,
                str(line.ratio.n if timed else line.nll.n),
                *(_latencies(line) if timed else []),
                *map(_score, line.quality),
                line.score.text(2, "+"),
                line.nll.text(3, "+"),
                _failures(line).strip(),
            ]
            for line in lines
            if line.panel == panel
        ]
        out.append(panel + "\n" + layout.table(rows, header, width, texts=(0, len(header) - 1), indent=2))
    return "\n\n".join(out)


def _latencies(line: Line) -> list[str]:
    """Both runs' latency, their ratio and its p."""
    ratio = line.ratio.text() if line.ratio.n else "unpaired"
    return [*(f"{side.value:.3f} s" for side in line.latency), ratio, comparisons.p_text(line.p)]


def _score(quality: stats.Estimate) -> str:
    return f"{quality.value:.2f}" if math.isfinite(quality.value) else "-"


def _failures(line: Line) -> str:
    """What failed, for a line's end."""
    counts = zip("AB", line.failed, line.trials, strict=True)
    return "".join(f"  {name} failed {failed} of {tried}" for name, failed, tried in counts if failed)


def to_dict(first: Run, second: Run, lines: list[Line]) -> dict[str, Any]:
    """Plain values for JSON; what is unknown is None."""
    known = {"a": str(first.path), "b": str(second.path), "differences": differences(first, second)}
    return plain(known | {"settings": [asdict(line) for line in lines]})
