"""The decision rules of the published claims: statistic, baseline, threshold and n, fixed before any run.

Every rule answers *holds*, *fails* or *undecided* for one model and one task (or all its tasks together). What is
decided on likelihoods has the task's score beside it. The margins:

* two settings are *alike* where the 95 % interval of their ΔNLL lies within ±0.02 nats per token;
* a direction counts where the interval lies beyond 0 and Wilcoxon's p, after Holm's correction over all comparisons of
  the claim (undecided ones too), is below 0.05;
* a setting is *lossless* where the mean ΔNLL is at most 0.02 by its upper end, and the share of examples that lose more
  than 0.2 nats a token at most a tenth by the upper end of its exact interval: of 50 none may, of 100 four;
* below 50 examples (the published n) nothing is decided; below 20 a link where the verdict is on times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from testbed import stats
from testbed.analysis import comparisons, settings
from testbed.analysis.comparisons import ALIKE, FULL, LOST, MOST_LOST, Comparison

LEAST = 50  #: examples
LEAST_TIMES = 20  #: examples of a verdict on times
CONTROLS = "other layers"  #: how the mean of the controls is named
LEVEL = 0.05
#: What the edge does before it sends: prefill, selection, quantization.
EDGE_COMPUTE = ("prefill_s", "select_s", "encode_s")
COMPUTE = (*EDGE_COMPUTE, "decode_s", "first_token_s", "generate_s")  #: and the cloud behind it
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


@dataclass(frozen=True)
class Verdict:
    """One claim on one model and task (empty: all admitted tasks). `figures`: the numbers behind it, for
    people; `p`: what Holm's correction is applied to (NaN: the rule is an interval's alone); `tested`: whether the
    verdict falls where the corrected p is not below the level.
    """

    claim: str
    model: str
    task: str
    what: str  #: what was compared
    verdict: str
    figures: str
    n: int
    p: float = float("nan")
    tested: bool = True
    values: dict[str, Any] = field(default_factory=dict)


def corrected(found: list[Verdict]) -> list[Verdict]:
    """The verdicts of one claim, those undecided whose p does not survive Holm's correction."""
    adjusted = stats.holm([v.p for v in found])
    return [
        replace(v, verdict=UNDECIDED, figures=f"{v.figures}; p {comparisons.p_text(float(p))} after Holm")
        if v.verdict != UNDECIDED and v.tested and p >= LEVEL
        else v
        for v, p in zip(found, adjusted, strict=True)
    ]


def _enough(verdict: str, n: int, least: int = LEAST) -> str:
    return verdict if n >= least else UNDECIDED


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
    verdict = replace(verdict, p=nll.p)
    if nll.high < 0:
        return replace(verdict, verdict=_enough(HOLDS, nll.n))
    if nll.low > 0:
        return replace(verdict, verdict=_enough(FAILS, nll.n))
    return _alike(verdict, nll)


def worse(claim: str, table: pd.DataFrame, model: str, task: str, setting: str, baseline: str) -> Verdict:
    """Holds where the setting's NLL is higher; fails where it is lower, or the two are alike."""
    found = better(claim, table, model, task, setting, baseline)
    if found.verdict == HOLDS:
        return replace(found, verdict=FAILS)
    if found.verdict == FAILS and found.values["nll_diff_lo"] > 0:
        return replace(found, verdict=HOLDS)
    return found


def _alike(verdict: Verdict, nll: stats.Difference) -> Verdict:
    """Alike fails, and that is the interval's verdict: no p speaks for equality, nor may Holm's take it away."""
    if nll.low >= -ALIKE and nll.high <= ALIKE:
        return replace(verdict, verdict=_enough(FAILS, nll.n), tested=False)
    return verdict


def lossless(claim: str, table: pd.DataFrame, model: str, task: str, setting: str) -> Verdict:
    """Holds where the NLL is not raised by more than the margin and few examples lose much; fails where either surely is not
    so.
    """
    found, verdict = _pair(claim, table, model, task, setting, FULL)
    losers = _losers(table, setting)
    share = f"{losers.value:.0%} [{losers.low:.0%}, {losers.high:.0%}] lose more than {LOST}"
    verdict = replace(verdict, figures=f"{verdict.figures}, {share}")
    if _is_lossless(found, losers):
        return replace(verdict, verdict=_enough(HOLDS, found.nll.n))
    if _surely_loses(found, losers):
        return replace(verdict, verdict=_enough(FAILS, found.nll.n))
    return verdict


