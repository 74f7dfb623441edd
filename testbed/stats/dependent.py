"""Estimates over requests that wait for each other, and so are no independent observations.

Behind one slow request the next ones are slow, too: n requests of a queue say less than n independent ones, and an interval
that counts them as such is too narrow. Batch means say how much less (A. M. Law, "Simulation Modeling and Analysis", 5th
edition, 2015, section 9.5): time is divided into stretches longer than a busy period, whose totals hardly depend on each other,
and their spread is that of the whole. Quantiles go by the share of requests below them (P. Heidelberger and P. A. W. Lewis,
"Quantile Estimation in Dependent Sequences", Operations Research 32(1), 1984): n requests count as so many independent ones as
would leave that share as uncertain. Where all of them hit, or none, nothing shows how they depend: they then count as n.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from testbed.stats.estimates import TAIL, Estimate

Floats = npt.NDArray[np.float64]

#: Stretches that a load's time is divided into: so many that their spread is known, so few that each is long.
BATCHES = 10


def effective(hits: npt.ArrayLike, batches: npt.ArrayLike, p: float) -> float:
    """As many independent observations as would leave a share `p` as uncertain as these `hits` (0 or 1) do; at most their number.
    `batches`: the stretch that each lies in. NaN below two stretches.
    """
    own = np.asarray(hits, dtype=np.float64)
    codes, n = np.unique(np.asarray(batches), return_inverse=True)[1], len(own)
    count = int(codes.max()) + 1 if n else 0
    if count < 2:
        return math.nan
    apart = np.bincount(codes, own - own.mean())
    spread = count / (count - 1) * float((apart**2).sum()) / n**2
    alone = p * (1 - p) / n
    # A spread known from few stretches is less sure than one from many.
    wider = (scipy_stats.t.ppf(1 - TAIL, count - 1) / scipy_stats.norm.ppf(1 - TAIL)) ** 2
    return n / max(1.0, wider * spread / alone) if alone > 0 else float(n)


def share(hits: npt.ArrayLike, batches: npt.ArrayLike) -> Estimate:
    """The share of requests for which something is true; Clopper and Pearson's interval over the effective number of them."""
    own = np.asarray(hits, dtype=np.float64)
    if not len(own):
        return Estimate(math.nan, math.nan, math.nan, 0)
    p = float(own.mean())
    low, high = _between(p, effective(own, batches, p))
    return Estimate(p, low, high, len(own))


def quantile(values: npt.ArrayLike, q: float, batches: npt.ArrayLike) -> Estimate:
    """The `q`-quantile between two order statistics, chosen for the effective number of requests; what was never answered is
    infinite. An end that so many cannot bound is infinite.
    """
    own = np.asarray(values, dtype=np.float64)
    n = len(own)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    ordered = np.sort(own)
    point = float(ordered[min(n - 1, math.ceil(q * n) - 1)])
    many = effective(own <= point, batches, q)
    low, high = _between(q, many)
    if not math.isfinite(low):
        return Estimate(point, math.nan, math.nan, n)
    bottom = -math.inf if (1 - q) ** many > TAIL else float(ordered[max(0, math.ceil(low * n) - 1)])
    top = math.inf if q**many > TAIL else float(ordered[min(n - 1, math.ceil(high * n) - 1)])
    return Estimate(point, bottom, top, n)


def rate(times: npt.ArrayLike, starts: npt.ArrayLike, length_s: float) -> Estimate:
    """Events a second: `times` in stretches of `length_s` that begin at `starts`; Student's interval over the stretches."""
    own, edges = np.asarray(times, dtype=np.float64), np.asarray(starts, dtype=np.float64)
    rates = np.array([((own >= start) & (own < start + length_s)).sum() for start in edges]) / length_s
    mean = float(rates.mean()) if len(rates) else math.nan
    if len(rates) < 2:
        return Estimate(mean, math.nan, math.nan, len(own))
    half = scipy_stats.t.ppf(1 - TAIL, len(rates) - 1) * float(rates.std(ddof=1)) / math.sqrt(len(rates))
    return Estimate(mean, max(0.0, mean - half), mean + half, len(own))


def _between(p: float, n: float) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share `p` of `n` observations, which need not be whole numbers."""
    if not math.isfinite(n) or n <= 0:
        return math.nan, math.nan
    hits = p * n
    low = 0.0 if p <= 0 else float(scipy_stats.beta.ppf(TAIL, hits, n - hits + 1))
    high = 1.0 if p >= 1 else float(scipy_stats.beta.ppf(1 - TAIL, hits + 1, n - hits))
    return low, high
