"""The decision rules of the published claims: statistic, baseline, threshold and n, fixed before any run.

Every rule answers *holds*, *fails* or *undecided* for one model and one task (or all its tasks together). What is
decided on likelihoods has the task's score beside it. The margins:

* two settings are *alike* where the 95 % interval of their ΔNLL lies within ±0.02 nats per token;
* a direction counts where the interval lies beyond 0 and Wilcoxon's p, after Holm's correction over the claim's
  models and tasks, is below 0.05;
* below 50 examples (the published n) nothing is decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis import comparisons, settings, stats
from analysis.comparisons import FULL, Comparison

ALIKE = 0.02  #: nats per token
LEAST = 50  #: examples
LEVEL = 0.05
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


@dataclass(frozen=True)
class Verdict:
    """One claim on one model and task (empty: all admitted tasks). `figures`: the numbers behind it, for
    people; `p`: what Holm's correction is applied to (NaN: the rule is an interval's alone).
    """

    claim: str
    model: str
    task: str
    what: str  #: what was compared
    verdict: str
    figures: str
    n: int
    p: float = float("nan")
    values: dict[str, Any] = field(default_factory=dict)


def corrected(found: list[Verdict]) -> list[Verdict]:
    """The verdicts of one claim, those undecided whose p does not survive Holm's correction."""
    adjusted = stats.holm([v.p for v in found])
    return [
        replace(v, verdict=UNDECIDED, figures=f"{v.figures}; p {comparisons.p_text(float(p))} after Holm")
        if v.verdict != UNDECIDED and p >= LEVEL
        else v
        for v, p in zip(found, adjusted, strict=True)
    ]


def _enough(verdict: str, n: int) -> str:
    return verdict if n >= LEAST else UNDECIDED


def describe(one: Comparison) -> str:
    """ΔNLL first, the score beside it, and what so many examples could have shown."""
    parts = [f"ΔNLL {comparisons.signed(one.nll.estimate, 3)}"]
    if math.isfinite(one.nll.detectable):
        parts.append(f"detectable {one.nll.detectable:.3f}")
    if math.isfinite(one.kl.value):
        parts.append(f"KL {one.kl.value:.3f}")
    parts.append(f"Δscore {comparisons.signed(one.score.estimate, 3)}")
    if math.isfinite(one.ratio.value):
        parts.append(f"score ratio {one.ratio.value:.2f} [{one.ratio.low:.2f}, {one.ratio.high:.2f}]")
    return ", ".join(parts)


def _pair(
    claim: str, table: pd.DataFrame, model: str, task: str, setting: str, baseline: str
) -> tuple[Comparison, Verdict]:
    found = comparisons.compare(comparisons.pairs(table, setting, baseline), model, task, setting, baseline)
    what = f"{setting} against {baseline}"
    return found, Verdict(
        claim, model, task, what, UNDECIDED, describe(found), found.nll.n, values=comparisons.line(found)
    )


def better(claim: str, table: pd.DataFrame, model: str, task: str, setting: str, baseline: str) -> Verdict:
    """Holds where the setting's NLL is lower; fails where it is higher, or the two are alike."""
    found, verdict = _pair(claim, table, model, task, setting, baseline)
    nll = found.nll
    if nll.high < 0:
        return replace(verdict, verdict=_enough(HOLDS, nll.n), p=nll.p)
    if nll.low > 0:
        return replace(verdict, verdict=_enough(FAILS, nll.n), p=nll.p)
    if nll.low >= -ALIKE and nll.high <= ALIKE:
        return replace(verdict, verdict=_enough(FAILS, nll.n))
    return verdict


def worse(claim: str, table: pd.DataFrame, model: str, task: str, setting: str, baseline: str) -> Verdict:
    """Holds where the setting's NLL is higher; fails where it is lower, or the two are alike."""
    found = better(claim, table, model, task, setting, baseline)
    if found.verdict == HOLDS:
        return replace(found, verdict=FAILS)
    if found.verdict == FAILS and found.values["nll_diff_lo"] > 0:
        return replace(found, verdict=HOLDS)
    return found


def lossless(claim: str, table: pd.DataFrame, model: str, task: str, setting: str) -> Verdict:
    """Holds where the NLL is not raised by more than the margin; fails where it surely is."""
    found, verdict = _pair(claim, table, model, task, setting, FULL)
    if found.nll.high <= ALIKE:
        return replace(verdict, verdict=_enough(HOLDS, found.nll.n))
    if found.nll.low > ALIKE:
        return replace(verdict, verdict=_enough(FAILS, found.nll.n), p=found.nll.p)
    return verdict


def differs_between_models(
    claim: str, tables: dict[str, pd.DataFrame], setting: str, task: str = ""
) -> Verdict | None:
    """Holds where two models' ΔNLL intervals under this setting are apart by more than the margin; fails where
    all intervals lie within the margin of each other; None for fewer than two models.
    """
    found = {
        model: comparisons.compare(comparisons.pairs(t, setting), model, task, setting, FULL)
        for model, t in tables.items()
        if setting in set(t["setting"])
    }
    if len(found) < 2:
        return None
    low = max(found.values(), key=lambda c: c.nll.low).nll.low
    high = min(found.values(), key=lambda c: c.nll.high).nll.high
    ends = [c.nll.low for c in found.values()] + [c.nll.high for c in found.values()]
    n = min(c.nll.n for c in found.values())
    verdict = HOLDS if low - high > ALIKE else FAILS if max(ends) - min(ends) <= ALIKE else UNDECIDED
    figures = "; ".join(f"{m}: {describe(c)}" for m, c in found.items())
    return Verdict(
        claim, " / ".join(found), task, f"{setting} between models", _enough(verdict, n), figures, n
    )


def threshold(
    claim: str,
    model: str,
    what: str,
    estimate: stats.Estimate,
    least: float,
    figure: str,
    *,
    below: bool = False,
) -> Verdict:
    """Holds where the interval lies at or above `least` (`below`: at or under), fails where it lies on the
    other side.
    """
    over, under = estimate.low >= least, estimate.high < least
    verdict = UNDECIDED
    if math.isfinite(estimate.low):
        verdict = (
            (FAILS if over else HOLDS if under else UNDECIDED)
            if below
            else (HOLDS if over else FAILS if under else UNDECIDED)
        )
    text = figure.format(estimate.value, f"[{estimate.low:.3g}, {estimate.high:.3g}]")
    return Verdict(claim, model, "", what, _enough(verdict, estimate.n), text, estimate.n)


def saving(rows: pd.DataFrame, setting: str, baseline: str) -> stats.Estimate:
    """1 − payload / the baseline's payload, mean over examples."""
    table = comparisons.by_example(rows)
    found = comparisons.pairs(table, setting, baseline)
    share = 1 - found["payload_bytes"] / found["payload_bytes_base"]
    return stats.mean(share, found["task"] + "\0" + found["example"])


def transmission_share(rows: pd.DataFrame) -> stats.Estimate:
    """Transmission over all compute stages of a request, geometric mean over examples."""
    compute = rows[["prefill_s", "select_s", "encode_s", "decode_s", "first_token_s", "generate_s"]].sum(
        axis=1
    )
    return geometric(rows["transmit_s"] / compute, rows)


def geometric(values: pd.Series, rows: pd.DataFrame) -> stats.Estimate:
    """Geometric mean over examples with its interval."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values.to_numpy(dtype=np.float64))
    found = stats.mean(logs, settings.clusters(rows))
    return stats.Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)
