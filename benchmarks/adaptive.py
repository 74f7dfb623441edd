"""What a policy comes to on recorded links: requests across each trace, every policy, every fixed level, and the oracle.

    sudo .venv/bin/python -m benchmarks.adaptive TRACE… [--requests 30] [--deadline 2s] [--tokens 1024] [--json]

TRACE is what a profile says of one: ``trace:FILE(column=down)``, with its options. The requests are spread over the trace
(`at: example`); each setting meets a request's own stretch of it. A stored cache of SmolLM2 crosses in parts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from benchmarks.runs import rows
from testbed.stats import estimates

LEVELS = ("int8", "int4", "q2c@0.25+int4", "text")
POLICIES = ("throughput", "ewma", "mpc", "oracle")


def deliveries(deadline: str, chunk: int) -> list[str]:
    """The settings: each policy over all levels, and each level by itself."""
    own = f"deadline={deadline}, chunk={chunk}"
    adaptive = [f"adaptive(levels=[{', '.join(LEVELS)}, skip], {own}, policy={name})" for name in POLICIES]
    return adaptive + [f"adaptive(levels=[{level}], {own}, policy=fixed)" for level in LEVELS]


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a trace and setting, in the order in which they ran."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["profile"], row["delivery"]), []).append(row)
    lines = []
    for (profile, delivery), own in groups.items():
        met = estimates.mean([float(bool(row["met"])) for row in own], bounds=(0.0, 1.0))
        lines.append(
            {
                "profile": profile,
                "delivery": delivery,
                "n": len(own),
                "met": met.value,
                "met_interval": [met.low, met.high],
                "score": mean(row["score"] for row in own),
                "nll": mean(row["nll"] for row in own),
                "left_out": mean(row["tokens_left_out"] / row["context_tokens"] for row in own),
                "ttft_s": median(row["ttft_s"] for row in own),
                "payload_bytes": mean(row["payload_bytes"] for row in own),
            }
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", nargs="+", metavar="TRACE")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--deadline", default="2s")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = table(
        rows(
            profiles=[f"delay=15ms,queue=200ms,{trace}" for trace in options.traces],
            at="example",
            model=options.model,
            placements=["store"],
            delivery=deliveries(options.deadline, options.chunk),
            tasks=["passages"],
            context_tokens=options.tokens,
            examples=options.requests,
        )
    )
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "lines": lines}, indent=1))
        return
    print(
        f"load {os.getloadavg()[0]:.1f}; first token within {options.deadline}; n = {options.requests} requests a trace\n"
    )
    print("| trace | sender | deadline met | score | NLL | left out | first token, s | MB |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for line in lines:
        low, high = line["met_interval"]
        print(
            f"| {line['profile']} | `{line['delivery']}` | {line['met']:.2f} [{low:.2f}, {high:.2f}] | {line['score']:.2f} | "
            f"{line['nll']:.2f} | {line['left_out']:.0%} | {line['ttft_s']:.2f} | {line['payload_bytes'] / 1e6:.2f} |"
        )


if __name__ == "__main__":
    main()
