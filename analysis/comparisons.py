"""Each setting's answers against a baseline's, example by example: by how much, how surely, and what so many
examples could have shown.

Quality belongs to an example and a setting, not to a link (transport loses nothing), so an example's rows on
several links are one observation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from testbed import stats
from testbed.analysis import paired_latency, settings
from testbed.analysis.run import Run
from testbed.errors import UsageError

#: The baseline that every row carries: the same example with everything kept, on one machine.
FULL = "full cache"
#: A score from which on an answer counts as right in McNemar's test.
RIGHT_FROM = 0.5
#: Two settings are alike where the interval of their ΔNLL lies within this many nats a token of 0 ...
ALIKE = 0.02
#: ... and an example is lost where its own ΔNLL is above this, ten margins: the gold answer's tokens are a fifth less
#: likely, which rounding to 8 bits does to no example.
LOST = 0.2
#: So large may the share of lost examples be, by its interval's upper end, where nothing is said to be lost: a tenth of
#: the examples that lose 0.2 is a mean of 0.02. 50 examples can show it (none of them lost: at most 7.1 %), 100 where
#: four are (9.9 %). A mean alone lets rare losses pass.
MOST_LOST = 0.1

_KEYS = ["model", "task", "example"]
_QUALITIES = [
    "score",
    "nll",
    "kl",
    "reference_score",
    "reference_nll",
    "context_tokens",
    "kv_bytes",
    "payload_bytes",
]


@dataclass(frozen=True)
class Comparison:
    """`setting` − `baseline` over the examples that both have; `task` is empty where tasks are put together
    (each counts equally).

    `score`: difference of scores; `ratio`: score over the baseline's; `answers`: McNemar's test of right
    answers; `nll`: difference of the gold answer's NLL (nats/token, positive: worse); `lost`: the share of examples
    for which it is above `LOST`; `kl`: the setting's own mean KL from the full cache; `p_nll`, `p_score`: Wilcoxon's
    p after Holm's correction over the family of settings that were compared together.
    """

    model: str
    task: str
    setting: str
    baseline: str
    score: stats.Difference
    ratio: stats.Estimate
    answers: stats.McNemar
    nll: stats.Difference
    kl: stats.Estimate
    lost: stats.Estimate = stats.NOTHING
    p_nll: float = float("nan")
    p_score: float = float("nan")

    @property
    def lossless(self) -> bool:
        """Whether the examples show that nothing is lost against the baseline: the mean ΔNLL's interval ends
        at or below `ALIKE`, and that of the share of lost examples at or below `MOST_LOST`. Fewer than 36
        examples cannot.
        """
        return self.nll.high <= ALIKE and self.lost.high <= MOST_LOST


def by_example(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per model, task, example and setting: the mean of its rows' qualities, over links and repeats, and the host of
    the first.
    """
    labelled = rows if "setting" in rows else settings.labelled(rows)
    grouped = labelled.groupby([*_KEYS, "setting"], sort=False)
    return grouped.agg({**dict.fromkeys(_QUALITIES, "mean"), "host": "first"}).reset_index()


def pairs(table: pd.DataFrame, setting: str, baseline: str = FULL) -> pd.DataFrame:
    """The examples (of `by_example`) that both settings have, on one host, with the baseline's columns suffixed ``_base``."""
    own = table[table["setting"] == setting]
    if baseline == FULL:
        base = {"score_base": own["reference_score"], "nll_base": own["reference_nll"]}
        return own.assign(**base, kl_base=0.0)
    other = table[table["setting"] == baseline]
    both = own.merge(other, on=_KEYS, suffixes=("", "_base"))
    hosts = [both[column].fillna("") for column in ("host", "host_base")]
    return both[(hosts[0] == hosts[1]) | (hosts[0] == "") | (hosts[1] == "")]


