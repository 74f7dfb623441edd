"""The study's table of times beside the same caches over links: what bytes ÷ bandwidth leaves out, and which of its ratios stand.

    sudo testbed run scenarios/study/times.yaml --out RUN     # once a model, see there
    .venv/bin/python -m benchmarks.study_times RUN… [--json]

Published (Cheng and Liao, 100 Mbit/s): ms of prefill, quantization, transmission, in all. Measured: opening the connection
and the transmission, over `naive_s`, which is the same bytes over the same rate.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from testbed.analysis.run import load


class Published(NamedTuple):
    """A row of the study's table: MB, and ms at 100 Mbit/s."""

    prefill: float
    quantize: float
    megabytes: float
    transmit: float
    total: float


PUBLISHED = {
    ("shape:qwen2.5-7b", "fp16"): Published(25, 0, 9.3, 780, 972),
    ("shape:qwen2.5-7b", "int8"): Published(18, 3.4, 4.7, 390, 579),
    ("shape:qwen2.5-7b", "int4"): Published(18, 2.8, 2.3, 195, 424),
    ("shape:qwen2.5-7b", "mixed"): Published(18, 2.7, 2.6, 216, 392),
    ("shape:mistral-7b-v0.3", "fp16"): Published(21, 0, 22.4, 1881, 2485),
    ("shape:mistral-7b-v0.3", "int8"): Published(22, 3.3, 11.2, 940, 1557),
    ("shape:mistral-7b-v0.3", "int4"): Published(22, 3.3, 5.6, 470, 1146),
    ("shape:qwen2.5-14b", "fp16"): Published(53, 0, 31.9, 2676, 3059),
    ("shape:qwen2.5-14b", "int8"): Published(56, 4.8, 15.9, 1338, 1730),
    ("shape:qwen2.5-14b", "int4"): Published(57, 4.8, 8.0, 669, 1124),
    ("shape:qwen2.5-14b", "mixed"): Published(57, 4.7, 8.5, 711, 1121),
}


def measured(runs: list[Path]) -> list[dict[str, Any]]:
    """Every trial of the runs: link, algorithm, setting, seconds, ratio to the formula; those that failed without seconds."""
    found = []
    for path in runs:
        run = load(path)
        for row in (*run.rows.to_dict("records"), *run.failed.to_dict("records")):
            failed = bool(row["error"])
            took = math.nan if failed else row["connect_s"] + row["busy_transmit_s"]
            found.append(
                {
                    "model": row["model"],
                    "codec": row["codec"],
                    "rate": row["rate_up_bps"],
                    "link": row["profile"],
                    "congestion": row["transport"].partition("=")[2].rstrip(")"),
                    "megabytes": row["payload_bytes"] / 1e6,
                    "link_s": took,
                    "naive_s": row["naive_s"],
                    "ratio": math.nan if failed else took / row["naive_s"],
                    "prefill_s": math.nan if failed else row["prefill_s"],
                    "e2e_s": math.nan if failed else row["e2e_s"],
                }
            )
    return found


def _kind(codec: str) -> str:
    return codec.partition("(")[0]


def _by_link(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each link and algorithm: how many times as long as the formula says, the least, middle and greatest of all settings;
    the 14B model's uncompressed cache over prefill and
    quantization, replayed; what INT8 saves of its total."""
    lines, quantize = [], PUBLISHED["shape:qwen2.5-14b", "int4"].quantize / 1e3  # which is the GPU's
    for link, congestion in dict.fromkeys((one["link"], one["congestion"]) for one in found):
        own = [one for one in found if (one["link"], one["congestion"]) == (link, congestion)]
        ratios = [one["ratio"] for one in own if not math.isnan(one["ratio"])]
        large = {one["codec"]: one for one in own if one["model"] == "shape:qwen2.5-14b"}
        whole, half = large.get("fp16"), large.get("int8(group=0, symmetric=true)") or large.get("int8")
        line = {"link": link, "congestion": congestion, "settings": len(own), "finished": len(ratios)}
        if ratios:
            line |= {"least": min(ratios), "middle": median(ratios), "greatest": max(ratios)}
        if whole and half:
            line |= {
                "fp16_s": whole["link_s"],
                "over_edge": whole["link_s"] / (whole["prefill_s"] + quantize),
                "int8_saves": 1 - half["e2e_s"] / whole["e2e_s"],
            }
        lines.append(line)
    return lines


def _by_setting(found: list[dict[str, Any]], easy: float, hard: float) -> list[dict[str, Any]]:
    """Each published row beside ours."""
    lines = []
    for model, codec in dict.fromkeys((one["model"], one["codec"]) for one in found):
        own = [one for one in found if (one["model"], one["codec"]) == (model, codec)]
        known = PUBLISHED.get((model, _kind(codec))) if "@" not in codec else None
        line: dict[str, Any] = {
            "model": model.removeprefix("shape:"),
            "codec": codec,
            "megabytes": own[0]["megabytes"],
            "published_megabytes": known and known.megabytes,
            "published_s": known and known.transmit / 1e3,
        }
        for name, rate in (("easy", easy), ("hard", hard)):
            times = [one["link_s"] for one in own if one["rate"] == rate and not math.isnan(one["link_s"])]
            line |= {
                f"{name}_least_s": min(times, default=math.nan),
                f"{name}_greatest_s": max(times, default=math.nan),
            }
            line[f"{name}_naive_s"] = next((one["naive_s"] for one in own if one["rate"] == rate), math.nan)
        lines.append(line)
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measured(options.runs)
    links, settings = _by_link(found), _by_setting(found, 100e6, 10e6)
    if options.json:
        print(json.dumps({"links": links, "settings": settings, "trials": found}, indent=1))
        return
    print(
        "| link | | ÷ bytes over rate: least, middle, greatest | 14B in 16 bits, s | ÷ prefill | INT8 saves | finished |"
    )
    print("|---|---|---|--:|--:|--:|--:|")
    for line in links:
        spread = ", ".join(f"{line[key]:.2f}" for key in ("least", "middle", "greatest") if key in line)
        large = (
            f"{line['fp16_s']:.2f} | {line['over_edge']:.0f} | {line['int8_saves']:.0%}"
            if "fp16_s" in line
            else " | | "
        )
        print(
            f"| {line['link']} | {line['congestion']} | {spread} | {large} | {line['finished']} of {line['settings']} |"
        )
    print()
    print("| model | codec | MB (published) | 100 Mbit/s, s (published) | 10 Mbit/s, s (bytes over rate) |")
    print("|---|---|---|---|---|")
    for line in settings:
        bytes_known = f" ({line['published_megabytes']})" if line["published_megabytes"] else ""
        known = f" ({line['published_s']:.2f})" if line["published_s"] else ""
        print(
            f"| {line['model']} | `{line['codec']}` | {line['megabytes']:.1f}{bytes_known} | "
            f"{line['easy_least_s']:.2f} to {line['easy_greatest_s']:.2f}{known} | "
            f"{line['hard_least_s']:.1f} to {line['hard_greatest_s']:.1f} ({line['hard_naive_s']:.1f}) |"
        )


if __name__ == "__main__":
    main()
