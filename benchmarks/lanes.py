"""Trials a minute of several lanes against one, on this machine, with compute that is replayed.

    sudo .venv/bin/python -m benchmarks.lanes [--lanes 4] [--examples 40] [--json]

Each lane makes two shards, one after the other, each a `testbed run` of its own: network, endpoints, calibration, trials. So the
second calibrations of a lane fall among the others' trials. *a minute*: all trials over the wall-clock of all, starting and
measuring included; *pace*: over the trials' own stretches alone; *starting*: of a shard, what is before and behind these: Python,
both sides, the network, its calibration, which weigh more in shards that are shorter than a sweep's. *links*: shards whose
calibration was in tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

SHARDS_A_LANE = 2
SCENARIO = """
name: lanes
profiles: ["rate=50mbit,delay=10ms"]
model: shape:llama-3.1-8b
compute: {{edge: device:m1-max-llama-3.1-8b, cloud: device:rtx-4090-llama-3.1-8b}}
placements: [split]
codecs: [fp16, int8, int4]
tasks: [needle]
context_tokens: 64
examples: {examples}
max_new_tokens: 4
"""


def lane(scenario: Path, out: Path, numbers: list[int], count: int) -> None:
    """Make these shards one after the other. Raises SystemExit where one fails."""
    for number in numbers:
        words = [sys.executable, "-m", "testbed", "run", str(scenario), "--shard", f"{number}/{count}"]
        done = subprocess.run(
            [*words, "--out", str(out), "--accept-uncalibrated"], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"shard {number}/{count}: {done.stderr[-2000:]}")


def measure(lanes: int, examples: int) -> dict[str, Any]:
    """So many lanes, each with as much to do."""
    count = lanes * SHARDS_A_LANE
    with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as folder:
        scenario, out = Path(folder) / "lanes.yaml", Path(folder) / "out"
        scenario.write_text(SCENARIO.format(examples=examples * count))
        began = time.monotonic()
        with ThreadPoolExecutor(lanes) as pool:
            own = [list(range(number, count + 1, lanes)) for number in range(1, lanes + 1)]
            list(pool.map(lambda numbers: lane(scenario, out, numbers, count), own))
        wall = time.monotonic() - began
        shards = [shard(path) for path in sorted((out / "shards").iterdir())]
    trials = sum(each["trials"] for each in shards)
    return {
        "lanes": lanes,
        "trials": trials,
        "wall_s": wall,
        "a_minute": 60 * trials / wall,
        "starting_s": (wall - sum(each["lasted_s"] for each in shards) / lanes) / SHARDS_A_LANE,
        "pace": 60 * trials / sum(each["lasted_s"] for each in shards) * lanes,
        "failed": sum(each["failed"] for each in shards),
        "warned": sum(each["warned"] for each in shards),
        "links_ok": sum(each["link_ok"] for each in shards),
        "links": len(shards),
        "warnings": Counter(warning for each in shards for warning in each["warnings"]).most_common(3),
        "causes": [each["cause"] for each in shards if each["cause"]],
    }


def shard(path: Path) -> dict[str, Any]:
    """What a shard's directory says."""
    rows = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    measured = json.loads((path / "calibration.json").read_text())["measurements"]
    first, last = (datetime.fromisoformat(row["started_at"]) for row in (rows[0], rows[-1]))
    return {
        "trials": len(rows),
        "lasted_s": (last - first).total_seconds() + (rows[-1]["e2e_s"] or 0.0),
        "failed": sum(bool(row["error"]) for row in rows),
        "warned": sum(bool(row["warnings"]) for row in rows),
        "warnings": [
            re.sub("[0-9.]+", "…", part) for row in rows for part in row["warnings"].split("; ") if part
        ],
        "link_ok": all(each["ok"] for each in measured),
        "cause": "; ".join(each["cause"] for each in measured if each["cause"]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--examples", type=int, default=40, help="a shard")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = [measure(lanes, options.examples) for lanes in (1, options.lanes)]
    ratios = {key: lines[1][key] / lines[0][key] for key in ("a_minute", "pace")}
    if options.json:
        print(json.dumps({"lines": lines, "ratios": ratios}, indent=1))
        return
    print(
        f"{'lanes':>5} {'trials':>6} {'wall':>7} {'a minute':>9} {'pace':>7} {'starting':>8} {'failed':>6} {'warned':>6}  links"
    )
    for each in lines:
        print(
            f"{each['lanes']:>5} {each['trials']:>6} {each['wall_s']:>6.0f}s {each['a_minute']:>9.1f} {each['pace']:>7.1f} "
            f"{each['starting_s']:>7.1f}s "
            f"{each['failed']:>6} {each['warned']:>6}  {each['links_ok']} of {each['links']} in tolerance"
        )
        for cause in each["causes"]:
            print(f"      {cause}")
        for warning, rows in each["warnings"]:
            print(f"      {rows} rows: {warning}")
    print(f"times {ratios['a_minute']:.2f} a minute, {ratios['pace']:.2f} in pace (bound: 0.9 a lane)")


if __name__ == "__main__":
    main()
