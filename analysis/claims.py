"""The published claims put to these runs: which hold, which fail, and which the rows cannot decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pandas as pd

from analysis import claim_rules as rules
from analysis import comparisons, settings, stats
from analysis.claim_rules import UNDECIDED, Verdict
from analysis.figures.retention import split_selection
from analysis.run import Run

#: A model and task take part where the full cache's mean score has its 95 % interval above this.
LEAST_REFERENCE = 0.2
LEAST_REFERENCE_CHOICE = 0.35  #: four options: chance is 0.25

_AWARE = re.compile(r"question=(true|True|1)")
_CODERS = re.compile(r"\+(zstd|ans|range|huffman|ac|rans)[^+]*$")


@dataclass(frozen=True)
class Claim:
    """One claim: its name, what was published, its rule in words, and what judges it."""

    name: str
    published: str
    rule: str
    judge: Callable[[Evidence], Iterator[Verdict]]


@dataclass(frozen=True)
class Evidence:
    """The rows of all runs, and by model the examples of the admitted tasks."""

    rows: pd.DataFrame
    tables: dict[str, pd.DataFrame]

    def parts(self) -> Iterator[tuple[str, str, pd.DataFrame]]:
        """(model, task, its examples): all tasks of a model together (an empty task), then each alone."""
        for model, table in self.tables.items():
            yield model, "", table
            tasks = list(table["task"].unique())
            for task in tasks if len(tasks) > 1 else ():
                yield model, str(task), table[table["task"] == task]

    def of(self, model: str) -> pd.DataFrame:
        """A model's rows of admitted tasks."""
        tasks = set(self.tables[model]["task"])
        return self.rows[(self.rows["model"] == model) & self.rows["task"].isin(tasks)]


def collect(runs: list[Run]) -> tuple[Evidence, list[str]]:
    """The evidence of these runs, and a sentence for each model and task that is left out."""
    rows = settings.labelled(pd.concat([run.require().rows for run in runs], ignore_index=True))
    table = comparisons.by_example(rows)
    kept, said = [], []
    for (model, task), own in table.groupby(["model", "task"], sort=False):
        found = stats.mean(own["reference_score"], own["example"], bounds=(0.0, 1.0))
        least = LEAST_REFERENCE_CHOICE if str(task).startswith("choice") else LEAST_REFERENCE
        if found.low > least:
            kept.append(own)
        else:
            said.append(
                f"{model} · {task} is left out: the full cache scores {found.value:.2f} [{found.low:.2f}, "
                f"{found.high:.2f}] (n = {found.n}), not surely above {least}"
            )
    whole = pd.concat(kept) if kept else table.iloc[:0]
    tables = {str(m): own for m, own in whole.groupby("model", sort=False)}
    return Evidence(rows, tables), said


def judge(runs: list[Run]) -> tuple[list[tuple[Claim, list[Verdict]]], list[str]]:
    """Every claim with its verdicts (none: the runs have no rows for it), and what was left out."""
    evidence, said = collect(runs)
    return [(claim, rules.corrected(list(claim.judge(evidence)))) for claim in CLAIMS], said


def _selector(
    claim: str, other: str, aware: bool, ratio: float = 0.25
) -> Callable[[Evidence], Iterator[Verdict]]:
    """Q2C against another selector at one ratio, with the same rest of the codec."""

    def judged(evidence: Evidence) -> Iterator[Verdict]:
        for model, task, table in evidence.parts():
            known = {s: found for s in table["setting"].unique() if (found := split_selection(str(s)))}
            ours = {f[2]: s for s, f in known.items() if f[0] == "q2c" and f[1] == ratio}
            for setting, (selector, kept, rest) in known.items():
                mine = selector.split("(")[0] == other and bool(_AWARE.search(selector)) == aware
                if mine and kept == ratio and rest in ours:
                    yield rules.better(claim, table, model, task, ours[rest], setting)

    return judged


def _int8(evidence: Evidence) -> Iterator[Verdict]:
    for model, task, table in evidence.parts():
        for setting in table["setting"].unique():
            if re.fullmatch(r"int8(\([^)]*\))?", str(setting)):
                yield rules.lossless("int8-lossless", table, model, task, str(setting))


def _fragile(evidence: Evidence) -> Iterator[Verdict]:
    known = {str(s) for t in evidence.tables.values() for s in t["setting"].unique()}
    for setting in sorted(s for s in known if re.fullmatch(r"int4(\([^)]*\))?", s)):
        found = rules.differs_between_models("int4-fragility", evidence.tables, setting)
        if found is not None:
            yield found


def _protected(evidence: Evidence) -> Iterator[Verdict]:
    """The scenario names the diagnosed protection first; other protections after it are its controls."""
    for model, task, table in evidence.parts():
        known = [str(s) for s in table["setting"].unique() if str(s).startswith("mixed(")]
        known = [s for s in known if "protect=none" not in s]
        for number, setting in enumerate(known):
            if number:
                yield rules.better("protected-layer", table, model, task, known[0], setting)
                continue
            own = table[table["setting"] == setting]
            smaller = float((own["kv_bytes"] / own["payload_bytes"]).mean())
            found = rules.lossless("protected-layer", table, model, task, setting)
            yield replace(found, figures=f"{found.figures}, {smaller:.2f}× smaller with scales counted")


def _delta(evidence: Evidence) -> Iterator[Verdict]:
    for model, task, table in evidence.parts():
        known = list(table["setting"].unique())
        for setting in known:
            match = re.fullmatch(r"delta(\([^)]*\))?\+(.+)", str(setting))
            if match and match[2] in known:
                yield rules.worse("delta-hurts", table, model, task, str(setting), match[2])