def compare(both: pd.DataFrame, model: str, task: str, setting: str, baseline: str) -> Comparison:
    """The comparison of these pairs (from `pairs`); several tasks count equally."""
    examples = settings.clusters(both)
    score, base = both["score"], both["score_base"]
    right = [(side >= RIGHT_FROM).where(side.notna()).astype(float) for side in (score, base)]
    return Comparison(
        model=model,
        task=task,
        setting=setting,
        baseline=baseline,
        score=stats.difference(score, base, examples, both["task"], bounds=(0.0, 1.0)),
        ratio=stats.kept(score, base, examples, both["task"]),
        answers=stats.mcnemar(*right),
        nll=stats.difference(both["nll"], both["nll_base"], examples, both["task"]),
        kl=stats.mean(both["kl"], examples, both["task"]),
        lost=stats.share_above(both["nll"] - both["nll_base"], LOST, examples),
    )


def family(compared: Iterable[Comparison]) -> list[Comparison]:
    """These comparisons as one family: with Holm's correction over them."""
    members = list(compared)
    nll = stats.holm([m.nll.p for m in members])
    score = stats.holm([m.score.p for m in members])
    return [replace(m, p_nll=float(a), p_score=float(b)) for m, a, b in zip(members, nll, score, strict=True)]


def against(run: Run, baseline: str = FULL) -> list[Comparison]:
    """Every setting against the baseline, model by model: each task alone, then all tasks together.

    A family is what shares model and task. Raises UsageError for a baseline that the run does not have.
    """
    run.require()
    table = by_example(run.rows)
    known = list(table["setting"].unique())
    if baseline != FULL and baseline not in known:
        raise UsageError(f"{run.path} has no setting {baseline!r}; choose from {FULL}, {', '.join(known)}")
    compared: list[Comparison] = []
    for model, own in table.groupby("model", sort=False):
        tasks = list(own["task"].unique())
        for task in [*tasks, ""] if len(tasks) > 1 else tasks:
            part = own[own["task"] == task] if task else own
            labels = [s for s in known if s != baseline and s in set(part["setting"])]
            members = (compare(pairs(part, s, baseline), str(model), task, s, baseline) for s in labels)
            compared += family(m for m in members if m.score.n or m.nll.n)
    return compared


def frame(compared: list[Comparison]) -> pd.DataFrame:
    """The comparisons as a table, one line each; `_lo` and `_hi` bound 95 % intervals."""
    return pd.DataFrame([line(comparison) for comparison in compared])


def line(compared: Comparison) -> dict[str, Any]:
    """The comparison as one line of a table."""
    columns: dict[str, Any] = {
        "model": compared.model,
        "link": "all",
        "task": compared.task or "all",
        "setting": compared.setting,
        "baseline": compared.baseline,
        "n": max(compared.score.n, compared.nll.n),
    }
    columns |= _interval("score_diff", compared.score)
    columns |= {
        "score_p": compared.score.p,
        "score_p_holm": compared.p_score,
        "score_detectable": compared.score.detectable,
    }
    columns |= _interval("score_ratio", compared.ratio)
    columns |= {
        "gained": compared.answers.gained,
        "lost": compared.answers.lost,
        "mcnemar_p": compared.answers.p,
    }
    columns |= _interval("nll_diff", compared.nll)
    columns |= {
        "nll_p": compared.nll.p,
        "nll_p_holm": compared.p_nll,
        "nll_detectable": compared.nll.detectable,
    }
    columns |= _interval("lost_share", compared.lost) | {"lossless": compared.lossless}
    return columns | _interval("kl", compared.kl)


