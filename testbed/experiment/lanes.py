"""How many lanes a machine carries: shards that it makes at once, none of which moves another's links or times.

It is measured once (`measure`), with 1, 2, 4, … networks at once, each calibrated while a flow fills every other; and once more
with a stand-in of its compute beside each. The outcome is kept with the machine it was measured on, and what is asked for is held
against that (`check`) before anything is built.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from testbed import descriptors
from testbed.errors import NetworkError, StorageError, UsageError
from testbed.experiment.compute import WARNED
from testbed.experiment.scenario import Plan
from testbed.files import read, replace, storing
from testbed.models.shapes import is_shape
from testbed.net.calibration.calibrate import Calibration, calibrate
from testbed.net.calibration.capacity import LATE_S
from testbed.net.calibration.load import loaded
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology

MOST = 8
"""As many as are tried unless told otherwise."""
PROFILE = "5g-good"
_ATTEMPTS, _ALONE_S = 2, 2.0
HOW = "sudo testbed doctor --lanes"


class Step(msgspec.Struct, frozen=True):
    """So many lanes at once. The worst of all lanes and both ways: of the rate as a fraction of what was asked, of the median
    delay in seconds, of the fraction lost; None: unknown. slowdown: of computing, against alone; None: nothing computed."""

    lanes: int
    rate_error: float | None
    delay_error_s: float | None
    loss_error: float | None
    worst_lateness_s: float
    slowdown: float | None
    cause: str  # what was out of tolerance; empty: nothing

    @property
    def ok(self) -> bool:
        return not self.cause


class Lanes(msgspec.Struct, frozen=True):
    """What a machine was measured to carry, each lane's link at `rate_bps`; 0: not even one."""

    machine: dict[str, Any]
    emulator: str
    profile: str
    rate_bps: float
    replayed: int  # that wait for compute, and compute none
    computing: int  # that compute
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return f"{self.replayed} where compute is replayed, {self.computing} that compute, of {self.profile}, {self.emulator}"


def measure(
    build: Callable[[Topology], Any],
    machine: dict[str, Any],
    say: Callable[[str], None],
    most: int = MOST,
    profile: str = PROFILE,
) -> Lanes:
    """Measures it now: about ten seconds a lane, of twice 1, 2, 4, … up to *most*. *build* makes a `Fabric` of a topology, *say*
    takes a line about each step. Raises what both raise, and NetworkError."""
    steps: list[Step] = []
    carried, emulator = {False: 0, True: 0}, ""
    alone = statistics.median(_rounds(1, lambda: time.sleep(_ALONE_S)))
    for computing in carried:
        for lanes in counts(most if not computing else min(most, carried[False])):
            for _ in range(_ATTEMPTS):
                emulator, step = _step(build, lanes, profile, alone if computing else None)
                steps.append(step)
                say(line(step))
                if step.ok:
                    break
            if not steps[-1].ok:
                break
            carried[computing] = lanes
    rate = parse_profile(profile).up.mean_rate_bps("up") or 0.0
    return Lanes(machine, emulator, profile, rate, carried[False], carried[True], tuple(steps))


def counts(most: int) -> list[int]:
    """1, 2, 4, … and the most itself."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most] if most else []


def line(step: Step) -> str:
    """A step, for people."""
    how = "waiting" if step.slowdown is None else f"computing, {step.slowdown:.2f} times as long as alone"
    return (
        f"{step.lanes} lane{'s' * (step.lanes > 1)}, {how}: rate {_shown(step.rate_error, 100, '%')}, "
        f"delay {_shown(step.delay_error_s, 1e3, ' ms')}, loss {_shown(step.loss_error, 100, '%')}, late by "
        f"{1e3 * step.worst_lateness_s:.1f} ms at most: {'carried' if step.ok else step.cause}"
    )


def _shown(value: float | None, scale: float, unit: str) -> str:
    return "-" if value is None else f"{scale * value:+.2f}{unit}"


def _step(
    build: Callable[[Topology], Any], lanes: int, profile: str, alone_s: float | None
) -> tuple[str, Step]:
    """So many networks, each calibrated while the others are full, and all compute where it is said how long that takes alone."""
    topology = Topology(
        "lane", (Node("edge"), Node("cloud")), (Link("access", "edge", "cloud", parse_profile(profile)),)
    )
    found: list[Calibration] = []
    with contextlib.ExitStack() as stack:
        fabrics = [stack.enter_context(build(topology)) for _ in range(lanes)]

        def probe() -> None:
            for own in fabrics:
                with contextlib.ExitStack() as load:
                    for other in fabrics:
                        if other is not own:
                            load.enter_context(loaded(other, other.topology.links))
                    found.append(calibrate(own, "access", topology.links[0].profile, quick=True, attempts=1))

        slowdown = None
        if alone_s is None:
            probe()
        else:
            slowdown = max(statistics.median(rounds) for rounds in _each(lanes, probe)) / alone_s
        late = max(c.worst_lateness_s for own in fabrics for c in own.counters("access").values())
        emulator = fabrics[0].emulator.name
    return emulator, judged(lanes, found, late, slowdown)


def judged(lanes: int, found: list[Calibration], late_s: float, slowdown: float | None) -> Step:
    """What so many lanes' calibrations, lateness and slowdown come to."""
    causes = [f"link of lane {number}: {own.cause}" for number, own in enumerate(found, 1) if not own.ok]
    if late_s > LATE_S:
        causes.append(f"a packet left {1e3 * late_s:.1f} ms late")
    if slowdown is not None and slowdown > WARNED:
        causes.append(f"computing takes {slowdown:.2f} times as long as alone")
    rate, delay, loss = (_worst(found, what, what == "rate") for what in ("rate", "delay", "loss"))
    return Step(lanes, rate, delay, loss, late_s, slowdown, "; ".join(causes))


