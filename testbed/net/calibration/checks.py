"""From probe packets to figures with their 99 % intervals, and whether they are in tolerance: rate, one-way delay and loss; under
jitter the delay's standard deviation and law, under a loss model the length of bursts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, median, stdev

from testbed.net.calibration.outcome import Check
from testbed.net.calibration.probes import Arrived
from testbed.net.profile.jitter import spread
from testbed.net.profile.loss import LossModel
from testbed.net.profile.profile import Direction
from testbed.units import format_fraction, format_time

RATE_TOLERANCE = 0.03
DELAY_TOLERANCE_S = 1e-3  # above the asked delay
_EARLY_S = 0.1e-3  # below it: the clock's and the time stamps' own error
CONFIDENCE = 0.99
_FILL_S = 0.15  # of a saturating flow, at most: until the queue stands


def rate_check(way: str, direction: Direction, flow: Arrived, packet_bytes: int) -> Check:
    """The receiver's rate of a saturating flow, from when the queue stood to when the sender ended.

    The interval is that of the mean over ten equal parts of the flow.
    """
    asked, tolerance = direction.rate_bps, f"±{format_fraction(RATE_TOLERANCE)}"
    times = flow.arrived_s
    if len(times) < 4:
        judged = None if asked is None else False
        return Check(way, "rate", asked, n=len(times), ok=judged, tolerance=tolerance)
    # Arrivals are the sum of equal serialisation times once the bottleneck is never idle; the first ones are not.
    first = next(i for i, t in enumerate(times) if t - times[0] >= min(_FILL_S, (times[-1] - times[0]) / 8))
    times = times[first:]
    # What left together arrives together: the first moment's packets are those that the time begins after.
    after = len(times) - bisect_right(times, times[0])
    rate = after * packet_bytes * 8 / (times[-1] - times[0]) if after else 0.0
    low, high = _parts_interval(times, packet_bytes, rate)
    ok = None if asked is None else abs(rate - asked) <= RATE_TOLERANCE * asked
    return Check(way, "rate", asked, rate, low, high, len(times), ok, tolerance)


def delay_check(way: str, direction: Direction, flow: Arrived, packet_bytes: int) -> Check:
    """The median one-way delay of probes that meet no queue, without the probe's own serialisation. What is asked is the median
    under the profile's law of jitter, which not every law has in the middle.

    Judged by the median's interval (order statistics, no distribution assumed): with jitter, a few dozen probes tell it no
    better.
    """
    tolerance = f"+{format_time(DELAY_TOLERANCE_S)}"
    own = packet_bytes * 8 / direction.rate_bps if direction.rate_bps else 0.0
    asked = direction.delay_s
    if direction.jitter_s:
        asked = spread(direction.jitter_law, direction.jitter_s, direction.delay_s).median_s
    delays = sorted(a - s - own for s, a in zip(flow.sent_s, flow.arrived_s, strict=True))
    n = len(delays)
    if n == 0:
        # A link that loses everything has no delay to be wrong about.
        return Check(way, "delay", asked, ok=None if direction.loss == 1 else False, tolerance=tolerance)
    low, high = _median_interval(delays)
    ok = low <= asked + DELAY_TOLERANCE_S and high >= asked - _EARLY_S
    p99 = delays[min(n - 1, math.ceil(0.99 * n) - 1)]
    return Check(way, "delay", asked, median(delays), low, high, n, ok, tolerance, p99)


def loss_check(way: str, direction: Direction, flow: Arrived) -> Check:
    """The fraction of probes that did not arrive, with its exact binomial interval (Clopper and Pearson, 1934).

    Where losses come in bursts, that of as many fewer probes as bursts make the count vary more.
    """
    lost = flow.sent - len(set(flow.numbers))
    if flow.sent == 0:
        return Check(way, "loss", direction.loss, ok=False, tolerance="99% interval")
    inflation = 1.0 if direction.loss_model is None else max(1.0, direction.loss_model.chain().spread)
    low, high = clopper_pearson(lost / inflation, flow.sent / inflation)
    ok = lost == 0 if direction.loss == 0 else low <= direction.loss <= high
    return Check(way, "loss", direction.loss, lost / flow.sent, low, high, flow.sent, ok, "99% interval")


def clopper_pearson(hits: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval that holds the probability behind *hits* of *n* with at least this confidence."""
    from scipy.special import betaincinv  # scipy.stats has the same by name, but takes seconds to import

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return low, high


def _median_interval(ordered: list[float]) -> tuple[float, float]:
    """The order statistics between which the median lies: how many of n fall below it is binomial."""
    from scipy.special import bdtrik

    n = len(ordered)
    below = math.floor(max(0.0, float(bdtrik((1 - CONFIDENCE) / 2, n, 0.5))))
    return ordered[max(0, below - 1)], ordered[min(n - 1, n - below)]


