"""What a policy comes to on recorded links: requests across each trace, the policies, every level by itself, and the oracle.

    sudo .venv/bin/python -m benchmarks.adaptive TRACE… --out RUN [--minutes 9] [--policies mpc ewma oracle …] [--requests 30]
    .venv/bin/python -m benchmarks.adaptive --table RUN [--json]

TRACE is what a profile says of one: ``trace:FILE(column=down)``, with its options. The requests are spread over the trace
(`at: example`); each setting meets a request's own stretch of it. A stored cache of SmolLM2 crosses in parts; what can be
encoded before the request is.

A setting is a policy over all `--levels`, or a level by itself: ``fixed:LEVEL``. RUN is a run's directory, for all that reads
runs. A request that is in it is not made again, and with `--minutes` none begins later: the same call, made again, goes on (exit
status 3: more is to do). Each request is made at all settings before the next one, so that what there is can be compared.
`--policies` are measured in their order; others can be added to a RUN later.

Intervals: Clopper and Pearson's of the deadlines met, bootstrapped of the gold answer's mean negative log-likelihood (nats a
token) and of differences to the oracle, request by request.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.runs import Chosen
from testbed import stats
from testbed.cli.progress import Console
from testbed.delivery.delivery import SKIP
from testbed.experiment.plan import make_plan
from testbed.experiment.results import RunDirectory
from testbed.experiment.runner import Runner, begin, check_ready

LEVELS = ("q2c@0.25+int4", "text", "q2c@0.1+int4", "q2c@0.05+int4", SKIP)
POLICIES = ("mpc", "ewma", "oracle", "throughput")
FIXED = "fixed:"


class _Enough(Exception):
    """The time is over."""


def delivery(setting: str, levels: Sequence[str], deadline: str, chunk: int) -> str:
    """As scenarios write it."""
    alone = setting.removeprefix(FIXED) if setting.startswith(FIXED) else ""
    policy = "fixed" if alone else setting
    return f"adaptive(levels=[{alone or ', '.join(levels)}], deadline={deadline}, policy={policy}, chunk={chunk})"


def measure(options: argparse.Namespace) -> bool:
    """Make what the run lacks of these settings' requests; False: the time was over before."""
    until = time.monotonic() + (options.minutes or 1e6) * 60
    every = [*POLICIES, *(FIXED + level for level in options.levels if level != SKIP)]
    written = {name: delivery(name, options.levels, options.deadline, options.chunk) for name in every}
    settings: dict[str, Any] = {
        "profiles": [f"delay=15ms,queue=200ms,{trace}" for trace in options.traces],
        "at": "example",
        "model": options.model,
        "placements": ["store"],
        "delivery": list(written.values()),
        "tasks": ["passages"],
        "context_tokens": options.tokens,
        "examples": options.requests,
    }
    plan = make_plan({"name": "adaptive", **settings}, "the benchmark's scenario")
    asked = [plan.scenario.delivery[every.index(name)] for name in options.policies or every]
    chosen = Chosen(
        **{field.name: getattr(plan, field.name) for field in fields(plan)},
        wanted=lambda plan, cell: cell.delivery in asked,
    )
    check_ready(plan)

    def made(row: Any, spans: Any) -> None:
        if time.monotonic() > until:
            raise _Enough

    directory = RunDirectory.open(options.out) if options.out.exists() else begin(plan, options.out)
    if directory.settings() != plan.scenario.model_dump(mode="json"):
        raise SystemExit(f"{options.out} is of other settings: write another --out")
    try:
        Runner(chosen, directory, Console(), accept_uncalibrated=True, on_row=made).execute()
    except _Enough:
        return False
    return True


def lines(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a trace and setting."""
    groups: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        if not row["error"]:
            groups.setdefault(row["profile"], {}).setdefault(row["delivery"], {})[row["example"]] = row
    found = []
    for profile, settings in groups.items():
        oracle = next((own for name, own in settings.items() if "policy=oracle" in name), {})
        for name, own in settings.items():
            both = [example for example in own if example in oracle]
            each = list(own.values())
            found.append(
                {
                    "profile": profile,
                    "delivery": name,
                    "n": len(own),
                    "met": asdict(stats.share_above([float(row["met"]) for row in each], 0.5)),
                    "nll": asdict(stats.mean([row["nll"] for row in each])),
                    "score": asdict(stats.mean([row["score"] for row in each], bounds=(0.0, 1.0))),
                    **{
                        f"{column}_less_oracle": asdict(
                            stats.difference(
                                *(
                                    [float(side[example][column]) for example in both]
                                    for side in (own, oracle)
                                ),
                                bounds=None if column == "nll" else (0.0, 1.0),
                            )
                        )
                        for column in ("met", "nll")
                    },
                    "left_out": sum(r["tokens_left_out"] for r in each)
                    / sum(r["context_tokens"] for r in each),
                    "ttft_s": median(row["ttft_s"] for row in each),
                    "payload_bytes": sum(row["payload_bytes"] for row in each) / len(each),
                }
            )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""

    def cell(line: dict[str, Any], name: str, sign: str = "") -> str:
        estimate = {key: line[name][key] for key in ("value", "low", "high", "n")}
        return stats.Estimate(**estimate).text(2, sign) if estimate["n"] else "-"

    written = [
        "| trace | sender | n | deadline met | NLL | met, less the oracle's | NLL, less the oracle's | score | left out "
        "| first token, s | MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in found:
        written.append(
            f"| {line['profile'].rpartition('/')[2]} | `{line['delivery']}` | {line['n']} "
            f"| {cell(line, 'met')} | {cell(line, 'nll')} "
            f"| {cell(line, 'met_less_oracle', '+')} | {cell(line, 'nll_less_oracle', '+')} | {line['score']['value']:.2f} "
            f"| {line['left_out']:.0%} | {line['ttft_s']:.2f} | {line['payload_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(written)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="*", metavar="TRACE")
    parser.add_argument(
        "--out", type=Path, metavar="RUN", help="where requests are kept, and which are not made again"
    )
    parser.add_argument("--minutes", type=float, help="after which no request begins")
    parser.add_argument("--policies", nargs="+", metavar="SETTING", help="of all: these alone")
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--deadline", default="2s")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--table", type=Path, metavar="RUN", help="print what this holds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.table and not (options.traces and options.out):
        parser.error("write TRACE… and --out RUN, or --table RUN")
    known = [*POLICIES, *(FIXED + level for level in options.levels if level != SKIP)]
    if unknown := [name for name in options.policies or () if name not in known]:
        parser.error(f"unknown setting {unknown[0]}; there is {', '.join(known)}")
    return options


def main() -> int:
    """Measure what is lacking, and print a table of all."""
    options = arguments()
    done = bool(options.table) or measure(options)
    found = lines(RunDirectory.open(options.table or options.out).rows())
    print(
        json.dumps({"load": os.getloadavg()[0], "lines": found}, indent=1) if options.json else table(found)
    )
    if not done:
        print("there is more to do: make the same call again", file=sys.stderr)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
