"""The grid of a study on ever more lanes, by simulation: how long it takes, and where more lanes stop helping.

    python -m benchmarks.scale RUN [--lanes 1 4 16 64 …] [--json]

RUN is a finished run's directory. From its rows come, by link, how much longer a payload took than `transfer_s` says, and what
passed behind a trial until the next began; from its manifest, what it took to build, load and measure four links. Compute is
that of device profiles (M1 Max at the edge, RTX 4090 in the cloud, Llama 3.1 8B), scaled by parameters; weights are read once
a side, at 1 GB/s. The grid: seven models, four tasks, six lengths, 75 settings, the run's links, 200 examples; placement split,
every wait made, no request given up. Each model is a plan, cut into shards by example; a lane that is free takes the next shard.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from testbed.experiment.estimate import transfer_s
from testbed.models.shapes import SHAPES
from testbed.speed.files import find, load_device

MODELS = (
    "qwen2.5-3b",
    "yi-1.5-6b",
    "mistral-7b-v0.3",
    "qwen2.5-7b",
    "llama-3.1-8b",
    "gemma-2-9b",
    "qwen2.5-14b",
)
TASKS, EXAMPLES, ANSWER_TOKENS, QUESTION_TOKENS = 4, 200, 8, 24
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
#: Of a cache in 16 bits: five selectors, five ratios, and 16, 8 or 4 bits.
SETTINGS = [ratio * bits / 16 for _ in range(5) for ratio in (0.1, 0.25, 0.5, 0.75, 1) for bits in (16, 8, 4)]
WEIGHTS_BYTES_PER_S = 1e9


class Recorded:
    """What a run's rows say. ratios: by link, times of payloads over what the formula has; gaps: seconds behind a trial."""

    def __init__(self, run: Path) -> None:
        rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
        self.links: dict[str, tuple[float, float]] = {}
        self.ratios: dict[str, Any] = {}
        for row in rows:
            self.links[row["profile"]] = (row["rate_up_bps"], row["delay_up_s"] + row["delay_down_s"])
        for name, link in self.links.items():
            sent = [
                row for row in rows if row["profile"] == name and row["codec"] and row["delivery"] == "whole"
            ]
            found = [
                (row["connect_s"] + row["transmit_s"]) / transfer_s(row["payload_bytes"], *link)
                for row in sent
                if row["placement"] == "store" and not row["error"]
            ]
            self.ratios[name] = np.array(found)
        self.gaps = np.array(
            [
                _moment(after["started_at"]) - _moment(row["started_at"]) - row["e2e_s"]
                for row, after in itertools.pairwise(rows)
                if (row["codec"], row["delivery"], row["reused"]) == ("int4", "whole", "")
            ]
        )
        manifest = json.loads((run / "manifest.json").read_text())
        self.setup_s = _moment(rows[0]["started_at"]) - _moment(manifest["created"])


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def examples_s(recorded: Recorded, model: str, random: np.random.Generator) -> Any:
    """Seconds of all trials of each example of a model, in the order in which a plan counts them."""
    shape, scale = SHAPES[model], SHAPES[model].parameters / SHAPES["llama-3.1-8b"].parameters
    edge, cloud = (load_device(str(find(f"{name}-llama-3.1-8b"))).times for name in ("m1-max", "rtx-4090"))
    found = []
    for _, tokens in ((task, tokens) for task in range(TASKS) for tokens in LENGTHS):
        answer = sum(cloud.token_s(tokens + n) for n in range(ANSWER_TOKENS))
        waits = scale * (edge.pass_s(tokens) + cloud.pass_s(QUESTION_TOKENS, tokens) + answer)
        total = np.full(EXAMPLES, len(SETTINGS) * len(recorded.links) * waits)
        for name, link in recorded.links.items():
            sent = sum(transfer_s(part * tokens * shape.kv_bytes_per_token, *link) for part in SETTINGS)
            total += sent * random.choice(recorded.ratios[name], EXAMPLES)
        gaps = random.choice(recorded.gaps, (EXAMPLES, len(SETTINGS) * len(recorded.links)))
        found.append(total + gaps.sum(axis=1))
    return np.concatenate(found)


def makespan(shards: list[float], lanes: int) -> float:
    """Seconds until the last shard is done, where each free lane takes the next."""
    free = [0.0] * lanes
    for shard in shards:
        heapq.heapreplace(free, free[0] + shard)
    return max(free)


def cut(times: dict[str, Any], setups: dict[str, float], count: int) -> list[float]:
    """Seconds of all shards, each model's plan in so many; the models that take longest come first."""
    models = sorted(times, key=lambda model: -times[model].sum())
    return [
        setups[m] + float(times[m][n::count].sum()) for m in models for n in range(min(count, len(times[m])))
    ]


def simulate(recorded: Recorded, lanes: list[int]) -> list[dict[str, Any]]:
    """One entry a number of lanes, with the best of several numbers of shards."""
    random = np.random.default_rng(0)
    times = {model: examples_s(recorded, model, random) for model in MODELS}
    setups = {
        model: recorded.setup_s + 2 * 2 * SHAPES[model].parameters / WEIGHTS_BYTES_PER_S for model in MODELS
    }
    work = sum(float(each.sum()) for each in times.values())
    whole = makespan(cut(times, setups, 1), 1)
    longest = max(float(each.max()) for each in times.values())
    entries = []
    for number in lanes:
        counts = sorted({max(1, number * some // 4) for some in (1, 2, 4, 8, 16, 32)})
        tried = {count: makespan(cut(times, setups, count), number) for count in counts}
        count = min(tried, key=lambda each: tried[each])
        starting = sum(setups[m] * min(count, len(times[m])) for m in MODELS)
        entries.append(
            {
                "lanes": number,
                "shards_a_model": min(count, TASKS * len(LENGTHS) * EXAMPLES),
                "makespan_s": tried[count],
                "longest_example_s": longest,
                "speedup": whole / tried[count],
                "efficiency": whole / tried[count] / number,
                "starting_share": starting / (number * tried[count]),
                "idle_share": max(0.0, 1 - (starting + work) / (number * tried[count])),
            }
        )
    return entries


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    recorded = Recorded(options.run)
    entries = simulate(recorded, options.lanes)
    if options.json:
        print(json.dumps({"setup_s": recorded.setup_s, "lines": entries}, indent=1))
        return
    print(
        f"begin, load and measure links: {recorded.setup_s:.0f} s a shard, and weights; the longest example: "
        f"{entries[0]['longest_example_s'] / 3600:.1f} h"
    )
    print(f"{'lanes':>6} {'shards':>7} {'days':>9} {'times':>8} {'of k':>6} {'starting':>9} {'idle':>6}")
    for each in entries:
        print(
            f"{each['lanes']:>6} {each['shards_a_model']:>7} {each['makespan_s'] / 86400:>9.2f} "
            f"{each['speedup']:>8.1f} {each['efficiency']:>6.2f} {each['starting_share']:>9.1%} {each['idle_share']:>6.1%}"
        )


if __name__ == "__main__":
    main()
