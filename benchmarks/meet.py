"""`meet` against the better of its two halves, link by link: the text alone, and the stored cache whole.

    sudo .venv/bin/python -m benchmarks.meet [--rates 2 10 20 40 100] [--examples 5] [--json]

Times to the first token; of 1,024 tokens of SmolLM2 the cache lies at the edge. A cache whose bytes alone take longer than
`--longest` seconds is not sent whole: its line says how long they take at least. Examples are compared one by one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.runs import rows
from benchmarks.stream import speed
from testbed.experiment.estimate import Estimator
from testbed.experiment.scenario import Cell, Plan


def worth_it(longest_s: float, plan: Plan, cell: Cell) -> bool:
    """Whether a cell is run."""
    whole = cell.placement == "store" and str(cell.delivery) == "whole"
    return not whole or Estimator(plan).transmit_s(cell) <= longest_s


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a link and codec: medians over the examples, and of each example's time over that of the better half."""
    links: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        links.setdefault(row["profile"], []).append(row)
    lines = []
    for link, own in links.items():
        text = {row["example"]: row["ttft_s"] for row in own if row["placement"] == "cloud"}
        for codec in dict.fromkeys(row["codec"] for row in own if row["codec"]):
            sent = [row for row in own if row["codec"] == codec]
            met = [row for row in sent if row["delivery"] != "whole"]
            whole = {row["example"]: row["ttft_s"] for row in sent if row["delivery"] == "whole"}
            cached = whole or {
                row["example"]: 8 * row["kv_bytes"] * _share(codec) / row["rate_up_bps"] for row in met
            }
            better = min(median(text.values()), median(cached.values()))
            lines.append(
                {
                    "link": link,
                    "codec": codec,
                    "n": len(met),
                    "text_s": median(text.values()),
                    "whole_s": median(cached.values()),
                    "whole_run": bool(whole),
                    "meet_s": median(row["ttft_s"] for row in met),
                    "over_better": median(row["ttft_s"] for row in met) / better,
                    "paired": median(
                        row["ttft_s"] / min(text[row["example"]], cached[row["example"]]) for row in met
                    ),
                    "chunks": median(row["chunks"] for row in met),
                    "same_answers": sum(row["answer"] == row["reference_answer"].strip() for row in met),
                    "over_bound": median(row["e2e_s"] / row["bound_s"] for row in met),
                }
            )
    return lines


def _share(codec: str) -> float:
    """Of a 16-bit cache's bytes, what the codec's values take at least."""
    return {"int8": 1 / 2, "int4": 1 / 4}.get(codec, 0.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 10, 20, 40, 100], help="Mbit/s")
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--codecs", nargs="+", default=["int8", "int4"])
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument(
        "--cloud", type=speed, default=1, help="how many times slower the cloud computes, or device:NAME"
    )
    parser.add_argument("--longest", type=float, default=6.0)
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = table(
        rows(
            partial(worth_it, options.longest),
            profiles=[f"rate={rate:g}mbit,delay=10ms" for rate in options.rates],
            model=options.model,
            placements=["store", "cloud"],
            codecs=options.codecs,
            delivery=["whole", f"meet(chunk={options.chunk})"],
            tasks=["passages"],
            context_tokens=options.tokens,
            examples=options.examples,
            max_new_tokens=8,
            emulator=options.emulator,
            compute={"edge": options.cloud, "cloud": options.cloud},
        )
    )
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "lines": lines}, indent=1))
        return
    print(f"load {os.getloadavg()[0]:.1f}; to the first token, medians of n = {options.examples}\n")
    print(
        "| link | codec | text, s | cache, s | meet, s | ÷ the better | paired | e2e ÷ bound | answers alike |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for line in lines:
        print(
            f"| {line['link']} | `{line['codec']}` | {line['text_s']:.2f} | "
            f"{'' if line['whole_run'] else '> '}{line['whole_s']:.2f} | {line['meet_s']:.2f} | {line['over_better']:.2f} | "
            f"{line['paired']:.2f} | {line['over_bound']:.2f} | {line['same_answers']} of {line['n']} |"
        )
    fastest = min(lines, key=lambda line: line["over_better"])
    slowest = max(lines, key=lambda line: line["over_better"])
    for what, line in (("fastest", fastest), ("slowest", slowest)):
        print(f"{what} beside the better: {line['over_better']:.2f} at {line['link']}, {line['codec']}")
    won = [f"{line['link']} {line['codec']}" for line in lines if line["over_better"] <= 1 / 1.3]
    print(f"at least 1.3 times as fast: {'; '.join(won) or 'nowhere'}")


if __name__ == "__main__":
    main()
