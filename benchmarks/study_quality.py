"""The study's tables of answers beside rows of ours: selection, quantization, lengths, deltas.

    .venv/bin/python -m benchmarks.study_quality RUN… [--json]

RUN: of scenarios/study/grid.yaml, or what was kept of such runs in results-published/. Published (Cheng and Liao): F1 of SQuAD,
n = 50; shares of the full cache's score in per cent. Ours: the task's score, and the share of the full cache's on the same
examples with its 95 % interval. Pairs that the rule of `testbed claims` leaves out are marked.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.claims.pool import LEAST_REFERENCE, LEAST_REFERENCE_CHOICE, OF_FOUR
from testbed.analysis.run import load

#: F1 by model: full cache; then at 25 and 50 %: Q2C, SnapKV, H2O, random.
SELECTION = {
    "Qwen2.5-3B": (0.785, (0.390, 0.272, 0.203, 0.130), (0.523, 0.546, 0.312, 0.246)),
    "Qwen2.5-7B": (0.805, (0.428, 0.292, 0.205, 0.193), (0.600, 0.564, 0.429, 0.202)),
    "Mistral-7B": (0.429, (0.294, 0.205, 0.129, 0.104), (0.350, 0.354, 0.224, 0.205)),
    "Qwen2.5-14B": (0.770, (0.360, 0.279, 0.160, 0.192), (0.594, 0.522, 0.359, 0.186)),
}
#: Per cent of the full cache's F1: INT8, INT4, mixed precision.
QUANTIZATION = {
    "Qwen2.5-14B": (100, 95.5, 95.6),
    "Qwen2.5-7B": (101, 77, 101),
    "Qwen2.5-3B": (100, 96, None),
    "Yi-6B": (99.5, 100, 100),
    "Mistral-7B": (99.8, 96, 94),
    "Phi-3.5": (100, 92, 92),
    "Pythia-2.8B": (103, 85, 76),
}
#: Likewise by context tokens, of Qwen2.5-7B: INT4, mixed precision.
LENGTHS = {512: (70.9, 92.2), 1024: (55.3, 96.8), 2048: (56.6, 101.5), 4096: (41.6, 106)}
#: Likewise of Qwen2.5-7B, by form of delta; the first is INT4 alone.
DELTAS = {"none": 72.5, "anchor, g = 10": 66.9, "anchor, g = 4": 58.5, "sequential, g = 10": 65.8, "sequential, g = 4": 68.0,
          "sequential, no reset": 16.1}  # fmt: skip

_INT4 = "int4(group=0, symmetric=true)"
_SELECTORS = {
    "as published": (
        "q2c@{}(scope=global, layers=last, sinks=0, pool=1)",
        "snapkv@{}(scope=global, layers=last, window=0, kernel=1, question=true)",
        "h2o@{}(scope=global, layers=last, question=true)",
        "random@{}",
    ),
    "as here": ("q2c@{}", "snapkv@{}", "h2o@{}", "random@{}"),
}
_DELTAS = {
    "none": f"{_INT4}+zstd",
    "anchor, g = 10": f"delta(loop=open)+{_INT4}+zstd",
    "anchor, g = 4": f"delta(anchor=4, loop=open)+{_INT4}+zstd",
    "sequential, g = 10": f"delta(loop=open, order=consecutive)+{_INT4}+zstd",
    "sequential, g = 4": f"delta(anchor=4, loop=open, order=consecutive)+{_INT4}+zstd",
    "sequential, no reset": f"delta(anchor=4096, loop=open, order=consecutive)+{_INT4}+zstd",
}


def figures(runs: list[Path]) -> list[dict[str, Any]]:
    """A line for each model, task and setting: n, mean score, and the share of the full cache's score that is kept."""
    rows = settings.labelled(pd.concat([load(path).require().rows for path in runs], ignore_index=True))
    lines = []
    for (model, task), own in rows.groupby(["model", "task"], sort=False):
        examples = own.drop_duplicates("example")
        full = stats.mean(examples["reference_score"], examples["example"], bounds=(0.0, 1.0))
        least = LEAST_REFERENCE_CHOICE if str(task).startswith(OF_FOUR) else LEAST_REFERENCE
        about = {"model": model, "task": task, "full": full.value, "floor": bool(full.low > least)}
        for setting, part in own.groupby("setting", sort=False):
            kept = stats.kept(part["score"], part["reference_score"], part["example"])
            score = stats.mean(part["score"], part["example"], bounds=(0.0, 1.0)).value
            whole = stats.mean(part["reference_score"], part["example"], bounds=(0.0, 1.0)).value
            share = {"full": whole, "kept": kept.value, "low": kept.low, "high": kept.high}
            name = str(setting).removesuffix("+fp16")  # of what is kept, in 16 bits
            lines.append({**about, "setting": name, "n": part["example"].nunique(), "score": score, **share})
    return lines


