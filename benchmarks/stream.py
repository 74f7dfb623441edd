"""How good the pipeline is: a streamed request's time over that of the same stages in an ideal pipeline, link by link.

    sudo .venv/bin/python -m benchmarks.stream [--rates 10 20 50 100] [--examples 5] [--json]

`e2e_s / bound_s`, and up to the first token; beside it what the pipeline hid, and the same request sent whole. SmolLM2 prefills
1,024 tokens in blocks (`split`), or has their cache (`store`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.runs import rows


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a link, placement, codec and delivery: medians over the examples, and the greatest ratio."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:
        key = (row["profile"], row["placement"], row["codec"], row["delivery"])
        groups.setdefault(key, []).append(row)
    lines = []
    for key, own in groups.items():
        ratios = [row["e2e_s"] / row["bound_s"] for row in own]
        lines.append(
            {
                **dict(zip(("profile", "placement", "codec", "delivery"), key, strict=True)),
                "n": len(own),
                "chunk_bytes": round(median(row["payload_bytes"] / row["chunks"] for row in own)),
                "ttft_s": median(row["ttft_s"] for row in own),
                "e2e_s": median(row["e2e_s"] for row in own),
                "hidden_s": median(row["overlap_s"] for row in own),
                "over_bound": median(ratios),
                "worst": max(ratios),
            }
        )
    return lines


def speed(text: str) -> float | str:
    """A factor, or a device's name."""
    return text if text.startswith("device:") else float(text)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 20, 50, 100], help="Mbit/s")
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--codecs", nargs="+", default=["int8", "int4"])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument(
        "--edge", type=speed, default=1, help="how many times slower the edge computes, or device:NAME"
    )
    parser.add_argument("--cloud", type=speed, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = table(
        rows(
            profiles=[f"rate={rate:g}mbit,delay=10ms" for rate in options.rates],
            model=options.model,
            placements=["split", "store"],
            codecs=options.codecs,
            delivery=["whole", f"stream(chunk={options.chunk})", "stream(by=layers)"],
            tasks=["passages"],
            context_tokens=options.tokens,
            examples=options.examples,
            compute={side: getattr(options, side) for side in ("edge", "cloud")},
        )
    )
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "lines": lines}, indent=1))
        return
    print(f"load {os.getloadavg()[0]:.1f}; medians of n = {options.examples}\n")
    print(
        "| link | placement | codec | delivery | chunk, kB | first token, s | whole, s | hidden, s | ÷ bound | worst |"
    )
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|")
    for line in lines:
        print(
            f"| {line['profile']} | {line['placement']} | `{line['codec']}` | `{line['delivery']}` | "
            f"{line['chunk_bytes'] / 1e3:.0f} | {line['ttft_s']:.2f} | {line['e2e_s']:.2f} | {line['hidden_s']:.2f} | "
            f"{line['over_bound']:.3f} | {line['worst']:.3f} |"
        )


if __name__ == "__main__":
    main()
