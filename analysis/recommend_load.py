"""Which setting carries a load: so many clients, or requests a second, of which a share has its first token by a deadline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from testbed import stats
from testbed.analysis import layout, loads, settings
from testbed.analysis.describe import plain
from testbed.analysis.loads import Capacity, Served
from testbed.analysis.run import Run
from testbed.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """`at`: clients of a closed loop, or else requests a second; a share `p` of them within `deadline_s`."""

    at: float
    closed: bool
    deadline_s: float
    p: float

    def text(self) -> str:
        """For people."""
        load = f"{self.at:g} clients" if self.closed else f"{self.at:g} requests a second"
        return f"{load} · {100 * self.p:g} % of first tokens within {self.deadline_s:g} s"


@dataclass(frozen=True)
class Option:
    """A setting under a serving at the asked load. `within`: the share in time there; `tail_s`: where measured, the `p`-quantile
    of the time to the first token; `extrapolated`: in words, where the load lies outside of those measured; `quality`, `exact`:
    as `settings.kept_quality` has them.
    """

    setting: str
    serving: str
    within: stats.Estimate
    tail_s: stats.Estimate
    capacity: Capacity
    known: str  #: by which loads
    extrapolated: str
    quality: stats.Estimate
    exact: bool

    def carries(self, p: float) -> bool:
        """Whether that is shown: by the interval's lower end."""
        return bool(self.within.low >= p)

    def seems_to(self, p: float) -> bool:
        """Whether the estimate alone says so."""
        return bool(self.within.value >= p)

    def too_low(self, floor: float) -> bool:
        """Whether its answers surely are worth less than that share of the full cache's: a shape has none."""
        return not self.exact and bool(self.quality.high < floor)

    @property
    def name(self) -> str:
        """With the serving, where that is not the usual one."""
        return self.setting + ("" if self.serving == "fifo" else f" · {self.serving}")


@dataclass(frozen=True)
class Answer:
    """For one link and family of loads: its settings, those with the largest capacity first. `choice`: None where none is shown
    to carry it; `without_proof`: what the estimates alone would choose then."""

    link: str
    family: str
    options: list[Option]
    choice: Option | None
    without_proof: Option | None


