"""Does delay vary as the profile's law of jitter says? Its standard deviation, and how far what was measured is from the law."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import median, stdev

from testbed.net.calibration.checks import CONFIDENCE, Check
from testbed.net.calibration.probes import Arrived
from testbed.net.profile.jitter import spread
from testbed.net.profile.profile import Direction

LEAST = 50  # probes; fewer tell too little to judge by
SPREAD_TOLERANCE = 0.1  # of the standard deviation, beyond what its interval allows for
TIMING_S = 0.2e-3  # what the emulator's and the time stamps' own precision may add
_KOLMOGOROV = (
    1.628  # over the root of n: the distance that 1 % of samples exceed (Kolmogorov 1933; Smirnov 1948)
)


def jitter_checks(way: str, direction: Direction, flow: Arrived, packet_bytes: int) -> list[Check]:
    """``jitter``: the standard deviation; ``law``: the largest distance between both distributions, each around its median (how
    far the median is off is the delay's business). Nothing where no jitter is asked for.

    A few packets that the machine held up are the emulator's lateness, which is counted, and no jitter: what is beyond all that
    the law can give counts as its extreme. Probes must be so far apart that they do not meet. Judged where there are `LEAST` of
    them and no packet skips the delay.
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
        return [Check(way, "jitter", law.deviation_s, None, None, None, n, None, tolerance)]
    judged = n >= LEAST and not direction.reorder
    # The law says how much a standard deviation of n delays varies; few delays hardly know their own tails.
    half = _NORMAL * law.deviation_s * math.sqrt(max(0.0, law.kurtosis - 1) / n) / 2
    measured = stdev(delays)
    slack = SPREAD_TOLERANCE * law.deviation_s + TIMING_S / 2
    fits = abs(measured - law.deviation_s) <= half + slack
    around = median(delays)
    apart = distance([d - around for d in delays], [d - law.median_s for d in law.delays], TIMING_S)
    limit = _KOLMOGOROV / math.sqrt(n)
    low = max(0.0, measured - half)
    return [
        Check(
            way,
            "jitter",
            law.deviation_s,
            measured,
            low,
            measured + half,
            n,
            fits if judged else None,
            tolerance,
        ),
        Check(way, "law", 0.0, apart, None, None, n, apart <= limit if judged else None, f"≤ {limit:.3f}"),
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
