"""What a run's loads came to: requests offered and carried, how long they took, who was served, how many a setting carries.

The unit is the request, not the example. Requests of a load wait for each other, so intervals are by batch means
(`stats.dependent`). What was refused, or failed, took for ever. Warm-up is left out; but what came up in it and ended in the
part that counts is carried there, as what came up in that part and ended behind it is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from testbed import stats
from testbed.analysis import layout, settings
from testbed.analysis.run import Run
from testbed.errors import UnitError
from testbed.stats import dependent
from testbed.units import parse_per_second, parse_time

#: Behind the last repeat's times begin the next one's; longer than any load lasts.
_APART_S = 1e6
_RATE = re.compile(r"poisson\(rate=([^,)]+)\)")
_CLIENTS = re.compile(r"clients=\d+(, )?")


@dataclass(frozen=True)
class Served:
    """One setting under one load and serving, on one link. `offered`: requests a second that came up; `carried`: that were
    answered; `rows`: its requests that count, with `first_s` (to the first token, infinite without one) and `stretch`, for
    batch means.
    """

    cell: str
    panel: str
    setting: str
    load: str
    serving: str
    clients: int
    offered: float
    carried: stats.Estimate
    rows: pd.DataFrame

    @property
    def closed(self) -> bool:
        """Whether clients wait for their answers before they ask again."""
        return self.load.startswith("closed")

    @property
    def family(self) -> str:
        """Loads that differ in how much they ask alone: closed loops of one time to think, Poisson processes; or a file."""
        if self.closed:
            return _CLIENTS.sub("", self.load).replace("()", "").replace(", )", ")")
        return "poisson" if self.load.startswith("poisson") else self.load

    @property
    def at(self) -> float:
        """How much is asked, as loads of a family are told apart: clients of a closed loop, else requests a second."""
        return float(self.clients) if self.closed else self.offered

    @property
    def nominal(self) -> float:
        """The same as the scenario asks it: of a Poisson process as many a second as its rate says, whatever came up."""
        rate = _RATE.match(self.load)
        return self.at if rate is None else parse_per_second(rate.group(1))

    @property
    def curve(self) -> tuple[str, str, str, str]:
        """What loads are put together to a curve by: link, setting, serving, family."""
        return self.panel, self.setting, self.serving, self.family

    @property
    def refused(self) -> float:
        """The share of requests for which the cloud had no room."""
        return float(self.rows["refused"].mean())

    @property
    def failed(self) -> int:
        """Requests that were neither answered nor refused."""
        return int((self.rows["failed"] & ~self.rows["refused"]).sum())

    def first_token(self, q: float) -> stats.Estimate:
        """The `q`-quantile of the time to the first token, seconds."""
        return dependent.quantile(self.rows["first_s"], q, self.rows["stretch"])

    def within(self, deadline_s: float) -> stats.Estimate:
        """The share of requests whose first token came by then."""
        return dependent.share(self.rows["first_s"] <= deadline_s, self.rows["stretch"])

    def goodput(self, deadline_s: float) -> stats.Estimate:
        """Requests a second whose first token came by then."""
        share, every = self.within(deadline_s), self.offered
        return stats.Estimate(share.value * every, share.low * every, share.high * every, share.n)

    @cached_property
    def jain(self) -> float:
        """Jain's index over clients of what each got: answers in a closed loop, else the answered share of its requests.
        1: all alike; 1/n: one of n got all (R. Jain, D. Chiu, W. Hawe, DEC-TR-301, 1984)."""
        by = self.rows.groupby("client")["failed"]
        got = (
            (~self.rows["failed"]).groupby(self.rows["client"]).sum() if self.closed else 1 - by.mean()
        ).to_numpy(float)
        squares = float((got**2).sum())
        return float(got.sum() ** 2 / (len(got) * squares)) if squares > 0 else math.nan


@dataclass(frozen=True)
class Capacity:
    """The largest load of a family under which the level holds, there and at all lower ones measured; straight lines between
    those. 0: it does not hold at the lowest measured; infinite: it holds at the highest. `low`, `high`: where the ends
    of the shares' intervals (each load's own) cross the level.
    """

    value: float
    low: float
    high: float
    least: float  #: the lowest load measured
    most: float
    n: int  #: requests at the load that has fewest

    def text(self) -> str:
        """For people: ``2.31 [2.02, 2.6]``, ``> 4`` where it was met at all loads measured, ``< 0.5`` where at none."""
        ends = ", ".join(self._one(end) for end in (self.low, self.high))
        return f"{self._one(self.value)} [{ends}]"

    def _one(self, value: float) -> str:
        return (
            f"> {self.most:.3g}"
            if math.isinf(value)
            else f"< {self.least:.3g}"
            if value <= 0
            else f"{value:.3g}"
        )


def served(run: Run) -> list[Served]:
    """Every load of every setting, in the run's order; empty where none was put on. A setting whose edges have codecs of
    their own is all of them: ``int4 + int8``.
    """
    both = run.attempts
    both = both[both["load"] != "sequential"]
    if both.empty:
        return []
    named = settings.labelled(both.assign(load="sequential"))
    both = both.assign(setting=named["setting"], panel=_links(named))
    both = both.assign(first_s=both["ttft_s"].mask(both["failed"].astype(bool), math.inf).fillna(math.inf))
    warmup, length = (
        _seconds(run, key, default) for key, default in (("warmup", 0.0), ("duration", math.nan))
    )
    early = run.warming if len(run.warming) else both.iloc[:0]
    return [
        _served(str(cell), own, early[early["cell"] == cell], warmup, length)
        for cell, own in both.groupby("cell", sort=False)
    ]


def _links(named: pd.DataFrame) -> pd.Series[str]:
    """The panel, with what was asked where the run varies it."""
    asked = named["task"] + " " + named["context_tokens"].astype(str)
    several = named["task"].nunique() > 1
    return named["panel"] + asked.map(lambda text: f" · {text}") if several else named["panel"]


def _seconds(run: Run, key: str, default: float) -> float:
    value = run.scenario.get(key, default)
    try:
        return float(value) if isinstance(value, int | float) else parse_time(str(value))
    except UnitError:
        return default


def _served(cell: str, rows: pd.DataFrame, early: pd.DataFrame, warmup_s: float, length_s: float) -> Served:
    arrived = rows["arrived_at"].fillna(warmup_s).astype(float)
    if not math.isfinite(length_s):
        length_s = max(float(arrived.max()) - warmup_s, 1e-9)
    repeats = sorted(rows["repeat"].unique())
    part = length_s / dependent.BATCHES
    number = ((arrived - warmup_s) / part).clip(0, dependent.BATCHES - 1).astype(int)
    rows = rows.assign(stretch=rows["repeat"] * dependent.BATCHES + number)
    done = pd.concat([rows[~rows["failed"]], early[early["error"] == ""] if len(early) else early])
    ends = done["repeat"] * _APART_S + done["arrived_at"].astype(float) + done["e2e_s"].astype(float)
    starts = [r * _APART_S + warmup_s + i * part for r in repeats for i in range(dependent.BATCHES)]
    whole = [sorted(rows[name].unique()) for name in ("panel", "setting")]
    return Served(
        cell=cell,
        panel=" + ".join(map(str, whole[0])),
        setting=" + ".join(map(str, whole[1])),
        load=str(rows["load"].iloc[0]),
        serving=str(rows["serving"].iloc[0]),
        clients=int(rows["client"].nunique()),
        offered=len(rows) / (length_s * len(repeats)),
        carried=dependent.rate(ends, starts, part),
        rows=rows.reset_index(drop=True),
    )


def curves(every: Iterable[Served]) -> list[list[Served]]:
    """The loads of each setting, serving and family on each link, from the lightest on."""
    found: dict[tuple[str, str, str, str], list[Served]] = {}
    for each in every:
        found.setdefault(each.curve, []).append(each)
    return [sorted(own, key=lambda each: each.at) for own in found.values()]


def capacity(curve: Sequence[Served], deadline_s: float, p: float) -> Capacity:
    """Up to which of these loads a share `p` of requests has its first token within the deadline."""
    loads = [each.at for each in curve]
    shares = [each.within(deadline_s) for each in curve]
    low = [0.0 if math.isnan(share.low) else share.low for share in shares]
    high = [1.0 if math.isnan(share.high) else share.high for share in shares]
    value, bottom, top = (_crossing(loads, own, p) for own in ([share.value for share in shares], low, high))
    return Capacity(value, bottom, top, loads[0], loads[-1], min(share.n for share in shares))


def _crossing(loads: Sequence[float], shares: Sequence[float], p: float) -> float:
    """Where a curve first falls below `p`: 0 where it begins below, infinite where it never does."""
    if shares[0] < p:
        return 0.0
    for i in range(1, len(loads)):
        if shares[i] < p:
            return loads[i - 1] + (loads[i] - loads[i - 1]) * (shares[i - 1] - p) / (
                shares[i - 1] - shares[i]
            )
    return math.inf


def deadline_of(every: Sequence[Served]) -> float:
    """A round deadline that every setting can meet when little is asked: at least twice the slowest one's median under its
    lightest load."""
    medians = [curve[0].first_token(0.5).value for curve in curves(every)]
    slowest = 2 * max([m for m in medians if math.isfinite(m)], default=0.5)
    return next(
        d for e in range(-4, 9) for d in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if d >= slowest * (1 - 1e-9)
    )


def frame(run: Run) -> pd.DataFrame:
    """A line a load of each setting; seconds, requests a second, shares. `deadline_s`: that of `goodput`."""
    every = served(run)
    deadline = deadline_of(every) if every else math.nan
    lines = []
    for each in every:
        line: dict[str, object] = {
            name: getattr(each, name) for name in ("cell", "setting", "load", "serving", "clients")
        }
        line |= {"link": each.panel, "n": len(each.rows), "refused": each.refused, "failed": each.failed}
        line |= {"offered_per_s": each.offered, "deadline_s": deadline, "jain": each.jain}
        estimates = {
            "carried_per_s": each.carried,
            "goodput_per_s": each.goodput(deadline),
            "within": each.within(deadline),
        }
        estimates |= {f"ttft_p{q:.0f}_s": each.first_token(q / 100) for q in (50, 95, 99)}
        for name, estimate in estimates.items():
            line |= {name: estimate.value, f"{name}_lo": estimate.low, f"{name}_hi": estimate.high}
        waits = ("edge_queue_s", "link_queue_s", "queue_s")
        lines.append(line | {f"{name}_mean": each.rows[name].mean() for name in waits})
    return pd.DataFrame(lines)


def write(run: Run) -> Path | None:
    """Write ``loads.csv``; None of a run without loads."""
    lines = frame(run)
    return (
        None
        if lines.empty
        else run.write("loads.csv", lambda to: lines.to_csv(to, index=False, float_format="%.6g"))
    )


def text(run: Run, width: int | None = None) -> str:
    """The loads for the terminal, in lines of `width` characters at most; empty of a run without any."""
    every = served(run)
    if not every:
        return ""
    deadline = deadline_of(every)
    header = ["setting", "load", "n", "asked/s", "carried/s", "p50", "p95", "p99"]
    header += [f"in {deadline:g} s", "Jain", "refused"]
    out = []
    for panel in dict.fromkeys(each.panel for each in every):
        rows = [
            [
                each.setting,
                _named(each),
                str(len(each.rows)),
                f"{each.offered:.2f}",
                each.carried.text(),
                *(_short(each.first_token(q).value) for q in (0.5, 0.95, 0.99)),
                f"{each.within(deadline).value:.1%}",
                f"{each.jain:.3f}",
                f"{each.refused:.1%}",
            ]
            for each in every
            if each.panel == panel
        ]
        out.append(f"{panel}: under load")
        out.append(layout.table(rows, header, width, texts=(0, 1), indent=2))
    note = (
        "p50 …: time to the first token, seconds; brackets: 95 % by batch means, since requests wait for each other "
        "(loads.csv has all intervals); n: requests"
    )
    return "\n".join([*out, layout.sentences(note, width)])


def _named(each: Served) -> str:
    return each.load + ("" if each.serving == "fifo" else f" · {each.serving}")


def _short(seconds: float) -> str:
    return f"{seconds:.3f}" if math.isfinite(seconds) else "none"