@dataclass(frozen=True)
class Advice:
    """What was asked, and an answer for each link and family of loads."""

    asked: Asked
    floor: float
    model: str
    answers: list[Answer]

    @property
    def complete(self) -> bool:
        """Whether each link has a setting that carries it."""
        return all(answer.choice for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        answers = []
        for answer in self.answers:
            options = [
                {**asdict(o), "carries": o.carries(self.asked.p), "quality_too_low": o.too_low(self.floor)}
                for o in answer.options
            ]
            named = {
                key: None if option is None else option.name
                for key, option in (("choice", answer.choice), ("without_proof", answer.without_proof))
            }
            answers.append({"link": answer.link, "family": answer.family, **named, "options": options})
        about = {"asked": asdict(self.asked), "quality_floor": self.floor, "model": self.model}
        return plain(about | {"answers": answers})


def recommend(run: Run, asked: Asked, floor: float = settings.QUALITY_FLOOR) -> Advice:
    """The advice from this run's loads. Raises UsageError where it has none of the kind that is asked for."""
    run = run.require()
    every = loads.served(run)
    if not every:
        raise UsageError(
            f"{run.path}: nothing was asked under a load; write one, such as load: closed(clients=8), or ask for a link: "
            "--rate 40mbit --delay 20ms"
        )
    groups: dict[tuple[str, str], list[Option]] = {}
    for curve in loads.curves(every):
        first = curve[0]
        if first.closed == asked.closed:
            groups.setdefault((first.panel, first.family), []).append(_option(curve, asked))
    if not groups:
        other = "--requests 4/s" if asked.closed else "--clients 8"
        what = "closed loop of clients" if asked.closed else "load of so many requests a second"
        raise UsageError(f"{run.path}: has no {what}; ask for {other}")
    answers = [_answer(*key, options, asked, floor) for key, options in groups.items()]
    return Advice(asked, floor, ", ".join(map(str, run.attempts["model"].unique())), answers)


def _answer(link: str, family: str, options: list[Option], asked: Asked, floor: float) -> Answer:
    options = sorted(options, key=lambda o: (-o.capacity.value, -o.within.value))
    held = [o for o in options if not o.too_low(floor)]
    choice = next((o for o in held if o.carries(asked.p)), None)
    seeming = None if choice else next((o for o in held if o.seems_to(asked.p)), None)
    return Answer(link, family, options, choice, seeming)


def _option(curve: Sequence[Served], asked: Asked) -> Option:
    within, tail, known, extrapolated = _at(curve, asked)
    rows = settings.finished(pd.concat([each.rows for each in curve]))
    # A request's answer is its example's, however often that was asked.
    rows = rows.drop_duplicates(["task", "example", "codec"])
    quality, exact = settings.kept_quality(rows) if len(rows) else (stats.NOTHING, False)
    return Option(
        curve[0].setting,
        curve[0].serving,
        within,
        tail,
        loads.capacity(curve, asked.deadline_s, asked.p),
        known,
        extrapolated,
        quality,
        exact,
    )


def _at(curve: Sequence[Served], asked: Asked) -> tuple[stats.Estimate, stats.Estimate, str, str]:
    """The share in time at the asked load, the tail where it was measured, how that is known, and whether it lies outside.

    Between two loads a straight line. More load is never served better: below the lightest the share is at least that one's,
    above the heaviest at most that one's; what it is there nobody knows, so it shows nothing but that.
    """
    unit = " clients" if asked.closed else "/s"
    for each in curve:
        if math.isclose(asked.at, each.nominal):
            found = each.within(asked.deadline_s), each.first_token(asked.p)
            return *found, f"measured at {each.nominal:.3g}{unit}", ""
    first, last = curve[0], curve[-1]
    if asked.at < first.at:
        share = first.within(asked.deadline_s)
        said = f"lighter than {first.at:.3g}{unit}, the lightest measured: at least its share"
        return stats.Estimate(share.value, share.low, 1.0, share.n), stats.NOTHING, said, said
    if asked.at > last.at:
        share = last.within(asked.deadline_s)
        said = f"heavier than {last.at:.3g}{unit}, the heaviest measured: at most its share"
        return stats.Estimate(math.nan, 0.0, share.high, share.n), stats.NOTHING, said, said
    left, right = next((a, b) for a, b in pairwise(curve) if a.at <= asked.at <= b.at)
    weight = (asked.at - left.at) / (right.at - left.at)
    ends = [each.within(asked.deadline_s) for each in (left, right)]
    value, low, high = (
        (1 - weight) * a + weight * b for a, b in zip(*((e.value, e.low, e.high) for e in ends), strict=True)
    )
    share = stats.Estimate(value, low, high, min(e.n for e in ends))
    return share, stats.NOTHING, f"between {left.at:.3g} and {right.at:.3g}{unit}", ""


def text(advice: Advice, width: int | None = None) -> str:
    """The advice for the terminal, in lines of `width` characters at most; of each link last what to use."""
    asked = advice.asked
    heading = f"{advice.model} · {asked.text()} · none whose quality is surely below {advice.floor:.0%} of the full cache's"
    note = (
        "* chosen: of those shown to carry it, the one with the largest capacity; + carries it, too; "
        "brackets: 95 % intervals by batch means of requests, which wait for each other; n: requests"
    )
    parts = [layout.sentences(heading, width, "  "), layout.sentences(note, width, "  ")]
    for answer in advice.answers:
        family = f" · {answer.family}" if asked.closed else ""
        verdict = (layout.sentences(line, width, "  ") for line in _verdict(answer, asked))
        parts.append(
            "\n".join([f"{answer.link}{family}", _table(answer, asked, advice.floor, width), *verdict])
        )
    return "\n\n".join(parts)


def _table(answer: Answer, asked: Asked, floor: float, width: int | None) -> str:
    carried = "clients at most" if asked.closed else "requests/s at most"
    header = ["", "setting", "in time", f"p{100 * asked.p:g}", carried, "quality of full", "n", "known by"]
    rows = [_line(option, answer, asked, floor) for option in answer.options]
    return layout.table(rows, header, width, texts=(0, 1, 7), indent=1)


def _line(option: Option, answer: Answer, asked: Asked, floor: float) -> list[str]:
    mark = "*" if option is answer.choice else "+" if option.carries(asked.p) else ""
    share = option.within
    inside = "-" if math.isnan(share.value) else f"{share.value:.1%}"
    inside += f" [{share.low:.1%}, {share.high:.1%}]" if math.isfinite(share.low) else ""
    tail = f"{option.tail_s.value:.3f} s" if math.isfinite(option.tail_s.value) else "-"
    quality = "exact" if option.exact else option.quality.text()
    low = " (quality too low)" if option.too_low(floor) else ""
    known = f"extrapolated: {option.known}" if option.extrapolated else option.known
    return [mark, option.name, inside, tail, option.capacity.text(), quality, str(share.n), known + low]


def _verdict(answer: Answer, asked: Asked) -> list[str]:
    if choice := answer.choice:
        beyond = f" (extrapolated: {choice.extrapolated})" if choice.extrapolated else ""
        return [f"use {choice.name}: at least {choice.within.low:.1%} in time by its interval{beyond}"]
    lines = [f"no setting is shown to carry {asked.text()}"]
    if other := answer.without_proof:
        lines.append(
            f"{other.name} ({other.within.value:.1%} in time) seems to: {other.within.n} requests are too few to show it"
        )
    if any(
        o.extrapolated and math.isnan(o.within.value) and o.within.high >= asked.p for o in answer.options
    ):
        lines.append("heavier loads than were measured are a guess: run one")
    return lines