def _interval(name: str, estimate: stats.Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_lo": estimate.low, f"{name}_hi": estimate.high}


def write(run: Run, baseline: str = FULL) -> Path:
    """Write ``comparisons.csv``: every setting's answers against the baseline's, over all links; and on every link its
    latency against that of the latency's baseline (`paired_latency.baseline_of`). Raises as `against` does.
    """
    timed = [] if run.untimed else [latency_frame(run)]
    lines = pd.concat([frame(against(run, baseline)), *timed], ignore_index=True)
    lines = lines.replace([np.inf, -np.inf], np.nan)
    return run.write("comparisons.csv", lambda to: lines.to_csv(to, index=False, float_format="%.6g"))


def latency_frame(run: Run) -> pd.DataFrame:
    """A line for each link, task and setting: the median of the paired latency ratios, its interval and tests, and that of the
    differences to the first token.
    """
    lines = []
    for panel, rows in settings.panels(run.attempts):
        baseline = paired_latency.baseline_of(rows)
        tasks = [str(t) for t in rows["task"].unique()]
        for task in [*tasks, "all"] if len(tasks) > 1 else tasks:
            own = rows if task == "all" else rows[rows["task"] == task]
            later = paired_latency.first_token_differences(own, baseline)
            for compared in paired_latency.ratios(own, baseline):
                line: dict[str, Any] = {"model": str(rows["model"].iloc[0]), "link": panel, "task": task}
                line |= {
                    "setting": compared.setting,
                    "baseline": baseline,
                    "n": compared.ratio.n,
                    "latency": run.latency,
                }
                line |= _interval("latency_ratio", compared.ratio)
                line |= _interval("ttft_diff_s", later.get(compared.setting, stats.NOTHING))
                lines.append(line | {"latency_p": compared.p, "latency_p_holm": compared.p_holm})
    return pd.DataFrame(lines)


def latency_text(run: Run) -> str:
    """The latencies' comparisons for people: a block a link; empty without times."""
    if run.untimed:
        return ""
    blocks = []
    for panel, rows in settings.panels(run.attempts):
        baseline = paired_latency.baseline_of(rows)
        ratios = paired_latency.ratios(rows, baseline)
        wide = max([len(each.setting) for each in ratios] + [7])
        lines = [
            f"  {each.setting:<{wide}}  {each.ratio.n:>4}  {paired_latency.text(each):>24}  {p_text(each.p_holm):>6}"
            for each in ratios
        ]
        head = f"{panel} · {run.latency} over that of {baseline}"
        blocks.append("\n".join([head, f"  {'setting':<{wide}}  {'n':>4}  {'ratio':>24}  {'p':>6}", *lines]))
    note = (
        "ratio: median of the examples' ratios with its 95 % interval from order statistics; ≈: not told apart; "
        "p: Wilcoxon signed-rank after Holm's correction over a link's settings"
    )
    return "\n\n".join([*blocks, note])


def text(compared: list[Comparison]) -> str:
    """The comparisons for the terminal: one block a model and task."""
    blocks = []
    keys = list(dict.fromkeys((f.model, f.task) for f in compared))
    for model, task in keys:
        own = [f for f in compared if (f.model, f.task) == (model, task)]
        wide = max(len(f.setting) for f in own)
        head = f"{model} · {task or 'all tasks'} · against {own[0].baseline}"
        columns = (
            f"  {'setting':<{wide}}  {'n':>4}  {'Δscore':>22}  {'p':>6}  {'ΔNLL':>24}  {'p':>6}  {'detectable':>10}  "
            f"{'lost':>18}"
        )
        lines = [
            f"  {f.setting:<{wide}}  {max(f.score.n, f.nll.n):>4}  {f.score.text(2, '+'):>22}  "
            f"{p_text(f.p_score):>6}  {f.nll.text(3, '+'):>24}  {p_text(f.p_nll):>6}  "
            f"{number(f.nll.detectable, 3):>10}  {share(f.lost):>18}{'  lossless' if f.lossless else ''}"
            for f in own
        ]
        blocks.append("\n".join([head, columns, *lines]))
    note = (
        "brackets: 95 % intervals over examples; p: Wilcoxon signed-rank after Holm's correction; "
        f"detectable: the ΔNLL that so many examples show with a probability of 80 %; lost: the share of examples whose ΔNLL is "
        f"above {LOST:g}; lossless: ΔNLL's interval ends at or below {ALIKE:g}, that share's at or below {MOST_LOST:.0%}"
    )
    return "\n\n".join([*blocks, note])


def number(value: float, digits: int) -> str:
    """A number, or a dash where there is none."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def share(estimate: stats.Estimate) -> str:
    """A share of examples with its interval."""
    return f"{estimate.value:.0%} [{estimate.low:.1%}, {estimate.high:.1%}]" if estimate.n else "-"


def p_text(p: float) -> str:
    """A p-value for people."""
    return "-" if not np.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}"