class Table:
    """A Markdown table, and how a measured line finds its figures."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines = {(line["model"], line["task"], line["setting"]): line for line in lines}
        self.pairs = list(dict.fromkeys((line["model"], line["task"]) for line in lines))

    def of(self, pair: tuple[str, str], setting: str) -> dict[str, Any] | None:
        """A model's and task's line for a setting; None: not measured."""
        return self.lines.get((*pair, setting))

    def mixed(self, pair: tuple[str, str]) -> dict[str, Any] | None:
        """The first of its settings of mixed precision, which has the diagnosed layers."""
        return next(
            (v for (*own, s), v in self.lines.items() if tuple(own) == pair and s.startswith("mixed(")), None
        )

    def who(self, pair: tuple[str, str], found: Iterable[dict[str, Any] | None], kind: str = "") -> str:
        """Model and task (and form), with the n of what was found, and a mark where the rule leaves the pair out."""
        own = [line for line in found if line]
        least, most = min(line["n"] for line in own), max(line["n"] for line in own)
        count = f"{most}" if least == most else f"{least} to {most}"
        form = f": {kind}" if kind else ""
        return f"`{pair[0]}`, `{pair[1]}`{form} | {count}{'' if own[0]['floor'] else ', left out'}"


def _score(line: dict[str, Any] | None) -> str:
    return f"{line['score']:.3f}".lstrip("0") if line else "–"


def _share(line: dict[str, Any] | None) -> str:
    if line is None or not math.isfinite(line["kept"]):
        return "–"
    return f"{100 * line['kept']:.0f} [{100 * line['low']:.0f}, {100 * line['high']:.0f}]"


def _published(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def selection(table: Table) -> list[str]:
    """Score by selector, at each ratio."""
    lines = ["| | who | n | full cache | Q2C | SnapKV | H2O | random |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for name, (full, quarter, half) in SELECTION.items():
        for share, scores in (("25 %", quarter), ("50 %", half)):
            cells = " | ".join(f"{value:.3f}".lstrip("0") for value in (full, *scores))
            lines.append(f"| {share} | {name}, SQuAD v2: published | 50 | {cells} |")
    for ratio, share in ((0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %")):
        for kind, selectors in _SELECTORS.items():
            for pair in table.pairs:
                found = [table.of(pair, selector.format(f"{ratio:g}")) for selector in selectors]
                known = [line for line in found[:3] if line]
                if known:
                    whole, cells = f"{known[0]['full']:.3f}".lstrip("0"), " | ".join(map(_score, found))
                    lines.append(f"| {share} | {table.who(pair, found, kind)} | {whole} | {cells} |")
    return lines


def quantization(table: Table) -> list[str]:
    """Share of the full cache's score in per cent."""
    lines = ["| who | n | INT8 | INT4 | mixed |", "|---|--:|--:|--:|--:|"]
    for name, shares in QUANTIZATION.items():
        lines.append(f"| {name}, SQuAD v2: published | 50 | {' | '.join(map(_published, shares))} |")
    lines += [
        f"| Qwen2.5-7B, {n} tokens: published | 50 | – | {a:g} | {b:g} |" for n, (a, b) in LENGTHS.items()
    ]
    for pair in table.pairs:
        found = (table.of(pair, "int8"), table.of(pair, _INT4), table.mixed(pair))
        if any(found):
            lines.append(f"| {table.who(pair, found)} | {' | '.join(map(_share, found))} |")
    return lines


def deltas(table: Table) -> list[str]:
    """Share of the full cache's score in per cent, by form."""
    lines = [f"| who | n | {' | '.join(DELTAS)} |", f"|---|--:|{'--:|' * len(DELTAS)}"]
    lines.append(f"| Qwen2.5-7B: published | 50 | {' | '.join(map(_published, DELTAS.values()))} |")
    for pair in table.pairs:
        found = [table.of(pair, setting) for setting in _DELTAS.values()]
        if any(found):
            lines.append(f"| {table.who(pair, found)} | {' | '.join(map(_share, found))} |")
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = figures(options.runs)
    if options.json:
        print(json.dumps(lines, indent=1))
        return
    table = Table(lines)
    for title, made in (("Selection", selection), ("Quantization", quantization), ("Deltas", deltas)):
        print(f"### {title}\n")
        print("\n".join(made(table)) + "\n")


if __name__ == "__main__":
    main()
