"""The published claims put to these runs: which hold, which fail, and which the rows cannot decide."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pandas as pd

from analysis import claim_rules as rules
from analysis.claim_evidence import Evidence, collect
from analysis.claim_rules import UNDECIDED, Verdict
from analysis.figures.retention import split_selection
from analysis.run import Run

#: The mean ΔNLL, in nats a token, up to which a codec may stand for the full cache against sending the text.
WORTH_LOSS = 0.05
#: What `mixed(scale=token)` is without protection.
INT4_BY_TOKEN = "int4(group=0, symmetric=true)"
_TIMES = rules.LEAST_TIMES

_AWARE = re.compile(r"question=(true|True|1)")
_DELTA = re.compile(r"delta(\([^)]*\))?\+(.+)")
_PROTECT = re.compile(r"protect=[^,)]*(, )?")
_CODERS = re.compile(r"\+(zstd|ans|range|huffman|ac|rans)[^+]*$")


@dataclass(frozen=True)
class Claim:
    """One claim: its name, what was published, its rule in words, what judges it, and below how many examples it
    decides nothing.
    """

    name: str
    published: str
    rule: str
    judge: Callable[[Evidence], Iterator[Verdict]]
    least: int = rules.LEAST


def judge(runs: list[Run]) -> tuple[list[tuple[Claim, list[Verdict]]], list[str]]:
    """Every claim with its verdicts (none: the runs have no rows for it), and what was left out."""
    evidence, said = collect(runs)
    return [(claim, rules.corrected(list(claim.judge(evidence)))) for claim in CLAIMS], said


def _forms(table: pd.DataFrame, name: str, aware: bool | None = None) -> Iterator[tuple[str, float, str]]:
    """(setting, ratio, rest of the codec) of every form of a selector; `aware`: of those that saw the question, or not."""
    for setting in table["setting"].unique():
        found = split_selection(str(setting))
        if found is None or found[0].split("(")[0] != name:
            continue
        if aware is None or bool(_AWARE.search(found[0])) == aware:
            yield str(setting), found[1], found[2]


def _selector(
    claim: str, other: str, aware: bool, ratio: float = 0.25
) -> Callable[[Evidence], Iterator[Verdict]]:
    """Each form of Q2C against another selector at one ratio, with the same rest of the codec."""

    def judged(evidence: Evidence) -> Iterator[Verdict]:
        for model, task, table in evidence.parts():
            for ours, kept, rest in _forms(table, "q2c"):
                for theirs, *same in _forms(table, other, aware):
                    if kept == ratio and same == [kept, rest]:
                        yield rules.better(claim, table, model, task, ours, theirs)

    return judged


def _int8(evidence: Evidence) -> Iterator[Verdict]:
    for model, task, table in evidence.parts():
        for setting in table["setting"].unique():
            if re.fullmatch(r"int8(\([^)]*\))?", str(setting)):
                yield rules.lossless("int8-lossless", table, model, task, str(setting))


def _fragile(evidence: Evidence) -> Iterator[Verdict]:
    known = {str(s) for t in evidence.tables.values() for s in t["setting"].unique()}
    for setting in sorted(s for s in known if re.fullmatch(r"int4(\([^)]*\))?", s)):
        having = [m for m, t in evidence.tables.items() if setting in set(t["setting"])]
        for models in itertools.combinations(having, 2):
            found = rules.differs_between_models("int4-fragility", evidence.tables, setting, models)
            if found is not None:
                yield found


def _protected(evidence: Evidence) -> Iterator[Verdict]:
    """Among settings that differ in `protect` alone, the scenario names the diagnosed protection first; the others are its
    controls. All are judged against INT4 with scales of the same kind.
    """
    for model, task, table in evidence.parts():
        alike: dict[str, list[str]] = {}
        for setting in map(str, table["setting"].unique()):
            if setting.startswith("mixed(") and "protect=none" not in setting:
                alike.setdefault(_PROTECT.sub("", setting), []).append(setting)
        for rest, (first, *others) in alike.items():
            plain = INT4_BY_TOKEN if "scale=token" in rest else "int4"
            if others:
                yield rules.restored("protected-layer", table, model, task, plain, first, others)


def _delta(evidence: Evidence) -> Iterator[Verdict]:
    for model, task, table in evidence.parts():
        known = list(table["setting"].unique())
        for setting in known:
            match = _DELTA.fullmatch(str(setting))
            if match and match[2] in known:
                yield rules.worse("delta-hurts", table, model, task, str(setting), match[2])


def _coded(evidence: Evidence) -> Iterator[Verdict]:
    for model, rows in evidence.by_model():
        known = list(rows["setting"].unique())
        for setting in known:
            plain = _CODERS.sub("", str(setting))
            if plain != setting and plain in known:
                found = rules.saving(rows, str(setting), plain)
                yield rules.threshold(
                    "entropy-coding-saves", model, f"{setting} against {plain}", found, 0.2, "saves {:.1%} {}"
                )


def _spread(evidence: Evidence) -> Iterator[Verdict]:
    for model, rows in evidence.by_model():
        known = list(rows["setting"].unique())
        for setting in known:
            match = _DELTA.fullmatch(str(setting))
            if match and match[2] in known and _CODERS.search(match[2]):
                found = rules.saving(rows, str(setting), match[2])
                what = f"bytes of {setting} against {match[2]}"
                yield rules.threshold(
                    "delta-spreads", model, what, found, 0.0, "the delta saves {:.1%} {}", below=True
                )


def _dominates(evidence: Evidence) -> Iterator[Verdict]:
    for model, rows in evidence.by_model():
        for panel, own in rows[rows["setting"] == "fp16"].groupby("panel", sort=False):
            found = rules.transmission_share(own)
            figure = "transmission takes {:.2g} times the compute stages {}"
            yield rules.threshold(
                "transmission-dominates", model, f"fp16 on {panel}", found, 1.0, figure, examples=_TIMES
            )


def _free(evidence: Evidence) -> Iterator[Verdict]:
    for model, rows in evidence.by_model():
        chosen = rows[rows["codec"].str.startswith("q2c@")]
        for (setting, task), own in chosen.groupby(["setting", "task"], sort=False):
            found = rules.geometric(own["select_s"] / own["prefill_s"], own)
            figure = "selection takes {:.2g} of the prefill {}"
            verdict = rules.threshold(
                "q2c-free", model, str(setting), found, 0.05, figure, below=True, examples=_TIMES
            )
            yield replace(verdict, task=str(task))


def _worth(evidence: Evidence) -> Iterator[Verdict]:
    for model in evidence.tables:
        for panel, own in evidence.of(model).groupby("panel", sort=False):
            best = _fastest_alike(own[own["placement"] == "split"])
            if best is None or "cloud" not in set(own["setting"]):
                continue
            times = own.groupby(["setting", "task", "example"])["e2e_s"].median()
            pair = pd.DataFrame({"kv": times[best], "text": times["cloud"]}).dropna().reset_index()
            found = rules.geometric(pair["kv"] / pair["text"], pair)
            what = f"{best} against sending the text, on {panel}"
            figure = "takes {:.2g} times as long {}"
            yield rules.threshold(
                "kv-worth-sending", model, what, found, 1.0, figure, below=True, examples=_TIMES
            )


def _fastest_alike(rows: pd.DataFrame) -> str | None:
    """The setting with the lowest median latency of those whose mean ΔNLL is small; None where none is."""
    rows = rows.assign(lost=rows["nll"] - rows["reference_nll"])
    found = rows.groupby("setting")[["lost", "e2e_s"]].agg({"lost": "mean", "e2e_s": "median"})
    found = found[found["lost"] <= WORTH_LOSS]
    return str(found["e2e_s"].idxmin()) if len(found) else None


def _grows(evidence: Evidence) -> Iterator[Verdict]:
    for model, table in evidence.tables.items():
        for ours, *kept in _forms(table, "q2c"):
            for theirs, *same in _forms(table, "snapkv"):
                found = rules.slope("q2c-grows", table, model, ours, theirs) if same == kept else None
                if found is not None:
                    yield found


CLAIMS = (
    Claim(
        "q2c-over-snapkv",
        "+29 to +47 % of task score at 25 %",
        "Q2C's NLL below question-agnostic SnapKV's",
        _selector("q2c-over-snapkv", "snapkv", False),
    ),
    Claim(
        "q2c-over-snapkv-aware",
        "(not separated)",
        "Q2C's NLL below that of a SnapKV that saw the question",
        _selector("q2c-over-snapkv-aware", "snapkv", True),
    ),
    Claim(
        "q2c-over-h2o",
        "+92 to +128 % of task score at 25 %",
        "Q2C's NLL below H2O's",
        _selector("q2c-over-h2o", "h2o", False),
    ),
    Claim("int8-lossless", "100 % of the full cache's score", "ΔNLL at most 0.02 nats/token", _int8),
    Claim(
        "int4-fragility",
        "Yi-6B keeps 100 %, Qwen-7B 77 %",
        "two models' ΔNLL surely apart by more than 0.02",
        _fragile,
    ),
    Claim(
        "protected-layer",
        "INT4 lossless at 3.6× smaller",
        "int4 loses; protected, ΔNLL at most 0.02 and below that of other layers'",
        _protected,
    ),
    Claim("delta-hurts", "−5.6 to −14.0 points", "NLL above the same quantizer's without delta", _delta),
    Claim(
        "delta-spreads",
        "7.94 against 6.13 bits",
        "more bytes than without delta after entropy coding",
        _spread,
    ),
    Claim(
        "transmission-dominates",
        "43 × the compute stages",
        "fp16: transmission longer than all compute",
        _dominates,
        _TIMES,
    ),
    Claim("q2c-free", "no extra compute", "selection at most 5 % of the prefill", _free, _TIMES),
    Claim(
        "q2c-grows",
        "(expected) advantage grows with context",
        "Q2C's NLL advantage grows with each doubling of the context",
        _grows,
    ),
    Claim(
        "entropy-coding-saves", "(expected) 20–30 % of bandwidth", "payload smaller by at least 20 %", _coded
    ),
    Claim(
        "kv-worth-sending",
        "(the deciding baseline)",
        "the fastest KV whose ΔNLL is at most 0.05 beats sending the text",
        _worth,
        _TIMES,
    ),
)


def text(found: list[tuple[Claim, list[Verdict]]], said: list[str]) -> str:
    """The verdicts for the terminal."""
    lines = []
    for claim, verdicts in found:
        lines.append(f"{claim.name} · published: {claim.published} · rule: {claim.rule}")
        if not verdicts:
            lines.append(f"  {UNDECIDED:<9}  these runs have no rows for it")
        for one in verdicts:
            where = one.model + (f" · {one.task}" if one.task else "")
            few = f" (fewer than {claim.least})" if one.n < claim.least else ""
            lines.append(f"  {one.verdict:<9}  {where} · {one.what}: {one.figures} · n = {one.n}{few}")
        lines.append("")
    return "\n".join([*lines, *said]).rstrip()


def table(found: list[tuple[Claim, list[Verdict]]], said: list[str]) -> str:
    """The verdicts as a Markdown table, for a page that records them; claims without rows are left away."""
    lines = ["| claim | model, task | compared | verdict | n | figures |", "|---|---|---|---|--:|---|"]
    for claim, verdicts in found:
        for one in verdicts:
            where = one.model + (f", `{one.task}`" if one.task else "")
            cells = (f"`{claim.name}`", where, one.what, one.verdict, str(one.n), one.figures)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, *(f"\n{sentence}." for sentence in said)])


def to_dict(found: list[tuple[Claim, list[Verdict]]], said: list[str]) -> dict[str, object]:
    """Plain values for JSON."""
    claims = [
        {
            "claim": claim.name,
            "published": claim.published,
            "rule": claim.rule,
            "verdicts": [{k: v for k, v in asdict(one).items() if k != "values"} for one in verdicts],
        }
        for claim, verdicts in found
    ]
    return {"claims": claims, "left_out": said}
