"""What the first bit planes of a cache are worth: whether the later ones change the answer, and how long nobody waited for them.

    sudo .venv/bin/python -m benchmarks.progressive [--planes 2 3 4] [--rate 20] [--examples 20] [--json]

A stored cache over one link, whole and progressive. `saved`: the row's `saved_s`; beside it the same difference as it shows
against the request sent whole.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.runs import rows
from testbed.stats.estimates import share_above


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a number of planes, the first one of all, sent whole; what is said of verifying is of the answers that were."""
    whole = {row["example"]: row for row in found if row["delivery"] == "whole"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["delivery"], []).append(row)
    lines = []
    for delivery, own in groups.items():
        line = {
            "delivery": delivery,
            "n": len(own),
            "kilobytes": median(row["payload_bytes"] for row in own) / 1e3,
            "ttft_s": median(row["ttft_s"] for row in own),
            "e2e_s": median(row["e2e_s"] for row in own),
            "score": fmean(row["score"] for row in own),
            "kl": fmean(row["kl"] for row in own),
        }
        if own := [row for row in own if row["changed"] is not None]:  # else none was verified
            changed = sum(row["changed"] for row in own)
            share = share_above([float(row["changed"]) for row in own], 0.5)
            same = sum(row["verified_answer"] == whole[row["example"]]["answer"] for row in own)
            line |= {
                "changed": changed,
                "changed_95": (share.low, share.high),
                "as_whole": same,
                "verified_score": fmean(row["verified_score"] for row in own),
                "saved_s": median(row["saved_s"] for row in own),
                "ahead_s": median(whole[row["example"]]["ttft_s"] - row["ttft_s"] for row in own),
                "verified_s": median(row["verified_s"] for row in own),
            }
        lines.append(line)
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--planes", type=int, nargs="+", default=[2, 3, 4], help="that are answered from")
    parser.add_argument("--rate", type=float, default=20, help="Mbit/s")
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--codec", default="planes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = table(
        rows(
            profiles=[f"rate={options.rate:g}mbit,delay=25ms"],
            model=options.model,
            placements=["store"],
            codecs=[options.codec],
            delivery=["whole", *(f"progressive(planes={count})" for count in options.planes)],
            tasks=["passages"],
            context_tokens=options.tokens,
            examples=options.examples,
        )
    )
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "lines": lines}, indent=1))
        return
    print(
        f"load {os.getloadavg()[0]:.1f}; medians, and means of scores and divergences, of n = {options.examples}\n"
    )
    print(
        "| delivery | kB | first token, s | last, s | saved, s | against whole, s | verified, s | changed (95 %) | as whole | "
        "score | verified | KL |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for line in lines:
        judged = "| | | | | "
        if "changed" in line:
            low, high = line["changed_95"]
            judged = (
                f"{line['saved_s']:.2f} | {line['ahead_s']:.2f} | {line['verified_s']:.2f} | "
                f"{line['changed']} ({low:.0%} to {high:.0%}) | {line['as_whole']} "
            )
        print(
            f"| `{line['delivery']}` | {line['kilobytes']:.0f} | {line['ttft_s']:.2f} | {line['e2e_s']:.2f} | {judged}| "
            f"{line['score']:.3f} | {line.get('verified_score', line['score']):.3f} | {line['kl']:.3f} |"
        )


if __name__ == "__main__":
    main()
