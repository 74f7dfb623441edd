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
from testbed.analysis.claims.pool import Sample
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
    """A claim on one model and task (empty: all admitted tasks). `figures`: the numbers behind it, for
    people; `p`: what Holm's correction is applied to (NaN: the rule is an interval's alone); `tested`: whether the
    verdict falls where the corrected p is not below the level.
    """

    model: str
    task: str
    what: str  #: what was compared
    verdict: str
    figures: str
    n: int
    p: float = float("nan")
    tested: bool = True
    values: dict[str, Any] = field(default_factory=dict)

    def decided(self, verdict: str, **more: Any) -> Verdict:
        """This verdict, where there are examples enough for any."""
        return replace(self, verdict=_enough(verdict, self.n), **more)


def corrected(verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts of one claim, those undecided whose p does not survive Holm's correction."""
    adjusted = stats.holm([v.p for v in verdicts])
    return [
        replace(v, verdict=UNDECIDED, figures=f"{v.figures}; p {comparisons.p_text(float(p))} after Holm")
        if v.verdict != UNDECIDED and v.tested and p >= LEVEL
        else v
        for v, p in zip(verdicts, adjusted, strict=True)
    ]


def _enough(verdict: str, n: int, least: int = LEAST) -> str:
    return verdict if n >= least else UNDECIDED


def describe(compared: Comparison) -> str:
    """ΔNLL first, the score beside it, and what so many examples could have shown."""
    parts = [f"ΔNLL {compared.nll.text(3, '+')}"]
    if math.isfinite(compared.nll.detectable):
        parts.append(f"detectable {compared.nll.detectable:.3f}")
    if math.isfinite(compared.kl.value):
        parts.append(f"KL {compared.kl.value:.3f}")
    parts.append(f"Δscore {compared.score.text(3, '+')}")
    if math.isfinite(compared.ratio.value):
        parts.append(
            f"score ratio {compared.ratio.value:.2f} [{compared.ratio.low:.2f}, {compared.ratio.high:.2f}]"
        )
    return ", ".join(parts)


def _compared(sample: Sample, setting: str, baseline: str = FULL) -> Comparison:
    pairs = comparisons.pairs(sample.table, setting, baseline)
    return comparisons.compare(pairs, sample.model, sample.task, setting, baseline)


def _open(sample: Sample, compared: Comparison, **more: Any) -> Verdict:
    """What is not decided yet of a comparison."""
    what = f"{compared.setting} against {compared.baseline}"
    figures, values = describe(compared), comparisons.line(compared)
    return Verdict(sample.model, sample.task, what, UNDECIDED, figures, compared.nll.n, values=values, **more)


def better(sample: Sample, setting: str, baseline: str) -> Verdict:
    """Holds where the setting's NLL is lower; fails where it is higher, or the two are alike."""
    compared = _compared(sample, setting, baseline)
    verdict, nll = _open(sample, compared, p=compared.nll.p), compared.nll
    if nll.high < 0:
        return verdict.decided(HOLDS)
    return verdict.decided(FAILS) if nll.low > 0 else _alike(verdict, nll)


def worse(sample: Sample, setting: str, baseline: str) -> Verdict:
    """Holds where the setting's NLL is higher; fails where it is lower, or the two are alike."""
    verdict = better(sample, setting, baseline)
    if verdict.verdict == HOLDS:
        return replace(verdict, verdict=FAILS)
    if verdict.verdict == FAILS and verdict.values["nll_diff_lo"] > 0:
        return replace(verdict, verdict=HOLDS)
    return verdict


def _alike(verdict: Verdict, nll: stats.Difference, then: str = FAILS) -> Verdict:
    """Alike is the interval's verdict: no p speaks for equality, nor may Holm's take it away."""
    return verdict.decided(then, tested=False) if _within(nll) else verdict


def _within(estimate: stats.Difference | stats.Estimate) -> bool:
    return estimate.low >= -ALIKE and estimate.high <= ALIKE


def lossless(sample: Sample, setting: str) -> Verdict:
    """Holds where the NLL is not raised by more than the margin and few examples lose much; fails where either surely is not
    so.
    """
    compared = _compared(sample, setting)
    verdict, lost = _open(sample, compared), compared.lost
    share = f"{lost.value:.0%} [{lost.low:.0%}, {lost.high:.0%}] lose more than {LOST}"
    verdict = replace(verdict, figures=f"{verdict.figures}, {share}")
    if compared.lossless:
        return verdict.decided(HOLDS)
    return verdict.decided(FAILS) if _surely_loses(compared) else verdict


def _surely_loses(compared: Comparison) -> bool:
    return compared.nll.low > ALIKE or compared.lost.low > MOST_LOST


def restored(sample: Sample, plain: str, protected: str, controls: list[str]) -> Verdict:
    """Whether protecting the diagnosed layer makes `plain` (int4) lossless, and better than protecting others.

    Undecided where `plain` loses no more than the margin already: there is nothing to restore. Holds where `protected`
    is lossless and its NLL lower than the controls', averaged example by example; fails where it surely is not lossless,
    or its NLL is higher than the controls' or alike.
    """
    others = sample.table[sample.table["setting"].isin(controls)]
    keys = ["model", "task", "example"]
    averaged = others.groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    table = pd.concat([sample.table, averaged.assign(setting=CONTROLS)], ignore_index=True)
    against = _compared(replace(sample, table=table), protected, CONTROLS)
    before, after = _compared(sample, plain), _compared(sample, protected)
    own = table[table["setting"] == protected]
    smaller = float((own["kv_bytes"] / own["payload_bytes"]).mean())
    figures = (
        f"{protected} against full cache: {describe(after)}, {smaller:.2f}× smaller with scales counted; "
        f"against {CONTROLS} ({len(controls)}): {describe(against)}; {plain} against full cache: {describe(before)}"
    )
    verdict = replace(_open(sample, against, p=against.nll.p), figures=figures)
    if before.lossless:
        return replace(verdict, figures=f"nothing to restore: {figures}")
    if _surely_loses(after):
        return verdict.decided(FAILS, tested=False)
    if against.nll.low > 0:
        return verdict.decided(FAILS)
    if after.lossless and against.nll.high < 0 and before.nll.n:
        return verdict.decided(HOLDS)
    return _alike(verdict, against.nll)


def nothing_gained(sample: Sample, plain: str, protected: str) -> Verdict:
    """Whether protecting a layer leaves `plain` (int4) as it was: holds where the two are alike, fails where protection surely
    lowers or raises the NLL; undecided where `plain` is lossless already.
    """
    compared, before = _compared(sample, protected, plain), _compared(sample, plain)
    verdict, nll = _open(sample, compared, p=compared.nll.p), compared.nll
    figures = f"{verdict.figures}; {plain} against full cache: {describe(before)}"
    if before.lossless:
        return replace(verdict, figures=f"nothing to restore: {figures}")
    verdict = replace(verdict, figures=figures)
    apart = nll.high < 0 or nll.low > 0
    return verdict.decided(FAILS) if apart and not _within(nll) else _alike(verdict, nll, HOLDS)


def differs_between_models(
    tables: dict[str, pd.DataFrame], setting: str, models: tuple[str, str]
) -> Verdict | None:
    """The first model's ΔNLL under this setting less the second's, on the tasks that both have; each model's examples are
    resampled within their tasks, which count equally. Holds where the interval lies beyond the margin on either side;
    fails where it lies within; None where the models share no task.
    """
    pairs = [comparisons.pairs(tables[model], setting) for model in models]
    shared = set(pairs[0]["task"]) & set(pairs[1]["task"])
    pairs = [own[own["task"].isin(shared)] for own in pairs]
    if not shared:
        return None
    # The mean over all strata of twice a model's change, and of minus twice the other's, is the difference of the means.
    change = [2 * (own["nll"] - own["nll_base"]) for own in pairs]
    both = pd.concat(
        [own.assign(task=f"{model}: " + own["task"]) for model, own in zip(models, pairs, strict=True)]
    )
    estimate = stats.mean(np.concatenate([change[0], -change[1]]), settings.clusters(both), both["task"])
    compared = [
        comparisons.compare(own, model, "", setting, FULL) for model, own in zip(models, pairs, strict=True)
    ]
    beyond = estimate.low > ALIKE or estimate.high < -ALIKE
    verdict = HOLDS if beyond else FAILS if _within(estimate) else UNDECIDED
    figures = f"difference of ΔNLL {estimate.text(3, '+')}; " + "; ".join(
        f"{c.model}: {describe(c)}, n = {c.nll.n}" for c in compared
    )
    n = min(c.nll.n for c in compared)
    what = f"{setting} between models"
    return Verdict(" / ".join(models), "", what, _enough(verdict, n), figures, n)


def slope(sample: Sample, setting: str, baseline: str) -> Verdict | None:
    """How the setting's advantage grows with the context: an example's least-squares slope of (the baseline's NLL − the
    setting's) on log2(context tokens), mean over the examples that have it at two lengths or more; None without any. With the
    full cache as the setting that is how the baseline's damage grows.

    The sample's tasks are named with their length behind an @ (``passages@512``); without it a task has one length.
    """
    if setting == FULL:
        pairs = comparisons.pairs(sample.table, baseline)
        gain = (pairs["nll"] - pairs["nll_base"]).to_numpy()
    else:
        pairs = comparisons.pairs(sample.table, setting, baseline)
        gain = (pairs["nll_base"] - pairs["nll"]).to_numpy()
    length = np.log2(pairs["context_tokens"].to_numpy(dtype=np.float64))
    tasks = pairs["task"].str.rsplit("@", n=1).str[0]
    questions = settings.clusters(pairs.assign(task=tasks)).to_numpy()
    slopes = []
    for question in pd.unique(questions):
        own = (questions == question) & np.isfinite(gain)
        # A context is filled up to a sentence, so two that were asked of one length may differ by some tokens.
        if own.sum() >= 2 and np.ptp(length[own]) > 0.5:
            slopes.append(float(np.polyfit(length[own], gain[own], 1)[0]))
    if not slopes:
        return None
    lengths = sorted({round(float(x)) for x in 2**length})
    span = f"{lengths[0]} to {lengths[-1]} tokens"
    figure = f"advantage in NLL grows by {{:.3f}} {{}} nats a token with each doubling, {span}"
    return threshold(sample.model, f"{setting} against {baseline}", stats.mean(slopes), 0.0, figure)


def threshold(
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
    above, under = (FAILS, HOLDS) if below else (HOLDS, FAILS)
    verdict = above if estimate.low >= least else under if estimate.high < least else UNDECIDED
    if not math.isfinite(estimate.low):
        verdict = UNDECIDED
    text = figure.format(estimate.value, f"[{estimate.low:.3g}, {estimate.high:.3g}]")
    return Verdict(model, "", what, _enough(verdict, estimate.n, examples), text, estimate.n)


def saving(rows: pd.DataFrame, setting: str, baseline: str) -> stats.Estimate:
    """1 − payload / the baseline's payload, mean over examples."""
    table = comparisons.by_example(rows)
    pairs = comparisons.pairs(table, setting, baseline)
    return stats.mean(1 - pairs["payload_bytes"] / pairs["payload_bytes_base"], settings.clusters(pairs))


def transmission_share(rows: pd.DataFrame, stages: tuple[str, ...] = EDGE_COMPUTE) -> stats.Estimate:
    """Transmission over some stages of a request together, geometric mean over examples."""
    return geometric(rows["transmit_s"] / rows[list(stages)].sum(axis=1), rows)


def geometric(values: pd.Series, rows: pd.DataFrame) -> stats.Estimate:
    """Geometric mean over examples with its interval."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values.to_numpy(dtype=np.float64))
    mean = stats.mean(logs, settings.clusters(rows))
    return stats.Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)