def _losers(table: pd.DataFrame, setting: str) -> stats.Estimate:
    pairs = comparisons.pairs(table, setting)
    return stats.share_above(pairs["nll"] - pairs["nll_base"], LOST, settings.clusters(pairs))


def _is_lossless(found: Comparison, losers: stats.Estimate) -> bool:
    return found.nll.high <= ALIKE and losers.high <= MOST_LOST


def _surely_loses(found: Comparison, losers: stats.Estimate) -> bool:
    return found.nll.low > ALIKE or losers.low > MOST_LOST


def restored(
    claim: str, table: pd.DataFrame, model: str, task: str, plain: str, protected: str, controls: list[str]
) -> Verdict:
    """Whether protecting the diagnosed layer makes `plain` (int4) lossless, and better than protecting others.

    Undecided where `plain` loses no more than the margin already: there is nothing to restore. Holds where `protected`
    is lossless and its NLL lower than the controls', averaged example by example; fails where it surely is not lossless,
    or its NLL is higher than the controls' or alike.
    """
    others = table[table["setting"].isin(controls)]
    keys = ["model", "task", "example"]
    averaged = others.groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    table = pd.concat([table, averaged.assign(setting=CONTROLS)], ignore_index=True)
    against, verdict = _pair(claim, table, model, task, protected, CONTROLS)
    before = comparisons.compare(comparisons.pairs(table, plain), model, task, plain, FULL)
    after = comparisons.compare(comparisons.pairs(table, protected), model, task, protected, FULL)
    losers = _losers(table, protected)
    own = table[table["setting"] == protected]
    smaller = float((own["kv_bytes"] / own["payload_bytes"]).mean())
    figures = (
        f"{protected} against full cache: {describe(after)}, {smaller:.2f}× smaller with scales counted; "
        f"against {CONTROLS} ({len(controls)}): {describe(against)}; {plain} against full cache: {describe(before)}"
    )
    verdict = replace(verdict, figures=figures, p=against.nll.p)
    if _is_lossless(before, _losers(table, plain)):
        return replace(verdict, figures=f"nothing to restore: {figures}")
    if _surely_loses(after, losers):
        return replace(verdict, verdict=_enough(FAILS, verdict.n), tested=False)
    if against.nll.low > 0:
        return replace(verdict, verdict=_enough(FAILS, verdict.n))
    if _is_lossless(after, losers) and against.nll.high < 0 and before.nll.n:
        return replace(verdict, verdict=_enough(HOLDS, verdict.n))
    return _alike(verdict, against.nll)


def nothing_gained(
    claim: str, table: pd.DataFrame, model: str, task: str, plain: str, protected: str
) -> Verdict:
    """Whether protecting a layer leaves `plain` (int4) as it was: holds where the two are alike, fails where protection surely
    lowers or raises the NLL; undecided where `plain` is lossless already.
    """
    found, verdict = _pair(claim, table, model, task, protected, plain)
    before = comparisons.compare(comparisons.pairs(table, plain), model, task, plain, FULL)
    nll, figures = found.nll, f"{verdict.figures}; {plain} against full cache: {describe(before)}"
    verdict = replace(verdict, figures=figures, p=nll.p)
    if _is_lossless(before, _losers(table, plain)):
        return replace(verdict, figures=f"nothing to restore: {figures}")
    if nll.low >= -ALIKE and nll.high <= ALIKE:
        return replace(verdict, verdict=_enough(HOLDS, nll.n), tested=False)
    return replace(verdict, verdict=_enough(FAILS, nll.n)) if nll.high < 0 or nll.low > 0 else verdict


