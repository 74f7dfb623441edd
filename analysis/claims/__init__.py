"""The published claims put to these runs: which hold, which fail, and which the rows cannot decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from testbed.analysis import layout
from testbed.analysis.claims import allocation, capacity, judges, rules
from testbed.analysis.claims.pool import Pool, collect
from testbed.analysis.claims.rules import UNDECIDED, Verdict
from testbed.analysis.run import Run


@dataclass(frozen=True)
class Claim:
    """One claim: its name, its number in the study (-: not of it), what was published, its rule in words, what judges it, and
    below how many examples it decides nothing.
    """

    name: str
    number: str
    published: str
    rule: str
    judge: Callable[[Pool], Iterator[Verdict]]
    least: int = rules.LEAST


def judge(runs: list[Run]) -> tuple[Judged, list[str]]:
    """Every claim with its verdicts (none: the runs have no rows for it), and what was left out. Raises as `collect` does."""
    pool, left_out = collect(runs)
    return [(claim, rules.corrected(list(claim.judge(pool)))) for claim in CLAIMS], left_out


_ALL = "a form of Q2C has a lower NLL than {}, the rest of the codec equal"

CLAIMS = (
    Claim(
        "q2c-over-snapkv-published",
        "1",
        "+29 to +47 % of task score at 25 %",
        _ALL.format("SnapKV, both as published"),
        judges.selector("snapkv", published=True),
    ),
    Claim(
        "q2c-over-snapkv",
        "1",
        "the same, for this testbed's own forms",
        _ALL.format("a SnapKV that did not see the question"),
        judges.selector("snapkv", aware=False),
    ),
    Claim(
        "q2c-over-snapkv-aware",
        "1",
        "(not asked)",
        _ALL.format("a SnapKV that saw the question alone"),
        judges.selector("snapkv", aware=True),
    ),
    Claim(
        "q2c-over-h2o-published",
        "2",
        "+92 to +128 % of task score at 25 %",
        _ALL.format("H2O, both as published"),
        judges.selector("h2o", published=True),
    ),
    Claim(
        "q2c-over-h2o",
        "2",
        "the same, for this testbed's own forms",
        _ALL.format("H2O"),
        judges.selector("h2o"),
    ),
    Claim(
        "int8-lossless",
        "3",
        "at least 99 % of the full cache's score",
        f"ΔNLL at most 0.02 nats/token, and at most {rules.MOST_LOST:.0%} of examples lose more than {rules.LOST}",
        judges.int8,
    ),
    Claim(
        "int4-fragility",
        "4",
        "Yi-6B keeps 100 %, Qwen-7B 77 %",
        "two models' ΔNLL surely apart by more than 0.02",
        judges.fragile,
    ),
    Claim(
        "protected-layer",
        "5",
        "where few layers are to blame, one at 16 bits makes INT4 lossless",
        "int4 loses; protected, it is lossless and better than with other layers protected",
        judges.protected,
    ),
    Claim(
        "protected-layer-distributed",
        "5",
        "where the damage is spread, protecting a layer does nothing",
        "protected and plain INT4 alike, within 0.02",
        judges.unprotected,
    ),
    Claim(
        "delta-hurts",
        "6",
        "−5.6 to −14.0 points",
        "NLL above the same quantizer's without delta",
        judges.delta,
    ),
    Claim(
        "delta-spreads",
        "7",
        "7.94 against 6.13 bits of a packed byte",
        "more bytes than without delta after entropy coding",
        judges.spread,
    ),
    Claim(
        "transmission-dominates",
        "8",
        "43 × prefill and quantization (a 14B model at 100 Mbit/s)",
        "fp16: transmission longer than prefill and quantization",
        judges.dominates,
        rules.LEAST_TIMES,
    ),
    Claim(
        "q2c-free",
        "9",
        "no compute beside the prefill of context and question",
        "selection at most 5 % of the prefill of context and question",
        judges.free,
        rules.LEAST_TIMES,
    ),
    Claim(
        "q2c-grows",
        "10",
        "(expected) advantage grows with context",
        "Q2C's NLL advantage grows with each doubling of the context",
        judges.grows,
    ),
    Claim(
        "int4-grows",
        "10",
        "a fragile model's 71 % at 512 tokens are 42 % at 4,096",
        "INT4's ΔNLL grows with each doubling of the context",
        judges.damage_grows,
    ),
    Claim(
        "entropy-coding-saves",
        "11",
        "(expected) 20–30 % of bandwidth",
        "payload smaller by at least 20 %",
        judges.coded,
    ),
    Claim(
        "guide-loses-nothing",
        "15",
        "robust: INT4; few layers: these at 16 bits; spread: INT8",
        f"what the guide names for the model's diagnosis: ΔNLL at most 0.02 nats/token, and at most {rules.MOST_LOST:.0%} of "
        f"examples lose more than {rules.LOST}",
        judges.guided,
    ),
    Claim(
        "scout-overlap",
        "16",
        "84 to 92 % of the tokens at 75 %, from a small model of the same family",
        f"at {judges.SCOUTED:.0%} Q2C chooses at least {judges.SHARED:.0%} of what it chooses for the model that answers",
        judges.scouts,
    ),
    Claim(
        "model-aware-meets-deadlines",
        "16",
        "0 % of deadlines met become 100 %, 2 to 8 agents in one cell",
        f"surely {allocation.MOST:.0%} of rounds have all first tokens within {allocation.SLACK:g} times what their bytes take "
        f"over the cell, and surely at most {allocation.FEW:.0%} under equal reservations",
        allocation.allocation,
        allocation.LEAST,
    ),
    Claim(
        "kv-worth-sending",
        "-",
        "(the deciding baseline)",
        f"the fastest KV whose ΔNLL is at most {judges.WORTH_LOSS} beats sending the text",
        judges.worth,
        rules.LEAST_TIMES,
    ),
    Claim(
        "compression-buys-capacity",
        "-",
        "(expected)",
        f"the largest Poisson rate with {capacity.SHARE:.0%} of first tokens within {capacity.DEADLINE_S:g} s lies above fp16's",
        capacity.capacity,
        capacity.LEAST,
    ),
)

#: What no row can decide, and what does instead.
NOT_YET = (
    (
        "12",
        "incremental Q2C",
        "no placement of a run selects while the context streams in; python -m benchmarks.study_incremental",
    ),
    (
        "13",
        "how architecture and compression compose",
        "bytes: python -m benchmarks.study_composition; answers: no model with a latent cache that answers is at hand",
    ),
    ("14", "loss, 5G and jitter", "a capability, not a claim: scenarios/5g.yaml measures it"),
)


Judged = list[tuple[Claim, list[Verdict]]]


def text(judged: Judged, left_out: list[str], width: int | None = None) -> str:
    """The verdicts for the terminal, in lines of `width` characters at most."""
    lines: list[str] = []
    for claim, verdicts in judged:
        lines.append(f"{claim.number} {claim.name} · published: {claim.published} · rule: {claim.rule}")
        if not verdicts:
            lines.append(f"  {UNDECIDED:<9}  these runs have no rows for it")
        for verdict in verdicts:
            where = verdict.model + (f" · {verdict.task}" if verdict.task else "")
            few = f" (fewer than {claim.least})" if verdict.n < claim.least else ""
            figures = f"{verdict.what}: {verdict.figures} · n = {verdict.n}{few}"
            lines.append(f"  {verdict.verdict:<9}  {where} · {figures}")
        lines.append("")
    lines += [f"{number} {what} · not testable here: {why}" for number, what, why in NOT_YET]
    return "\n".join(layout.sentences(line, width, "  ") for line in [*lines, "", *left_out]).rstrip()


def table(judged: Judged, left_out: list[str]) -> str:
    """The verdicts as a Markdown table, for a page that records them; claims without rows are left away."""
    lines = ["| claim | model, task | compared | verdict | n | figures |", "|---|---|---|---|--:|---|"]
    for claim, verdicts in judged:
        for verdict in verdicts:
            where = verdict.model + (f", `{verdict.task}`" if verdict.task else "")
            cells = (f"`{claim.name}`", where, verdict.what, verdict.verdict, str(verdict.n), verdict.figures)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, *(f"\n{sentence}." for sentence in left_out)])


def to_dict(judged: Judged, left_out: list[str]) -> dict[str, object]:
    """Plain values for JSON."""
    claims = [
        {
            "claim": claim.name,
            "number": claim.number,
            "published": claim.published,
            "rule": claim.rule,
            "verdicts": [
                {"claim": claim.name, **{k: v for k, v in asdict(verdict).items() if k != "values"}}
                for verdict in verdicts
            ],
        }
        for claim, verdicts in judged
    ]
    untested = [{"number": number, "claim": what, "why": why} for number, what, why in NOT_YET]
    return {"claims": claims, "not_testable": untested, "left_out": left_out}
