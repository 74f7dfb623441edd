"""How much a link and a server carry, and how long requests take meanwhile: closed loops of ever more edges.

    sudo .venv/bin/python -m benchmarks.load [--edges 1 2 4 8 16] [--seconds 60] [--shared] [--json]

Each edge has one client that asks again at once. Of each number: requests a second, what the busiest part carries at most (the
link that all edges share, or theirs; the server), median and 95th percentile up to the first token, and who waits where. A link
carries its rate over a payload's bytes with the headers of their packets; a server, one at a time, one over what a request takes
there with the fewest edges, without the answer's way back.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from benchmarks.runs import rows

#: Of a packet of 1,500 bytes, what is TCP's data behind IPv4 and TCP headers with timestamps.
_SHARE = 1448 / 1500


def line(
    found: Sequence[dict[str, Any]], edges: int, seconds: float, shared: bool, served_s: float | None = None
) -> dict[str, Any]:
    """What a number of edges came to. `served_s`: what a request takes of the server; None: what these took."""
    counted = [row for row in found if not row["warmup"] and not row["error"]]
    # Those that ended in the stretch that counts, so that what is left over at either end is the same.
    began = min(row["arrived_at"] for row in counted)
    ended = [
        row
        for row in found
        if not row["error"] and began <= row["arrived_at"] + row["e2e_s"] < began + seconds
    ]
    rate = len(ended) / seconds
    payload = fmean(row["payload_bytes"] for row in counted)
    link = counted[0]["rate_up_bps"] * _SHARE / 8 / payload * (1 if shared else edges)
    served_s = served_s or fmean(
        row["busy_decode_s"] + row["busy_first_token_s"] + row["busy_generate_s"] - row["delay_down_s"]
        for row in counted
    )
    limits = (
        {"link": link, "server": 1 / served_s} if counted[0]["serving"].startswith("fifo") else {"link": link}
    )
    by = min(limits, key=lambda name: limits[name])
    first = [row["ttft_s"] for row in counted]
    return {
        "edges": edges,
        "n": len(counted),
        "failed": sum(bool(row["error"]) for row in found),
        "requests_per_s": rate,
        "limit_per_s": limits[by],
        "limited_by": by,
        "served_s": served_s,
        "of_limit": rate / limits[by],
        "ttft_p50_s": median(first),
        "ttft_p95_s": quantiles(first, n=20)[-1] if len(first) > 1 else first[0],
        "transmit_p50_s": median(row["transmit_s"] for row in counted),
        **{
            f"{stage}_mean_s": fmean(row[stage] for row in counted)
            for stage in ("edge_queue_s", "link_queue_s", "queue_s")
        },
        "not_kept_up": sum(bool(row["warnings"]) for row in counted),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edges", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--rate", type=float, default=60, help="Mbit/s of the shared link, or of each edge's own"
    )
    parser.add_argument("--shared", action="store_true", help="all edges behind one link")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--serving", default="fifo")
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for edges in sorted(options.edges):
        with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as folder:
            topology = Path(folder) / "topology.yaml"
            kind = "shared-bottleneck" if options.shared else "star"
            own = "rate=1gbit,delay=1ms" if options.shared else f"rate={options.rate:g}mbit,delay=5ms"
            topology.write_text(f"{{kind: {kind}, nodes: 3, profile: '{own}', congestion: cubic}}")
            found = rows(
                topology=str(topology),
                cloud="cloud" if options.shared else "hub",
                edges=edges,
                profiles=[f"rate={options.rate:g}mbit,delay=5ms"],
                model="shape:llama-3.1-8b",
                compute={"edge": "device:m1-max-llama-3.1-8b", "cloud": "device:rtx-4090-llama-3.1-8b"},
                codecs=["int4"],
                tasks=["needle"],
                context_tokens=options.tokens,
                examples=4,
                max_new_tokens=4,
                load="closed",
                serving=options.serving,
                duration=f"{options.seconds:g}s",
                warmup="5s",
                emulator=options.emulator,
            )
        served_s = lines[0]["served_s"] if lines else None
        lines.append(line(found, edges, options.seconds, options.shared, served_s))
        if not options.json:
            print(json.dumps(lines[-1]))
    if options.json:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        about = {"load": os.getloadavg()[0], "largest_process_bytes": peak}
        print(json.dumps({**about, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
