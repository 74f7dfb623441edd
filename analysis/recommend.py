"""Which setting to deploy on a link: the lowest predicted latency among those whose quality is shown to hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from testbed import stats
from testbed.analysis import layout, settings
from testbed.analysis.describe import models, plain
from testbed.analysis.latency_model import (
    HeldOut,
    LatencyModel,
    Link,
    beyond,
    leave_one_out,
    link_of,
    median_error,
    steady,
)
from testbed.analysis.paired_latency import tied
from testbed.analysis.run import Run
from testbed.errors import UsageError
from testbed.experiment.row import SENDING


@dataclass(frozen=True)
class Option:
    """A setting on the asked link. `quality`: its score over the full cache's on the same examples (`stats.kept`);
    `exact`: it is the full cache's by construction, whatever the interval says; `latency_s`, `p95_s`: predicted (or, on
    a measured link, measured) median and 95th percentile, infinite where so many trials failed; `worst`: of several
    tasks the one that keeps least.
    """

    setting: str
    placement: str
    quality: stats.Estimate
    exact: bool
    latency_s: float
    p95_s: float
    failed: int = 0
    trials: int = 0
    worst: settings.Worst | None = None
    #: what of the link lies outside of those that this setting was measured on, though not outside of the run's
    extrapolated: tuple[str, ...] = ()

    def holds(self, floor: float) -> bool:
        """Whether the quality's interval lies at or above the floor."""
        return self.exact or bool(self.quality.low >= floor - 1e-12)

    def seems_to_hold(self, floor: float) -> bool:
        """Whether the estimate alone does."""
        return self.exact or bool(self.quality.value >= floor - 1e-12)