def _parts_interval(times: list[float], packet_bytes: int, rate: float) -> tuple[float, float]:
    parts = min(10, (len(times) - 1) // 2)
    if parts < 2:
        return rate, rate
    edges = [round(i * (len(times) - 1) / parts) for i in range(parts + 1)]
    rates = [(b - a) * packet_bytes * 8 / max(1e-9, times[b] - times[a]) for a, b in pairwise(edges)]
    half = _half_interval(rates)
    return rate - half, rate + half


def _half_interval(values: Sequence[float]) -> float:
    """Half of the interval of a mean, Student's."""
    from scipy.special import stdtrit

    n = len(values)
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(n)


LEAST_BURSTS = 20  # bursts; fewer tell too little to judge by
BURST_TOLERANCE = 0.1  # beyond what the interval allows for


def burst_lengths(flow: Arrived) -> list[int]:
    """How many probes in a row were lost, for each row of them."""
    numbers = [-1, *sorted(set(flow.numbers)), flow.sent]
    return [after - before - 1 for before, after in pairwise(numbers) if after - before > 1]


def burst_check(way: str, model: LossModel, flow: Arrived) -> Check:
    """The mean length of a burst, with the interval of a mean. Judged where there are `LEAST_BURSTS` bursts."""
    lengths, asked = burst_lengths(flow), model.chain().burst
    tolerance = f"±{BURST_TOLERANCE:.0%}"
    n = len(lengths)
    if n < 2 or asked is None:
        return Check(way, "burst", asked, float(lengths[0]) if n else None, n=n, tolerance=tolerance)
    measured, half = mean(lengths), _half_interval(lengths)
    low, high = max(1.0, measured - half), measured + half
    fits = abs(measured - asked) <= half + BURST_TOLERANCE * asked
    ok = fits if n >= LEAST_BURSTS else None
    return Check(way, "burst", asked, measured, low, high, n, ok, tolerance)


LEAST_DELAYS = 50  # probes; fewer tell too little to judge by
SPREAD_TOLERANCE = 0.1  # of the standard deviation, beyond what its interval allows for
TIMING_S = 0.2e-3  # what the emulator's and the time stamps' own precision may add
_KOLMOGOROV = 1.628  # over the root of n: what 1 % of samples exceed (Kolmogorov 1933; Smirnov 1948)


def jitter_checks(way: str, direction: Direction, flow: Arrived, packet_bytes: int) -> list[Check]:
    """``jitter``: the standard deviation; ``jitter distribution``: the largest distance between both, each around its median (how
    far the median is off is the delay's business). Nothing where no jitter is asked for.

    A few packets that the machine held up are the emulator's lateness, which is counted, and no jitter: what is beyond all that
    the law can give counts as its extreme. Probes must be so far apart that they do not meet. Judged where there are
    `LEAST_DELAYS` of them and no packet skips the delay.
    """
    if not direction.jitter_s:
        return []
    law = spread(direction.jitter_law, direction.jitter_s, direction.delay_s)
    own = packet_bytes * 8 / direction.rate_bps if direction.rate_bps else 0.0
    first, last = law.delays[0] - TIMING_S, law.delays[-1] + TIMING_S
    delays = [min(last, max(first, a - s - own)) for s, a in zip(flow.sent_s, flow.arrived_s, strict=True)]
    n = len(delays)
    tolerance = f"±{SPREAD_TOLERANCE:.0%}"
    if n < 2:
        return [Check(way, "jitter", law.deviation_s, n=n, tolerance=tolerance)]
    judged = n >= LEAST_DELAYS and not direction.reorder
    # The law says how much a standard deviation of n delays varies; few delays hardly know their own tails.
    half = _NORMAL * law.deviation_s * math.sqrt(max(0.0, law.kurtosis - 1) / n) / 2
    measured = stdev(delays)
    slack = SPREAD_TOLERANCE * law.deviation_s + TIMING_S / 2
    ok = abs(measured - law.deviation_s) <= half + slack if judged else None
    low, high = max(0.0, measured - half), measured + half
    around = median(delays)
    apart = distance([d - around for d in delays], [d - law.median_s for d in law.delays], TIMING_S)
    limit = _KOLMOGOROV / math.sqrt(n)
    alike = apart <= limit if judged else None
    return [
        Check(way, "jitter", law.deviation_s, measured, low, high, n, ok, tolerance),
        Check(way, "jitter distribution", 0.0, apart, n=n, ok=alike, tolerance=f"≤ {limit:.3f}"),
    ]


def distance(sample: Sequence[float], law: Sequence[float], within: float) -> float:
    """The Kolmogorov-Smirnov distance of a sample from a law, whose quantiles are ascending; what would be less with every value
    of the sample *within* so much of where it is does not count."""
    ordered, n, m = sorted(sample), len(sample), len(law)
    most = 0.0
    for place, value in enumerate(ordered):
        above = (place + 1) / n - bisect_right(law, value + within) / m
        below = bisect_left(law, value - within) / m - place / n
        most = max(most, above, below)
    return most


def _quantile() -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


_NORMAL = _quantile()
