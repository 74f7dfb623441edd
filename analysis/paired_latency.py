"""Latencies of two settings on one link, example by example: the ratio, how sure it is, and what is a tie.

One statistic everywhere: a setting's latency is its median, and settings are compared by the median of the examples'
ratios, whose interval lies between two order statistics (exact whatever the distribution, and a failed request is
infinite in it). Wilcoxon's signed-rank test of the logarithms says whether there is a difference at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from testbed import stats
from testbed.analysis import settings

LEVEL = 0.05
#: What a request that failed counts in a rank test, in logarithms: more than any that finished.
_FOR_EVER = 1e6


@dataclass(frozen=True)
class LatencyRatio:
    """`setting` over `baseline` on one panel's link and the examples that both tried: 1.2 takes a fifth longer. `p`:
    Wilcoxon's, `p_holm` after Holm's correction over what was compared together.
    """

    setting: str
    baseline: str
    ratio: stats.Estimate
    p: float
    p_holm: float = math.nan

    @property
    def differs(self) -> bool:
        """Whether the two are told apart: the corrected p is below the level and the interval does not hold 1."""
        return self.p_holm < LEVEL and not self.ratio.low <= 1 <= self.ratio.high


def baseline_of(rows: pd.DataFrame) -> str:
    """What latencies of these rows are compared with: the text sent to the cloud, where the run tried it; else the cache
    in 16 bits; else the first setting.
    """
    for own in (rows[rows["placement"] == "cloud"], rows[rows["codec"] == "fp16"], rows):
        if len(own):
            return str(own["setting"].iloc[0])
    raise ValueError("no rows")


def ratios(rows: pd.DataFrame, baseline: str, others: Iterable[str] | None = None) -> list[LatencyRatio]:
    """Settings of one panel's rows (None: all but the baseline) over the baseline, as one family."""
    times = _by_example(rows)
    wanted = [s for s in times.columns if s != baseline] if others is None else list(others)
    family = [_ratio(times, name, baseline) for name in wanted if name in times and baseline in times]
    adjusted = stats.holm([ratio.p for ratio in family])
    return [replace(ratio, p_holm=float(p)) for ratio, p in zip(family, adjusted, strict=True)]


def tied(rows: pd.DataFrame, best: str, others: Iterable[str]) -> list[str]:
    """Which of `others` are not shown to be slower than `best`."""
    compared = ratios(rows, best, [name for name in others if name != best])
    return [ratio.setting for ratio in compared if not (ratio.differs and ratio.ratio.value > 1)]


def first_tokens(rows: pd.DataFrame) -> pd.Series[float]:
    """The rows' times to the first token; infinite where a trial failed."""
    return rows["ttft_s"].mask(rows["failed"].astype(bool), math.inf) if "failed" in rows else rows["ttft_s"]


def first_token_differences(rows: pd.DataFrame, baseline: str) -> dict[str, stats.Estimate]:
    """How much later (s; negative: sooner) each other setting of one panel's rows has its first token than the baseline: the
    median of the examples' differences, with its interval between two order statistics.
    """
    times = _by_example(rows, first_tokens(rows))
    if baseline not in times:
        return {}
    return {
        str(name): stats.quantile((times[name] - times[baseline]).to_numpy(), 0.5)
        for name in times.columns
        if name != baseline
    }


def _by_example(rows: pd.DataFrame, latencies: pd.Series[float] | None = None) -> pd.DataFrame:
    """Median latency over repeats: an example a line, a setting a column; NaN where it was not tried."""
    times = settings.latencies(rows) if latencies is None else latencies
    table = settings.at_home(rows.assign(_latency=times, _example=settings.clusters(rows)))
    return table.groupby(["_example", "setting"], sort=False)["_latency"].median().unstack("setting")


def _ratio(times: pd.DataFrame, setting: str, baseline: str) -> LatencyRatio:
    both = times[[setting, baseline]].dropna()
    return LatencyRatio(setting, baseline, *compared(both[setting].to_numpy(), both[baseline].to_numpy()))


def compared(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> tuple[stats.Estimate, float]:
    """The median of the ratios of paired latencies (s; infinite: failed) with its interval, and Wilcoxon's p."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(ours == theirs, 1.0, ours / theirs)  # both failed: alike
        logs = np.nan_to_num(np.log(values), posinf=_FOR_EVER, neginf=-_FOR_EVER)
    middle = stats.quantile(values, 0.5)
    estimate = replace(middle, low=max(0.0, middle.low)) if math.isfinite(middle.low) else middle
    return estimate, stats.signed_rank(logs) if len(logs) > 1 else math.nan


def text(latency: LatencyRatio) -> str:
    """For people: ``×1.25 [1.10, 1.42]``; ``≈`` before it where the two are not told apart."""
    return f"{'×' if latency.differs else '≈'}{latency.ratio.text()}" if latency.ratio.n else "-"