def differs_between_models(
    claim: str, tables: dict[str, pd.DataFrame], setting: str, models: tuple[str, str]
) -> Verdict | None:
    """The first model's ΔNLL under this setting less the second's, on the tasks that both have; each model's examples are
    resampled within their tasks, which count equally. Holds where the interval lies beyond the margin on either side;
    fails where it lies within; None where the models share no task.
    """
    found = [comparisons.pairs(tables[model], setting) for model in models]
    shared = set(found[0]["task"]) & set(found[1]["task"])
    found = [pairs[pairs["task"].isin(shared)] for pairs in found]
    if not shared:
        return None
    # The mean over all strata of twice a model's change, and of minus twice the other's, is the difference of the means.
    change = [2 * (pairs["nll"] - pairs["nll_base"]) for pairs in found]
    both = pd.concat(
        [pairs.assign(task=f"{model}: " + pairs["task"]) for model, pairs in zip(models, found, strict=True)]
    )
    estimate = stats.mean(np.concatenate([change[0], -change[1]]), settings.clusters(both), both["task"])
    own = [
        comparisons.compare(pairs, model, "", setting, FULL)
        for model, pairs in zip(models, found, strict=True)
    ]
    n = min(c.nll.n for c in own)
    beyond = estimate.low > ALIKE or estimate.high < -ALIKE
    within = estimate.low >= -ALIKE and estimate.high <= ALIKE
    verdict = _enough(HOLDS if beyond else FAILS if within else UNDECIDED, n)
    figures = f"difference of ΔNLL {comparisons.signed(estimate, 3)}; " + "; ".join(
        f"{model}: {describe(c)}, n = {c.nll.n}" for model, c in zip(models, own, strict=True)
    )
    return Verdict(claim, " / ".join(models), "", f"{setting} between models", verdict, figures, n)


def slope(claim: str, table: pd.DataFrame, model: str, setting: str, baseline: str) -> Verdict | None:
    """How the setting's advantage grows with the context: an example's least-squares slope of (the baseline's NLL − the
    setting's) on log2(context tokens), mean over the examples that have it at two lengths or more; None without any. With the
    full cache as the setting that is how the baseline's damage grows.

    `table`'s tasks are named with their length behind an @ (``passages@512``); without it a task has one length.
    """
    if setting == FULL:
        found = comparisons.pairs(table, baseline)
        gain = (found["nll"] - found["nll_base"]).to_numpy()
    else:
        found = comparisons.pairs(table, setting, baseline)
        gain = (found["nll_base"] - found["nll"]).to_numpy()
    length = np.log2(found["context_tokens"].to_numpy(dtype=np.float64))
    tasks = found["task"].str.rsplit("@", n=1).str[0]
    question = settings.clusters(found.assign(task=tasks)).to_numpy()
    slopes = []
    for one in pd.unique(question):
        own = (question == one) & np.isfinite(gain)
        # A context is filled up to a sentence, so two that were asked of one length may differ by some tokens.
        if own.sum() >= 2 and np.ptp(length[own]) > 0.5:
            slopes.append(float(np.polyfit(length[own], gain[own], 1)[0]))
    if not slopes:
        return None
    estimate = stats.mean(slopes)
    lengths = sorted({round(float(x)) for x in 2**length})
    span = f"{lengths[0]} to {lengths[-1]} tokens"
    figure = f"advantage in NLL grows by {{:.3f}} {{}} nats a token with each doubling, {span}"
    return threshold(claim, model, f"{setting} against {baseline}", estimate, 0.0, figure)


def threshold(
    claim: str,
    model: str,
    what: str,
    estimate: stats.Estimate,
    least: float,
    figure: str,
    *,
    below: bool = False,
    examples: int = LEAST,
) -> Verdict:
    """Holds where the interval lies at or above `least` (`below`: under it), fails where it lies on the other side;
    undecided below this many `examples`.
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
    return Verdict(claim, model, "", what, _enough(verdict, estimate.n, examples), text, estimate.n)


def saving(rows: pd.DataFrame, setting: str, baseline: str) -> stats.Estimate:
    """1 − payload / the baseline's payload, mean over examples."""
    table = comparisons.by_example(rows)
    found = comparisons.pairs(table, setting, baseline)
    share = 1 - found["payload_bytes"] / found["payload_bytes_base"]
    return stats.mean(share, settings.clusters(found))


def transmission_share(rows: pd.DataFrame, stages: tuple[str, ...] = EDGE_COMPUTE) -> stats.Estimate:
    """Transmission over some stages of a request together, geometric mean over examples."""
    return geometric(rows["transmit_s"] / rows[list(stages)].sum(axis=1), rows)


def geometric(values: pd.Series, rows: pd.DataFrame) -> stats.Estimate:
    """Geometric mean over examples with its interval."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values.to_numpy(dtype=np.float64))
    found = stats.mean(logs, settings.clusters(rows))
    return stats.Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)
