"""By how much a replay of a recording misses the round trips of the link that was recorded, by what it replays.

    .venv/bin/python -m benchmarks.replayed_delay [--profiles lte 5g-mid …] [--seconds 20] [--json]

Each link is a preset without its losses, as the relay imposes it, in logical time (no network, no clock). Of it three trains are
recorded each way, as CellReplay does it: single small packets, packets at nine tenths of the rate, and packets without a pause,
of which the delivery times are kept. Then it is replayed

- `times`: by delivery times alone, under the least delay of a single packet, as Mahimahi's mm-link behind mm-delay;
- `light`: by a table of rates, and of single packets' delays (`delay_ms`);
- `pair`: the same with the delay under load beside it (`loaded_delay_ms`),

and what crosses the link itself, by other random numbers, is compared with what crosses each replay: the round trip of a single
packet, and that of a burst of so many bytes with a small packet back; medians, and the share that the replay's is off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.line import Line
from testbed.net.emulators.relay.orders import direction_conditions
from testbed.net.profile.presets import PRESETS
from testbed.net.profile.profile import Profile, parse_profile
from testbed.net.profile.trace import WAYS, Way

SMALL, FULL, FRAME = 100, 1500, 24
STEP_S = 0.1  # a table's row
PROBE_S = 0.02  # between two single packets
BURSTS = (15_000, 60_000, 250_000)
Floats = npt.NDArray[np.float64]


def crossed(profile: Profile, way: Way, packets: Iterable[tuple[float, int]], seed: int) -> Floats:
    """When each of these packets (seconds, bytes) leaves the link."""
    left: list[tuple[float, int]] = []
    now = 0.0
    line = Line(lambda frame: left.append((now, int.from_bytes(frame[:8]))), seed)
    schedule = profile.ways[way].schedule(way, 0.0)
    conditions = direction_conditions(profile, way)
    line.apply(Conditions.from_plain(conditions.plain() | {"queue_bytes": 1 << 30}, schedule), 0.0)
    count = 0

    def until(time_s: float) -> None:
        nonlocal now
        while line.leaves <= time_s and line.leaves < inf:
            now = line.leaves
            line.advance(now)

    for number, (at, size) in enumerate(packets):
        until(at)
        line.enter(number.to_bytes(8) + bytes(FRAME - 8 + size), at)
        count = number + 1
    until(1e9)
    times = np.full(count, np.nan)
    for at, number in left:
        times[number] = at
    return times


def every(seconds: float, apart_s: float, size: int) -> list[tuple[float, int]]:
    """A packet of that size every so often."""
    return [(float(at), size) for at in np.arange(0.0, seconds, apart_s)]


def recorded(profile: Profile, way: Way, seconds: float, seed: int) -> dict[str, Floats]:
    """Times of the three trains: `light` and `loaded` delays, `delivered`."""
    rate = profile.ways[way].mean_rate_bps(way)
    assert rate is not None
    light, loaded = every(seconds, PROBE_S, SMALL), every(seconds, FULL * 8 / rate / 0.9, FULL)
    full = every(seconds, FULL * 8 / rate / 1.05, FULL)
    return {
        "light": crossed(profile, way, light, seed) - [at for at, _ in light] - SMALL * 8 / rate,
        "loaded": crossed(profile, way, loaded, seed + 1) - [at for at, _ in loaded] - FULL * 8 / rate,
        "delivered": crossed(profile, way, full, seed + 2),
    }


def rows(trains: dict[str, Floats], seconds: float) -> list[tuple[float, float, float, float]]:
    """A table's: seconds, Mbit/s, and both delays in milliseconds, each the mean of its stretch."""
    begins = np.arange(0.0, seconds, STEP_S)[10:]  # once the train without a pause has filled the link
    made = []
    for begin in begins:
        delays = []
        for name in ("light", "loaded"):
            at = np.linspace(0.0, seconds, len(trains[name]), endpoint=False)
            own = trains[name][(at >= begin) & (at < begin + STEP_S)]
            delays.append(1e3 * float(own.mean()))
        came = ((trains["delivered"] >= begin) & (trains["delivered"] < begin + STEP_S)).sum()
        made.append((begin - begins[0], came * FULL * 8 / STEP_S / 1e6, *delays))
    return made


