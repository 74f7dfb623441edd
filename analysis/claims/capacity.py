"""The claim on capacity: how many more requests a second a link carries in time where the cache is compressed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from testbed.analysis import loads
from testbed.analysis.claims.pool import Pool
from testbed.analysis.claims.rules import FAILS, HOLDS, UNDECIDED, Verdict
from testbed.analysis.loads import Capacity, Served
from testbed.experiment.row import SENDING

#: A share of first tokens within so many seconds.
SHARE, DEADLINE_S = 0.95, 1.0
LEAST = 60  #: requests at each rate: all of them in time show 95 %
_PLAIN = "fp16"


def capacity(pool: Pool) -> Iterator[Verdict]:
    """Each codec against the 16-bit cache on one link, under the same placement, delivery and serving: Poisson arrivals alone."""
    for model, every in pool.loads.items():
        curves = {_alike(curve[0]): curve for curve in loads.curves(every) if curve[0].family == "poisson"}
        for (codec, *rest), curve in curves.items():
            plain = curves.get((_PLAIN, *rest))
            if plain is not None and codec != _PLAIN:
                yield _compared(model, curve, plain)


def _alike(served: Served) -> tuple[str, ...]:
    """The codec of a load's cache, and all else by which loads are told apart; what sends none, or several, is nobody's."""
    rows = served.rows
    codecs = set(rows.loc[rows["placement"].isin(SENDING), "codec"])
    codec = codecs.pop() if len(codecs) == 1 else served.setting
    rest = (str(rows[column].iloc[0]) for column in ("placement", "delivery", "transport"))
    return (codec, served.panel, served.serving, *rest)


def _compared(model: str, curve: list[Served], plain: list[Served]) -> Verdict:
    ours, theirs = (loads.capacity(each, DEADLINE_S, SHARE) for each in (curve, plain))
    n = min(ours.n, theirs.n)
    verdict = HOLDS if ours.low > theirs.high else FAILS if ours.high < theirs.low else UNDECIDED
    smaller = plain[0].rows["payload_bytes"].mean() / curve[0].rows["payload_bytes"].mean()
    figures = (
        f"{ours.text()} requests a second against {theirs.text()}: {_times(ours, theirs)} as many, of a payload "
        f"{smaller:.2f} times smaller"
    )
    what = f"{curve[0].setting} against {plain[0].setting}, {curve[0].panel}, {curve[0].serving}"
    return Verdict(model, "", what, verdict if n >= LEAST else UNDECIDED, figures, n)


def _times(ours: Capacity, theirs: Capacity) -> str:
    """One capacity over the other, from the ends that favour either; of one that is not reached a bound is known."""
    value, low, high = (
        _over(a, b) for a, b in ((ours.value, theirs.value), (ours.low, theirs.high), (ours.high, theirs.low))
    )
    if math.isinf(ours.value):
        value = _over(ours.most, theirs.value)
        low = _over(min(ours.low, ours.most), theirs.high)
    if not math.isfinite(value):
        return "an unknown number of times"
    top = f"{high:.3g}" if math.isfinite(high) else "unknown"
    return f"{'more than ' if math.isinf(ours.value) else ''}{value:.3g} [{low:.3g}, {top}] times"


def _over(a: float, b: float) -> float:
    return a / b if b > 0 and math.isfinite(b) else 0.0 if math.isinf(b) and math.isfinite(a) else math.inf