def _worst(found: list[Calibration], what: str, relative: bool) -> float | None:
    off = [
        (check.measured - check.asked) / (check.asked if relative else 1)
        for own in found
        for check in own.checks
        if check.what == what and check.measured is not None and check.asked is not None
    ]
    return max(off, key=abs) if off else None


def _rounds(lanes: int, block: Callable[[], None]) -> list[float]:
    return [seconds for each in _each(lanes, block) for seconds in each]


def _each(lanes: int, block: Callable[[], None]) -> list[list[float]]:
    """Each lane's rounds of the stand-in's computing (see `burn`) while the block runs, in seconds. Raises NetworkError."""
    with contextlib.ExitStack() as stack:
        burning = [stack.enter_context(_burning()) for _ in range(lanes)]
        for pipe in burning:
            _drained(pipe, wait=True)  # it has begun
        block()
        rounds = [_drained(pipe, wait=False) for pipe in burning]
    if not all(rounds):
        raise NetworkError("computing beside the links: a stand-in computed nothing meanwhile")
    return rounds


@contextlib.contextmanager
def _burning() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-m", "testbed.experiment.burn"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.fileno()
        finally:
            child.kill()


def _drained(pipe: int, wait: bool) -> list[float]:
    """The whole lines that are in the pipe by now; `wait`: for the first. A pipe holds 64 KiB: ten minutes of rounds."""
    if wait and not descriptors.ready([pipe], 60.0):
        return []
    text = b""
    while descriptors.ready([pipe], 0) and (more := os.read(pipe, 1 << 16)):
        text += more
    return [float(number) for number in text.split(b"\n")[:-1]]


def keep(found: Lanes, path: Path) -> None:
    """Write it where it is looked for. Raises StorageError."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, msgspec.json.format(msgspec.json.encode(found)))


def load_lanes(path: Path, machine: dict[str, Any]) -> Lanes | None:
    """What was measured on this very *machine*; None where nothing was, or the file is none of ours."""
    try:
        found = msgspec.json.decode(read(path), type=Lanes)
    except (OSError, StorageError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if found.machine == machine else None


def check(plan: Plan, lanes: int) -> list[str]:
    """Sentences for people about so many lanes of a plan on this machine: how to measure, where nothing was. Raises UsageError
    where they are more than it was measured to carry."""
    from testbed.experiment.environment import lanes as known

    return held(plan, lanes, known())


def held(plan: Plan, lanes: int, known: Lanes | None) -> list[str]:
    """The same against what is known."""
    if lanes <= 1:
        return []
    if plan.topology.kind == "hosts":
        raise UsageError(
            f"{lanes} lanes: the topology names its hosts, which all lanes would share; take one lane"
        )
    if known is None or plan.scenario.emulator not in ("auto", known.emulator):
        return [f"{lanes} lanes: whether this machine carries them was not measured; `{HOW}` does"]
    waits = all(map(is_shape, (plan.scenario.models.edge, plan.scenario.models.cloud)))
    most, what = (known.replayed, "whose compute is replayed") if waits else (known.computing, "that compute")
    fastest = max(map(_fastest, plan.profiles), default=0.0)
    if lanes > max(1, most):
        raise UsageError(
            f"{lanes} lanes {what}: this machine was measured to carry {max(1, most)}; take as many, or measure again: {HOW}"
        )
    if lanes * fastest > most * known.rate_bps:
        return [
            f"{lanes} lanes with links of up to {fastest / 1e6:.0f} Mbit/s: measured were {most} of "
            f"{known.rate_bps / 1e6:.0f} Mbit/s ({known.profile})"
        ]
    return []


def _fastest(profile: Any) -> float:
    rates = [direction.mean_rate_bps(way) for way, direction in profile.ways.items()]
    return max((rate for rate in rates if rate is not None), default=0.0)
