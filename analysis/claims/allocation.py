"""The claim on allocation: edges of one cell that all ask at once meet a deadline where each has a part by what it is to send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from testbed import stats
from testbed.analysis.claims.pool import Pool
from testbed.analysis.claims.rules import FAILS, HOLDS, UNDECIDED, Verdict
from testbed.analysis.loads import Served

#: A deadline is so many times what a round's bytes take over the whole cell.
SLACK = 1.25
#: Of rounds in time: at least so many, where at most so many are under equal reservations.
MOST, FEW = 0.8, 0.2
LEAST = 20  #: rounds: all of them in time show 80 %
_EQUAL = "reserved"


@dataclass(frozen=True)
class Rounds:
    """What became of one load's rounds: the share of those in which every edge had its first token by the deadline, and the share
    of requests that had.
    """

    allocation: str
    clients: int
    deadline_s: float
    rounds: stats.Estimate
    requests: float


def allocation(pool: Pool) -> Iterator[Verdict]:
    """Each way of sharing a cell out against equal reservations, under the same rounds of the same edges."""
    for model, every in pool.loads.items():
        alike: dict[tuple[object, ...], dict[str, Rounds]] = {}
        for served in every:
            shared = str(served.rows["allocate"].iloc[0])
            if served.load.startswith("rounds(") and shared:
                alike.setdefault(_apart(served), {})[shared] = in_time(served)
        for (panel, *_), found in alike.items():
            equal = found.get(_EQUAL)
            if equal is not None:
                for other in found.values():
                    if other is not equal:
                        yield _compared(model, str(panel), other, equal)


def _apart(served: Served) -> tuple[object, ...]:
    """All by which loads are told apart but how their cell is shared out."""
    columns = ["client", "placement", "codec", "delivery", "transport", "link"]
    who = served.rows[columns].drop_duplicates().sort_values(columns)
    return served.panel, served.load, served.serving, tuple(who.itertuples(index=False, name=None))


def in_time(served: Served) -> Rounds:
    """A load's rounds held against their deadline. A round that lacks a client's request is not in time."""
    rows = served.rows
    own = rows.groupby("client")
    seconds = own["payload_bytes"].mean() * 8 / own["rate_up_bps"].first()
    deadline_s = SLACK * float(seconds.sum())
    met = rows.assign(met=rows["first_s"] <= deadline_s)
    rounds = met.groupby(["repeat", _begun(rows)])["met"].sum() == own.ngroups
    share = stats.share_above(rounds.to_numpy(float), 0.5)
    shared = str(rows["allocate"].iloc[0])
    return Rounds(shared, own.ngroups, deadline_s, share, float(met["met"].mean()))


def _begun(rows: pd.DataFrame) -> pd.Series[float]:
    """When each request's round began: edges of one ask at the same planned moment."""
    return rows["arrived_at"].astype(float).round(3)


def _compared(model: str, panel: str, ours: Rounds, equal: Rounds) -> Verdict:
    verdict = UNDECIDED
    if ours.rounds.low >= MOST and equal.rounds.high <= FEW:
        verdict = HOLDS
    elif ours.rounds.high < MOST or equal.rounds.low > FEW:
        verdict = FAILS
    n = min(ours.rounds.n, equal.rounds.n)
    figures = (
        f"all {ours.clients} edges in time in {_percent(ours.rounds)} of rounds against {_percent(equal.rounds)}; of requests "
        f"{ours.requests:.0%} against {equal.requests:.0%}; deadline {ours.deadline_s:.3g} s"
    )
    what = f"{ours.allocation} against {_EQUAL}, {panel}"
    return Verdict(model, "", what, verdict if n >= LEAST else UNDECIDED, figures, n)


def _percent(share: stats.Estimate) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
