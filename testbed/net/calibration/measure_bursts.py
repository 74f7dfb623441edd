"""Do losses come in bursts as the profile's model says? Their mean length beside the model's."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import mean, stdev

from testbed.net.calibration.checks import CONFIDENCE, Check
from testbed.net.calibration.probes import Arrived
from testbed.net.profile.loss import LossModel

LEAST = 20  # bursts; fewer tell too little to judge by
BURST_TOLERANCE = 0.1  # beyond what the interval allows for


def burst_lengths(flow: Arrived) -> list[int]:
    """How many probes in a row were lost, for each row of them."""
    numbers = [-1, *sorted(set(flow.numbers)), flow.sent]
    return [after - before - 1 for before, after in pairwise(numbers) if after - before > 1]


def burst_check(way: str, model: LossModel, flow: Arrived) -> Check:
    """The mean length of a burst, with the interval of a mean. Judged where there are `LEAST` bursts."""
    lengths, asked = burst_lengths(flow), model.burst
    tolerance = f"±{BURST_TOLERANCE:.0%}"
    n = len(lengths)
    if n < 2 or asked is None:
        measured = float(lengths[0]) if n else None
        return Check(way, "burst", asked, measured, None, None, n, None, tolerance)
    measured = mean(lengths)
    half = _student(n) * stdev(lengths) / math.sqrt(n)
    fits = abs(measured - asked) <= half + BURST_TOLERANCE * asked
    return Check(
        way,
        "burst",
        asked,
        measured,
        max(1.0, measured - half),
        measured + half,
        n,
        fits if n >= LEAST else None,
        tolerance,
    )


def _student(n: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