def replays(profile: Profile, seconds: float, seed: int, folder: Path) -> dict[str, Profile]:
    """What was recorded of a link, by how it is replayed."""
    written: dict[str, list[str]] = {"times": [], "light": [], "pair": []}
    for number, way in enumerate(WAYS):
        trains = recorded(profile, way, seconds, seed + 10 * number)
        first = trains["delivered"][trains["delivered"] >= 1.0]
        times, table = folder / f"{way}.times", folder / f"{way}.csv"
        times.write_text("".join(f"{int(1e3 * (at - first[0]))}\n" for at in first))
        lines = [",".join(f"{value:.6g}" for value in row) for row in rows(trains, seconds)]
        table.write_text("time_s,rate_mbps,delay_ms,loaded_delay_ms\n" + "\n".join(lines) + "\n")
        alone = folder / f"{way}-light.csv"
        alone.write_text("\n".join(line.rpartition(",")[0] for line in table.read_text().split()) + "\n")
        least = 1e3 * float(trains["light"].min())
        written["times"].append(f"{way}:delay={least:.3f}ms,trace:{times}")
        written["light"].append(f"{way}:trace:{alone}")
        written["pair"].append(f"{way}:trace:{table}")
    return {name: parse_profile(";".join(ways)) for name, ways in written.items()}


def round_trips(profile: Profile, size: int, seconds: float, seed: int) -> Floats:
    """Of bursts of so many bytes, one behind the other with a pause: from the first packet's going to the small one's return."""
    rate = profile.ways["up"].mean_rate_bps("up")
    assert rate is not None
    apart, sizes = max(PROBE_S, 3 * size * 8 / rate), [FULL] * (size // FULL) or [size]
    begins = np.arange(0.0, seconds, apart)
    up = crossed(profile, "up", [(float(at), each) for at in begins for each in sizes], seed)
    there = up.reshape(len(begins), len(sizes)).max(axis=1)
    return crossed(profile, "down", [(float(at), SMALL) for at in there], seed + 1) - begins


def compared(name: str, seconds: float, seed: int = 1) -> list[dict[str, Any]]:
    """A preset's rows, without its losses: one a size."""
    preset = PRESETS[name]
    profile = parse_profile(
        ";".join(
            f"{way}:rate={d.rate_bps:.0f}bit,delay={1e3 * d.delay_s:g}ms,jitter={1e3 * d.jitter_s:g}ms"
            for way, d in preset.ways.items()
        )
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        made = replays(profile, seconds, seed, Path(folder))
        for size in (SMALL, *BURSTS):
            truth = median(round_trips(profile, size, seconds, seed + 100))
            off = {
                how: median(round_trips(p, size, seconds, seed + 200)) / truth - 1 for how, p in made.items()
            }
            found.append({"profile": name, "bytes": size, "round_trip_s": truth, **off})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", nargs="+", default=["lte", "5g-mid", "5g-edge", "leo", "wifi"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = [line for name in options.profiles for line in compared(name, options.seconds)]
    if options.json:
        print(json.dumps(lines))
        return
    print(f"{'profile':<8} {'bytes':>8} {'round trip':>11} {'times':>8} {'light':>8} {'pair':>8}")
    for line in lines:
        shares = "  ".join(f"{line[how]:>+7.1%}" for how in ("times", "light", "pair"))
        print(f"{line['profile']:<8} {line['bytes']:>8} {1e3 * line['round_trip_s']:>8.1f} ms {shares}")


if __name__ == "__main__":
    main()
