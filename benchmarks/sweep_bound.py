"""How far a sweep is from what its trials had to take, and where the rest went.

    python -m benchmarks.sweep_bound RUN [--json]

*must*: of each trial that crossed the link, everything up to the first token, and the rest of the answer where it was computed;
what the edge computes as long as it takes here, without the factor by which its times are stretched, and not where it was taken
over from an earlier trial; of each example, its prefill and its answer at the edge. The clock runs from the first trial's start
to the last compute measurement. Where compute is replayed, every trial is waited for whole.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

EDGE = ("prefill", "select", "encode")


def must_s(row: dict[str, Any]) -> float:
    """Seconds that a trial cannot do without."""
    reused = [stage for stage in row["reused"].split(",") if stage]
    if row["error"]:
        return 0.0
    if row["replayed"] or row["edge_device"]:
        return float(row["e2e_s"])
    if row["placement"] == "edge":
        fresh = [stage for stage in ("prefill", "first_token", "generate") if stage not in reused]
        slow = {"prefill": row["edge_slowdown"]}
        decode = row["edge_decode_slowdown"] or 1.0
        return float(sum(row[f"{stage}_s"] / slow.get(stage, decode) for stage in fresh))
    seconds = float(row["e2e_s"]) - (row["generate_s"] if "generate" in reused else 0.0)
    if row["placement"] == "cloud":  # its prefill is the cloud's
        return seconds
    for stage in EDGE:
        seconds -= row[f"{stage}_s"] * (1 if stage in reused else 1 - 1 / row["edge_slowdown"])
    return seconds


def account(rows: Sequence[dict[str, Any]], measured: Sequence[str]) -> dict[str, Any]:
    """Seconds of the sweep. measured: when compute measurements ended."""
    rest: dict[str, float] = defaultdict(float)
    begun = _moment(rows[0]["started_at"])
    ended = max([_moment(rows[-1]["started_at"]) + must_s(rows[-1]), *map(_moment, measured)])
    moments = [*(_moment(row["started_at"]) for row in rows), ended]
    for number, row in enumerate(rows):
        passed = moments[number + 1] - moments[number] - must_s(row)
        last = number + 1 == len(rows) or rows[number + 1]["example"] != row["example"]
        # The edge's own answer is made with the example's reference, before the row that has it.
        if last or row["placement"] == "edge":
            rest["between examples: the reference's likelihoods, compute measured"] += passed
        elif "first_token" in row["reused"]:
            rest["behind trials whose answer was known"] += passed
        else:
            rest["behind trials with an answer of their own: its outcome"] += passed
    must = sum(map(must_s, rows))
    wall = ended - begun
    return {"trials": len(rows), "wall_s": wall, "must_s": must, "ratio": wall / must, "rest_s": dict(rest)}


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that was made in one go")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.run / "trials.jsonl").read_text().splitlines()]
    starts = json.loads((options.run / "compute.json").read_text())["starts"]
    found = account(rows, [each["measured_at"] for start in starts for each in start["measurements"]])
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{found['trials']} trials: {found['wall_s']:.1f} s, must {found['must_s']:.1f} s: {found['ratio']:.2f}"
    )
    for what, seconds in found["rest_s"].items():
        print(f"{seconds:>8.1f} s  {what}")


if __name__ == "__main__":
    main()