@dataclass(frozen=True)
class Recommendation:
    """What was asked, the options from the fastest on, the choice, and how far the model can be trusted.

    `choice` is None where no setting is shown to hold the floor (within the deadline). `without_proof` is what
    the estimates alone would choose, where that is faster.
    """

    link: Link
    quality_floor: float
    deadline_s: float | None
    model: str
    measured_as: str | None  #: the measured profile that the link equals; None: predicted
    options: list[Option]
    choice: Option | None
    without_proof: Option | None
    held_out: list[HeldOut]
    latency: str = "end-to-end latency"  #: what the latencies are (`Run.latency`)
    beyond_measured: tuple[str, ...] = ()  #: what of the link lies outside of what was measured
    #: on a measured link, what holds too and is not shown to be slower than the choice
    tied: tuple[str, ...] = ()
    no_quality: str = (
        ""  #: why no answer's quality is known: then only what is exact by construction can be chosen
    )

    @property
    def runners_up(self) -> list[Option]:
        """The others that hold the floor and are known to answer, from the fastest on."""
        return [
            o
            for o in self.options
            if o.holds(self.quality_floor) and o is not self.choice and math.isfinite(o.latency_s)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is unknown is None."""
        margin = (
            self.runners_up[0].latency_s - self.choice.latency_s if self.choice and self.runners_up else None
        )
        held_out = {"median_error": median_error(self.held_out), "profiles": list(map(asdict, self.held_out))}
        own = {"margin_s": margin, "held_out": held_out, "options": [self._plain(o) for o in self.options]}
        chosen = {"choice": self._plain(self.choice), "without_proof": self._plain(self.without_proof)}
        return plain(asdict(self) | own | chosen)

    def _plain(self, option: Option | None) -> dict[str, Any] | None:
        if option is None:
            return None
        outside = [*self.beyond_measured, *option.extrapolated] if option.placement != "edge" else []
        return asdict(option) | {"holds": option.holds(self.quality_floor), "extrapolated": outside}


def recommend(
    run: Run, link: Link, floor: float = settings.QUALITY_FLOOR, deadline_s: float | None = None
) -> Recommendation:
    """The recommendation from this run's rows made one behind the other. Raises UsageError where there are none."""
    run = run.require().alone
    if run.untimed:
        raise UsageError(
            f"{run.path}: {run.untimed}, and a recommendation is the fastest that keeps the quality; run it over a link, or see "
            f"what keeps the quality with  testbed report {run.path}"
        )
    if run.rows.empty:
        raise UsageError(
            f"{run.path}: all its requests are under a load; ask for a number of clients, or of requests a second: "
            "--clients 8 --deadline 1s"
        )
    rows = settings.labelled(run.attempts)
    panel = _same_link(settings.finished(rows), link)
    outside = () if panel else tuple(beyond(settings.finished(rows), link))
    options = _options(rows, panel, link, outside)
    in_time = [o for o in options if deadline_s is None or o.latency_s <= deadline_s]
    able = [o for o in in_time if math.isfinite(o.latency_s)]
    choice = next((o for o in able if o.holds(floor)), None)
    seeming = next((o for o in able if o.seems_to_hold(floor)), None)
    likely = [o.setting for o in options if o.seems_to_hold(floor)]
    level: list[str] = []
    if panel and choice:
        held = [o.setting for o in able if o.holds(floor)]
        level = tied(rows[rows["panel"] == panel], choice.setting, held)
    return Recommendation(
        link=link,
        quality_floor=floor,
        deadline_s=deadline_s,
        model=models(rows),
        measured_as=panel,
        options=options,
        choice=choice,
        without_proof=seeming if seeming is not choice else None,
        held_out=leave_one_out(run.rows, likely),
        latency=run.latency,
        beyond_measured=outside,
        tied=tuple(level),
        no_quality=settings.no_quality(settings.finished(rows)),
    )


def _own_reach(rows: pd.DataFrame, link: Link, outside: Sequence[str]) -> tuple[str, ...]:
    """What of the link lies outside of those that a setting's rows crossed, beside what lies `outside` of the run's."""
    crossed = rows[rows["placement"] != "edge"]
    if crossed.empty or steady(settings.finished(crossed)).empty:
        return ()
    return tuple(p for p in beyond(settings.finished(crossed), link, refuse=False) if p not in outside)


def _options(rows: pd.DataFrame, panel: str | None, link: Link, outside: Sequence[str]) -> list[Option]:
    """Every setting that was tried, from the fastest on; on a measured `panel` as it was measured there."""
    alike = dict(iter(settings.common(rows).groupby("setting", sort=False)))
    here = rows if panel is None else rows[rows["panel"] == panel]
    predicted = LatencyModel.fit(rows).predict(link) if panel is None else None
    options = []
    for name, own in here.groupby("setting", sort=False):
        times = settings.latencies(own)
        compared = alike.get(name, rows.iloc[:0])
        failed = own["failed"].astype(bool)
        if predicted is None:
            tail = stats.quantile(times, 0.95).value
            middle = float(times.median())
        else:
            middle, tail = (
                float(predicted[c].get(name, math.inf)) if failed.mean() <= share else math.inf
                for c, share in (("e2e_s", 0.5), ("p95_s", 0.05))
            )
        quality, exact = settings.kept_quality(compared) if len(compared) else (stats.NOTHING, False)
        options.append(
            Option(
                setting=str(name),
                placement=str(own["placement"].iloc[0]),
                quality=quality,
                exact=exact,
                latency_s=middle,
                p95_s=tail,
                failed=int(failed.sum()),
                trials=len(own),
                worst=settings.worst_task(compared),
                extrapolated=() if predicted is None else _own_reach(own, link, outside),
            )
        )
    return sorted(options, key=lambda o: o.latency_s)


def _same_link(rows: pd.DataFrame, link: Link) -> str | None:
    """The measured profile with these conditions; None where there is none."""
    for panel, own in steady(rows).groupby("panel", sort=False):
        there = link_of(own)
        near = (
            (there.rate_up_bps, link.rate_up_bps, 0.01),
            (there.delay_up_s + there.delay_down_s, link.rtt_s, 0.01),
            (there.loss_up, link.loss_up, 0.05),
        )
        if all(math.isclose(a, b, rel_tol=t) for a, b, t in near):
            return str(panel)
    return None


def examples_needed(floor: float) -> int | None:
    """How many examples, none of them changed, show that a floor holds; None for a floor of 1."""
    if floor >= 1:
        return None
    return math.ceil(math.log((1 - stats.CONFIDENCE) / 2) / math.log(floor))


def text(advice: Recommendation, width: int | None = None) -> str:
    """The recommendation for the terminal, in lines of `width` characters at most; last what to use."""
    question = f"{advice.link.text()} · quality at least {advice.quality_floor:.0%} of the full cache's"
    if advice.deadline_s is not None:
        question += f" · within {advice.deadline_s:g} s"
    source = (
        f"latencies measured on {advice.measured_as}"
        if advice.measured_as
        else "latencies predicted by the model fitted to this run"
    )
    if advice.latency != "end-to-end latency":
        source += f"; latency is the {advice.latency}: answers to the same question differ in length"
    lines = [f"{advice.model} · {question}", source]
    lines += [f"extrapolated, {option}" for option in advice.beyond_measured]
    notes = [
        "* chosen; + its quality holds too; = and it is not shown to be slower; exact: the full cache's answers by construction; "
        "brackets: 95 % interval of what "
        "is kept of the full cache's score (Gaffke's bound of the paired losses); n: examples"
    ]
    unknown = [o.setting for o in advice.options if math.isinf(o.latency_s) and not o.failed]
    if unknown and not advice.measured_as:
        notes.append(f"not predicted, since what they do on another link is not known: {', '.join(unknown)}")
    parts = [lines, [_table(advice, width)], [*notes, *_trust(advice)], _verdict(advice)]
    return "\n\n".join(
        "\n".join(line if part is parts[1] else layout.sentences(line, width, "  ") for line in part)
        for part in parts
    )


def _table(advice: Recommendation, width: int | None) -> str:
    rows = []
    for option in advice.options:
        mark = "*" if option is advice.choice else "=" if option.setting in advice.tied else ""
        mark = "+" if not mark and option.holds(advice.quality_floor) else mark
        notes = [option.worst.text()] if option.worst and not option.exact else []
        notes += [f"failed {option.failed} of {option.trials}"] if option.failed else []
        notes += [f"extrapolated, {phrase}" for phrase in option.extrapolated]
        quality = "exact" if option.exact else option.quality.text()
        times = [_time(option.latency_s), _time(option.p95_s)]
        rows.append([mark, option.setting, str(option.quality.n), *times, quality, "  ".join(notes)])
    header = ["", "setting", "n", "latency", "p95", "quality of full", "worst task"]
    return layout.table(rows, header, width, texts=(0, 1, 6), indent=1)


def _time(value: float) -> str:
    return f"{value:.3f} s" if math.isfinite(value) else "none"


def _verdict(advice: Recommendation) -> list[str]:
    lines = []
    if advice.no_quality:
        lines.append(f"{advice.no_quality}: only what is the full cache's by construction can be chosen")
    if advice.choice is None:
        lines.append("no setting is shown to hold the quality" + (" in time" if advice.deadline_s else ""))
    else:
        lines.append(
            f"use {advice.choice.setting}: {advice.choice.latency_s:.3f} s{_flag(advice.choice, advice)}"
        )
        if advice.runners_up:
            other = advice.runners_up[0]
            margin = other.latency_s / advice.choice.latency_s - 1
            lines.append(
                f"next: {other.setting}, {other.latency_s:.3f} s{_flag(other, advice)} "
                f"({other.latency_s - advice.choice.latency_s:+.3f} s, {margin:+.0%})"
            )
        if advice.tied:
            lines.append(f"not shown to be slower than it, example by example: {', '.join(advice.tied)}")
    sending = next((o for o in [advice.choice, *advice.runners_up] if o and o.placement in SENDING), None)
    if sending is not None and sending is not advice.choice:
        lines.append(
            f"of the settings that send KV: {sending.setting}, {sending.latency_s:.3f} s{_flag(sending, advice)}"
        )
    if advice.without_proof is not None:
        other = advice.without_proof
        lines.append(
            f"{other.setting} ({other.latency_s:.3f} s) keeps {other.quality.value:.0%} as far as its {other.quality.n} "
            "examples go, which are too few to show it"
        )
        needed = examples_needed(advice.quality_floor)
        if needed is not None:
            lines[-1] += f" (at least {needed}, none of them changed, would)"
    return lines


def _flag(option: Option, advice: Recommendation) -> str:
    """Behind a latency: what of it lies outside of what was measured."""
    outside = [*advice.beyond_measured, *option.extrapolated] if option.placement != "edge" else []
    return f" (extrapolated: {'; '.join(outside)})" if outside else ""


def _trust(advice: Recommendation) -> list[str]:
    if not advice.held_out:
        return ["the run has one link only: the model's error on other links is unknown"]
    cells = sum(len(h.errors) for h in advice.held_out)
    lossy = [h for h in advice.held_out if h.loss_up > 0 and h.errors]
    right = sum(h.chosen_within <= 0.05 for h in advice.held_out)
    sent = sum(h.sending_within <= 0.05 for h in advice.held_out)
    count = len(advice.held_out)
    lines = []
    if advice.beyond_measured:
        errors = [abs(e) for h in advice.held_out for e in h.errors.values()]
        worst = f" (worst within: {max(errors):.0%})" if errors else ""
        lines = [f"this link lies outside of what was measured: the error there is unknown{worst}"]
    if advice.link.loss_up > 0 and not advice.measured_as:
        error = f"{median_error(lossy):.0%} over {len(lossy)} of them" if lossy else "unknown"
        lines.append(
            f"on links with loss, where a request's time is a matter of luck, the model's median error is {error}"
        )
    error = (
        f"median error {median_error(advice.held_out):.1%} over {cells} cells" if cells else "unknown error"
    )
    return [
        *lines,
        f"the model on links it was not fitted to: {error} of "
        f"{count} profiles; its choice is within 5 % of the measured best on {right} of {count} "
        f"({sent} of {count} among settings that send KV)",
    ]


def held_out_table(held_out: list[HeldOut]) -> str:
    """Each held-out cell's relative error (predicted / measured − 1): a line a setting, a column a profile; below them what was
    chosen there and how much slower it is than the measured best.
    """
    settings_ = list(dict.fromkeys(s for link in held_out for s in link.errors))
    wide = max([len(s) for s in settings_] + [len("slower than the best")])
    keys = [chr(ord("A") + i) if i < 26 else str(i) for i in range(len(held_out))]
    lines = ["each profile predicted from the others: predicted / measured latency − 1"]
    lines += [f"  {key}  {link.profile}" for key, link in zip(keys, held_out, strict=True)]
    lines.append("  " + " " * wide + "".join(f"{key:>8}" for key in keys))
    for setting in settings_:
        errors = [link.errors.get(setting, math.nan) for link in held_out]
        lines.append(f"  {setting:<{wide}}" + "".join(f"{_percent(e, sign=True):>8}" for e in errors))
    for name, values in (
        ("slower than the best", [link.chosen_within for link in held_out]),
        ("… among those sent", [link.sending_within for link in held_out]),
    ):
        lines.append(f"  {name:<{wide}}" + "".join(f"{_percent(v):>8}" for v in values))
    return "\n".join(lines)


def _percent(value: float, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:+.1%}" if sign else f"{value:.1%}"
