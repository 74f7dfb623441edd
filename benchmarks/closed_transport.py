"""What closing the data path to strangers costs: seconds to connect, and megabytes a second over loopback, with and without.

    python -m benchmarks.closed_transport [--transport tcp quic] [--size 100mb] [--repeats 5] [--json]

Both ends in one process, so one processor's worth of Python serves both; the two ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from statistics import median
from typing import Any

from testbed.deadline import Deadline
from testbed.transport import wire
from testbed.transport.secret import secrets
from testbed.transport.transport import parse
from testbed.units import parse_size

_LONGEST_S = 120.0


def crossing(name: str, payload: bytes, is_closed: bool) -> tuple[float, float]:
    """Seconds to connect, and for the payload to be there."""
    serving, asking = secrets() if is_closed else (None, None)
    received: list[float] = []
    with parse(name).closed(serving).listen("127.0.0.1") as listener:

        def serve() -> None:
            stream = listener.accept()
            frame = stream.receive(len(payload), Deadline(_LONGEST_S))
            assert frame is not None and frame.payload == payload
            received.append(frame.at)
            stream.finish()

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        began = time.monotonic()
        client = parse(name).closed(asking).connect("127.0.0.1", listener.port, None, 10.0)
        connected = time.monotonic()
        client.send(wire.Chunk(1, 0, True, None), payload, Deadline(_LONGEST_S))
        server.join()
        client.finish()
    return connected - began, received[0] - connected


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transport", nargs="+", default=["tcp", "quic"])
    parser.add_argument("--size", default="100mb")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    payload = os.urandom(parse_size(options.size))
    lines: list[dict[str, Any]] = []
    for name in options.transport:
        taken = {is_closed: [] for is_closed in (False, True)}
        for _ in range(options.repeats):
            for is_closed, times in taken.items():
                times.append(crossing(name, payload, is_closed))
        for is_closed, times in taken.items():
            lines.append(
                {
                    "transport": name,
                    "closed": is_closed,
                    "n": len(times),
                    "connect_s": median(connect for connect, _ in times),
                    "mb_per_s": len(payload) / 1e6 / median(took for _, took in times),
                }
            )
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "lines": lines}, indent=1))
        return
    print(f"load {os.getloadavg()[0]:.1f}; {options.size}, medians of n = {options.repeats}\n")
    print("| transport | closed | connect, ms | MB/s |\n|---|---|--:|--:|")
    for line in lines:
        told = f"{1e3 * line['connect_s']:.2f} | {line['mb_per_s']:.0f}"
        print(f"| `{line['transport']}` | {'yes' if line['closed'] else 'no'} | {told} |")


if __name__ == "__main__":
    main()