def _coded(evidence: Evidence) -> Iterator[Verdict]:
    for model in evidence.tables:
        rows = evidence.of(model)
        known = list(rows["setting"].unique())
        for setting in known:
            plain = _CODERS.sub("", str(setting))
            if plain != setting and plain in known:
                found = rules.saving(rows, str(setting), plain)
                yield rules.threshold(
                    "entropy-coding-saves", model, f"{setting} against {plain}", found, 0.2, "saves {:.1%} {}"
                )


def _spread(evidence: Evidence) -> Iterator[Verdict]:
    for model in evidence.tables:
        rows = evidence.of(model)
        known = list(rows["setting"].unique())
        for setting in known:
            match = re.fullmatch(r"delta(\([^)]*\))?\+(.+)", str(setting))
            if match and match[2] in known and _CODERS.search(match[2]):
                found = rules.saving(rows, str(setting), match[2])
                what = f"bytes of {setting} against {match[2]}"
                yield rules.threshold(
                    "delta-spreads", model, what, found, 0.0, "the delta saves {:.1%} {}", below=True
                )


def _dominates(evidence: Evidence) -> Iterator[Verdict]:
    for model in evidence.tables:
        rows = evidence.of(model)
        for panel, own in rows[rows["setting"] == "fp16"].groupby("panel", sort=False):
            found = rules.transmission_share(own)
            figure = "transmission takes {:.2g} times the compute stages {}"
            yield rules.threshold("transmission-dominates", model, f"fp16 on {panel}", found, 1.0, figure)


def _free(evidence: Evidence) -> Iterator[Verdict]:
    for model in evidence.tables:
        rows = evidence.of(model)
        for setting, own in rows[rows["codec"].str.startswith("q2c@")].groupby("setting", sort=False):
            found = rules.geometric(own["select_s"] / own["prefill_s"], own)
            figure = "selection takes {:.2g} of the prefill {}"
            yield rules.threshold("q2c-free", model, str(setting), found, 0.05, figure, below=True)


def _worth(evidence: Evidence) -> Iterator[Verdict]:
    for model in evidence.tables:
        for panel, own in evidence.of(model).groupby("panel", sort=False):
            full = settings.full_cache_quality(own)
            sending = [m for m in settings.measure(own) if m.placement == "split"]
            best = settings.fastest_that_holds(sending, full)
            if best is None or "cloud" not in set(own["setting"]):
                continue
            keys = ["task", "example"]
            times = own.groupby(["setting", *keys])["e2e_s"].median()
            pair = pd.DataFrame({"kv": times[best.label], "text": times["cloud"]}).dropna().reset_index()
            found = rules.geometric(pair["kv"] / pair["text"], pair)
            what = f"{best.label} against sending the text, on {panel}"
            figure = "takes {:.2g} times as long {}"
            yield rules.threshold("kv-worth-sending", model, what, found, 1.0, figure, below=True)


def _grows(evidence: Evidence) -> Iterator[Verdict]:
    for model, table in evidence.tables.items():
        known = {s: found for s in table["setting"].unique() if (found := split_selection(str(s)))}
        for setting, (selector, kept, rest) in known.items():
            other = next(
                (s for s, f in known.items() if f[0].startswith("snapkv") and f[1:] == (kept, rest)), None
            )
            if selector != "q2c" or other is None:
                continue
            both = comparisons.pairs(table, str(setting), str(other))
            length = both["context_tokens"]
            if length.max() < 1.9 * length.min():
                continue
            gain = both["nll_base"] - both["nll"]
            long, short = gain[length > 0.7 * length.max()], gain[length < 1.4 * length.min()]
            yield _difference(model, f"{setting} against {other}", long, short)


def _difference(model: str, what: str, long: pd.Series, short: pd.Series) -> Verdict:
    """The advantage at the longest contexts less that at the shortest, two independent samples."""
    ends = [stats.mean(part) for part in (long, short)]
    half = sum(((e.high - e.low) / 2) ** 2 for e in ends) ** 0.5
    middle = ends[0].value - ends[1].value
    found = stats.Estimate(middle, middle - half, middle + half, min(e.n for e in ends))
    return rules.threshold(
        "q2c-grows",
        model,
        what,
        found,
        0.0,
        "advantage in NLL at the longest contexts less that at the shortest {:.3f} {}",
    )


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
        "two models' ΔNLL apart by more than 0.02",
        _fragile,
    ),
    Claim(
        "protected-layer",
        "INT4 lossless at 3.6× smaller",
        "ΔNLL at most 0.02; below other layers'",
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
    ),
    Claim("q2c-free", "no extra compute", "selection at most 5 % of the prefill", _free),
    Claim(
        "q2c-grows",
        "(expected) advantage grows with context",
        "Q2C's NLL advantage larger at the longest contexts",
        _grows,
    ),
    Claim(
        "entropy-coding-saves", "(expected) 20–30 % of bandwidth", "payload smaller by at least 20 %", _coded
    ),
    Claim(
        "kv-worth-sending",
        "(the deciding baseline)",
        "the fastest KV that keeps 95 % beats sending the text",
        _worth,
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
            few = f" (fewer than {rules.LEAST})" if one.n < rules.LEAST else ""
            lines.append(f"  {one.verdict:<9}  {where} · {one.what}: {one.figures} · n = {one.n}{few}")
        lines.append("")
    return "\n".join([*lines, *said]).rstrip()


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
