"""A whole run over SSH to a host whose clock is another: 3 s ahead (a time namespace) and 50 ppm fast (libfaketime), over a link
that is slower one way than the other. Both share a kernel, whose own clock says how far what the run has made of the other's
is off; each host's processes tell what they read beside it."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from tests.hosts import bench as benches
from tests.hosts.bench import Host, bench
from tests.runs import rows, run, undrawn

_FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
_MISSING = benches.missing() or ("" if _FAKETIME else "needs faketime")

pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_state"),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "-"),
]

AHEAD_S, FAST = 3, 50e-6
#: 10 ms there and back, and three quarters of it one way: an error of 3 ms where 5 are stated.
UNDER = "up:rate=8mbit,delay=2ms;down:rate=8mbit,delay=8ms"
SCENARIO = """\
name: clocks
placements: [split, cloud]
codecs: [fp16]
delivery: [whole, stream(chunk=128)]
tasks: [needle]
context_tokens: 300
examples: 1
threads: 1
max_new_tokens: 6
"""
#: What every Python of a host tells: what its clock says beside the kernel's own, and what became of the cloud's times.
WATCH = """\
import atexit, ctypes, json, os, sys, threading, time
class _Time(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
_libc, _time = ctypes.CDLL(None), _Time()
def _kernel():
    _libc.syscall(@NUMBER@, 1, ctypes.byref(_time))
    return _time.s + _time.ns / 1e9
_file = open(f"{os.environ['WATCHED']}/{os.getpid()}", "w", buffering=1)
def _tell(*what):
    _file.write(json.dumps(what) + "\\n")
def _compare():
    pairs = []
    for _ in range(20):
        before = _kernel(); own = time.monotonic(); pairs.append((_kernel() - before, before, own))
    width, before, own = min(pairs)
    _tell("clock", own, before, width)
def _watch():
    while True:
        _compare(); time.sleep(0.5)
_tell("program", sys.orig_argv)
if "testbed.endpoints" in " ".join(sys.orig_argv):
    atexit.register(_compare)
    threading.Thread(target=_watch, daemon=True).start()
    from testbed.endpoints import clocks
    _at = clocks.Here._at
    def _told(self, there, least, most):
        here = _at(self, there, least, most)
        _tell("time", there, here, self._clock.error_s, self._clock.ahead_s)
        return here
    clocks.Here._at = _told
"""


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    between = Topology(
        "between", (Node("edge"), Node("cloud")), (Link("access", "edge", "cloud", parse_profile(UNDER)),)
    )
    with Fabric.build(between, "userspace") as fabric:
        nodes = {name: fabric.namespace(name) for name in ("edge", "cloud")}
        with bench(nodes, ahead_s={"cloud": AHEAD_S}) as made:
            yield made


@pytest.fixture
def watched() -> Iterator[Path]:
    """A folder for everybody, in which each host's Python (`edge`, `cloud`) tells what it reads (`edge.told/`, `cloud.told/`)."""
    with tempfile.TemporaryDirectory(prefix="tb-watched-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        number = {"x86_64": 228, "aarch64": 113}[
            platform.machine()
        ]  # of the system call, which nothing stands before
        (folder / "sitecustomize.py").write_text(WATCH.replace("@NUMBER@", str(number)))
        # libfaketime goes on from the real time of day, also for the monotonic clock.
        away = time.monotonic() + AHEAD_S - time.time()
        for host in ("edge", "cloud"):
            (folder / f"{host}.told").mkdir()
            (folder / f"{host}.told").chmod(0o777)
            lines = [
                "#!/bin/sh",
                '[ "$1" = -I ] && shift',
                f"export PYTHONPATH={folder} WATCHED={folder}/{host}.told",
            ]
            if host == "cloud":
                lines.append(f"export LD_PRELOAD={_FAKETIME} FAKETIME='{away:+.6f} x{1 + FAST}'")
            (folder / host).write_text("\n".join([*lines, f'exec {sys.executable} "$@"', ""]))
            (folder / host).chmod(0o755)
        yield folder


def told(folder: Path) -> list[list[Any]]:
    """What was told by the endpoint that lived longest there."""
    found = [[json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()]
    return max(found, key=len)


def test_times_across_two_clocks_are_off_by_no_more_than_the_stated_error(
    hosts: dict[str, Host], watched: Path, tiny_model: Any, tmp_path: Path
) -> None:
    ends = ", ".join(
        f"{name}: {{host: '{host.url}', python: {watched / name}, interface: eth0, device: cpu}}"
        for name, host in hosts.items()
    )
    link = "{name: access, a: edge, b: cloud, profile: measured}"
    (tmp_path / "real.yaml").write_text(f"nodes: {{{ends}}}\nlinks: [{link}]\n")
    (tmp_path / "clocks.yaml").write_text(f"{SCENARIO}model: {tiny_model('llama')}\ntopology: real.yaml\n")
    with undrawn():
        done = run(str(tmp_path / "clocks.yaml"), "--out", str(tmp_path / "out"))
    assert done.status == 0, done.errors
    found = rows(tmp_path / "out")
    assert found and not any(row["error"] for row in found)

    clock = [line for line in told(watched / "cloud.told") if line[0] == "clock"]
    own, kernel, width = (np.array([line[n] for line in clock]) for n in (1, 2, 3))
    kernel = kernel + width / 2 - AHEAD_S  # as edge's clock, which is the kernel's
    sure = width < 100e-6
    rate, start = np.polyfit(kernel[sure] - kernel[0], own[sure], 1)
    assert rate - 1 == pytest.approx(FAST, rel=0.1)
    assert own[0] - kernel[0] == pytest.approx(AHEAD_S, abs=0.1)

    times = [line for line in told(watched / "edge.told") if line[0] == "time"]
    there, here, stated, ahead = (np.array([line[n] for line in times]) for n in (1, 2, 3, 4))
    off = here - ((there - start) / rate + kernel[0])
    assert len(times) > 20 and (np.abs(off) <= stated + 100e-6).all(), (off, stated)
    assert (stated > 5e-3).all() and (stated < 50e-3).all()
    assert {row["clock_error_s"] for row in found} <= set(stated)
    assert {row["clock_offset_s"] for row in found} <= set(ahead)
    print(
        f"{len(times)} times: off by {1e3 * np.median(np.abs(off)):.2f} ms, {1e3 * np.abs(off).max():.2f} at most; stated "
        f"{1e3 * stated.min():.2f} to {1e3 * stated.max():.2f}; the clock {1e6 * (rate - 1):.1f} ppm fast"
    )
