"""What a request comes to whose link stands still in mid-stream: the answer when it goes on, or an error when its time is over.

    sudo .venv/bin/python -m benchmarks.standstill [--runs tcp quic datagram] [--placements store split] [--examples 1] [--json]

A tiny random model; every delivery and transport, over a link of 4 Mbit/s that is out of order
from 80 ms on. `goes on`: for 1 s, of the 30 s that a request may take. `timeout`: for 4 s, of 1 s. Longest: from a trial's
beginning to the next one's; behind its time-out a connection is closed in two seconds at most, and the link settles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

_SCENARIO = """\
name: standstill
emulator: userspace
tasks: [needle]
context_tokens: 300
threads: 1
max_new_tokens: 4
reuse: prefill
"""
_ADAPTIVE = "adaptive(levels=[int8, int4, text, skip], deadline=500ms, chunk=64, policy=ewma)"
_BY_PARTS = ["whole", "stream(chunk=64)", "stream(by=layers, chunk=1)", "meet(chunk=64)", _ADAPTIVE]
RUNS: dict[str, dict[str, Any]] = {
    "tcp": {"transport": ["tcp", "tcp(connection=reuse)"], "codecs": ["planes"]},
    "quic": {"transport": ["quic"], "codecs": ["planes"]},
    "datagram": {"transport": ["datagram"], "codecs": ["planes"]},
}
for _name, _settings in RUNS.items():
    _settings["delivery"] = (
        ["whole", "stream(chunk=64)", _ADAPTIVE]
        if _name == "datagram"
        else [*_BY_PARTS, "progressive(planes=2)"]
    )
OUTAGES = {
    "goes on": {"profiles": ["rate=4mbit,delay=5ms,outage:1s@80ms"], "timeout": "30s"},
    "timeout": {"profiles": ["rate=4mbit,delay=5ms,outage:4s@80ms"], "timeout": "1s"},
}


def lines(outage: str, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a placement, delivery and transport: how its trials ended."""
    found = list(found)
    took: dict[str, float] = {}
    for row, after in pairwise(found):
        began, next_began = (datetime.fromisoformat(r["started_at"]) for r in (row, after))
        took[row["trial"]] = (next_began - began).total_seconds()
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        groups[tuple(row[name] for name in ("transport", "delivery", "placement"))].append(row)
    return [
        {
            "outage": outage,
            **dict(zip(("transport", "delivery", "placement"), key, strict=True)),
            "n": len(own),
            "answered": sum(not row["error"] for row in own),
            "left_out": sum(bool(row["tokens_left_out"]) for row in own),
            "unverified": sum("not verified" in row["warnings"] for row in own),
            "failed": sum(bool(row["error"]) for row in own),
            "errors": sorted({row["error"] for row in own if row["error"]}),
            "longest_s": round(max(took.get(row["trial"], 0.0) for row in own), 1),
        }
        for key, own in groups.items()
    ]


def main() -> int:
    """Print a table; exit status 1 where a request that had time was not answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--placements", nargs="+", choices=["store", "split"], default=["store"])
    parser.add_argument("--examples", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from tests.runs import rows, run, unmeasured
    from tests.tiny_models import tiny_model_directory

    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, unmeasured():
        path = Path(name) / "standstill.yaml"
        path.write_text(_SCENARIO + f"model: {tiny_model_directory('llama', Path(name) / 'model')}\n")
        for which in options.runs:
            for outage, settings in OUTAGES.items():
                out = Path(name) / f"{which}-{outage.replace(' ', '-')}"
                about = {**RUNS[which], **settings}
                about |= {"examples": options.examples, "placements": options.placements}
                done = run(str(path), "--out", str(out), **about)
                if done.status not in (0, 1) or not (out / "trials.jsonl").exists():
                    raise SystemExit(done.errors)
                table += lines(outage, rows(out))
    if options.json:
        print(json.dumps(table, indent=1))
    else:
        print(
            "| outage | transport | delivery | placement | n | answered | left out | unverified | failed | longest, s |"
        )
        print("|---|---|---|---|--:|--:|--:|--:|--:|--:|")
        for line in table:
            cells = (str(value) for key, value in line.items() if key != "errors")
            print(f"| {' | '.join(cells)} |")
        for error in sorted({error for line in table for error in line["errors"]}):
            print(error)
    return int(any(line["failed"] for line in table if line["outage"] == "goes on"))


if __name__ == "__main__":
    sys.exit(main())
