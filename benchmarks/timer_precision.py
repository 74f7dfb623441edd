"""How late does a process wake that waits for a moment, and what does waiting cost it?

    sudo python -m benchmarks.timer_precision [--seconds 2] [--json]

The ways in which a relay can wait for its next packet's departure while it also waits for packets to arrive: the timeouts of
select(2) and epoll_wait(2), a timer as a file descriptor (timerfd_create(2)) among those of select, and each of them set a little
early, the rest being spun away. Each with real-time scheduling (SCHED_FIFO) and without, with idle cores and with a busy process
of ordinary priority on every one. The moments are random, 0.1 to 1 ms apart, as those of packets on a fast link. Lateness
is from the moment asked for to when the process goes on; the CPU share is that of its own time, user and system.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from time import monotonic, process_time
from typing import Any

from testbed.net.calibration.calibrate import busy_cores

NEAREST_S, FARTHEST_S = 0.1e-3, 1e-3
PRIORITY = 2  # as the relay's
SPINS_US = (20, 50, 100)
_CLOCK_MONOTONIC, _TFD_NONBLOCK, _TFD_TIMER_ABSTIME = 1, 0o4000, 1

Wait = Callable[[float], object]
"""Returns at (or after) this time, seconds of CLOCK_MONOTONIC."""


class Timespecs(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


@dataclass(frozen=True)
class Lateness:
    """One way of waiting under one condition. Seconds; `cpu` is a fraction of one core."""

    way: str
    realtime: bool
    busy: bool
    p50_s: float
    p99_s: float
    worst_s: float
    cpu: float
    n: int


@contextlib.contextmanager
def ways() -> Iterator[dict[str, Wait]]:
    """Every way of waiting, by name. All of them watch a pipe, too, in which nothing arrives."""
    libc = ctypes.CDLL(None, use_errno=True)
    quiet, other = os.pipe()
    timer = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK)
    epoll = select.epoll()
    epoll.register(quiet, select.EPOLLIN)

    def by_select(due: float) -> None:
        select.select([quiet], [], [], max(0.0, due - monotonic()))

    def by_epoll(due: float) -> None:
        epoll.poll(max(0.0, due - monotonic()))  # whole milliseconds, rounded up

    def by_timerfd(due: float) -> None:
        at = Timespecs(0, 0, int(due), int(due % 1 * 1e9))
        libc.timerfd_settime(timer, _TFD_TIMER_ABSTIME, ctypes.byref(at), None)
        select.select([quiet, timer], [], [])
        os.read(timer, 8)

    def spinning(wait: Wait, early_s: float) -> Wait:
        def by_spinning(due: float) -> None:
            if due - early_s > monotonic():
                wait(due - early_s)
            while monotonic() < due:
                pass

        return by_spinning

    found: dict[str, Wait] = {"select": by_select, "epoll": by_epoll, "timerfd": by_timerfd}
    for spin in SPINS_US:
        found[f"select, {spin} us spun"] = spinning(by_select, spin * 1e-6)
        found[f"timerfd, {spin} us spun"] = spinning(by_timerfd, spin * 1e-6)
    try:
        yield found
    finally:
        epoll.close()
        for descriptor in (quiet, other, timer):
            os.close(descriptor)


def measure(way: str, realtime: bool, busy: bool, seconds: float) -> Lateness:
    """In a process of its own, whose scheduling nothing else shares. Raises PermissionError where real time is not permitted."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            if realtime:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
            with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
                slack.write("1")
            os.write(writing, json.dumps(_wait(way, seconds)).encode())
            status = 0
        os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise PermissionError("real-time scheduling is not permitted; run it with sudo")
    late, cpu = json.loads(said)
    late.sort()
    n = len(late)
    return Lateness(way, realtime, busy, late[n // 2], late[int(0.99 * n)], late[-1], cpu, n)


def _wait(way: str, seconds: float) -> tuple[list[float], float]:
    """Every lateness, and the share of a core."""
    chance, late = random.Random(1), []
    with ways() as known:
        wait = known[way]
        begun, used = monotonic(), process_time()
        due = begun
        while due < begun + seconds:
            # From when it went on: lateness is not to be handed on to the next moment.
            due = monotonic() + chance.uniform(NEAREST_S, FARTHEST_S)
            wait(due)
            late.append(monotonic() - due)
        return late, (process_time() - used) / (monotonic() - begun)


def report(found: list[Lateness]) -> str:
    """A line for each."""
    lines = [
        f"{'waiting by':24} {'scheduling':10} {'cores':5} {'p50':>9} {'p99':>9} {'worst':>10} {'CPU':>6} {'n':>6}"
    ]
    for one in found:
        times = " ".join(
            f"{1e6 * value:{width}.0f} us"
            for value, width in ((one.p50_s, 6), (one.p99_s, 6), (one.worst_s, 7))
        )
        scheduling, cores = "real time" if one.realtime else "ordinary", "busy" if one.busy else "idle"
        lines.append(f"{one.way:24} {scheduling:10} {cores:5} {times} {100 * one.cpu:5.1f}% {one.n:6}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way under each condition")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ways() as known:
        names = list(known)
    found: list[Lateness] = []
    try:
        for busy in (False, True):
            with busy_cores(busy):
                found += [
                    measure(name, real, busy, options.seconds) for real in (True, False) for name in names
                ]
    except PermissionError as error:
        print(error, file=sys.stderr)
        return 2
    values: list[dict[str, Any]] = [asdict(one) for one in found]
    print(json.dumps(values, indent=1) if options.json else report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
