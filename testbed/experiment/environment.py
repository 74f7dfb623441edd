"""What this machine is and can do: for the manifest, and for `testbed doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import __version__

if TYPE_CHECKING:
    from testbed.experiment.lanes import Lanes
    from testbed.experiment.scenario import Plan
    from testbed.net.calibration.capacity import Capacity
    from testbed.net.topology.topology import Topology

_PACKAGES = ("torch", "transformers", "pyroute2", "numpy", "pandas", "msgspec", "zstandard", "safetensors")


def describe_host() -> dict[str, Any]:
    """Versions, kernel and processor, without importing anything heavy."""
    packages = {"testbed": __version__}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "packages": packages,
    }


def _machine() -> dict[str, Any]:
    """What a measurement of this machine's speed holds for."""
    return {"kernel": platform.release(), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}


def _capacity_file() -> Path:
    from testbed.models.sources import cache_directory

    return cache_directory() / "capacity.json"


def capacity() -> Capacity | None:
    """What this machine was measured to carry over its links; None: it was not, or was another machine then."""
    from testbed.net.calibration.capacity import load_capacity

    return load_capacity(_capacity_file(), _machine())


def measure_capacity(say: Callable[[str], None]) -> Capacity:
    """Measures it and keeps it. *say* takes a line a step. Raises UsageError without root; NetworkError, StorageError."""
    import msgspec

    from testbed.files import replace, storing
    from testbed.net.calibration.capacity import measure
    from testbed.net.fabric.fabric import Fabric

    found, path = measure(Fabric.build, _machine(), say), _capacity_file()
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, msgspec.json.format(msgspec.json.encode(found)))
    return found


def _lanes_file() -> Path:
    return _capacity_file().with_name("lanes.json")


def lanes() -> Lanes | None:
    """How many lanes this machine was measured to carry; None: it was not, or was another machine then."""
    from testbed.experiment.lanes import load_lanes

    return load_lanes(_lanes_file(), _machine())


def measure_lanes(say: Callable[[str], None], most: int) -> Lanes:
    """Measures it, up to so many, and keeps it. Raises as `measure_capacity` does."""
    from testbed.experiment.lanes import keep, measure
    from testbed.net.fabric.fabric import Fabric

    found = measure(Fabric.build, _machine(), say, most)
    keep(found, _lanes_file())
    return found


def beyond_capacity(topology: Topology, emulator: str = "auto") -> list[str]:
    """See `testbed.net.calibration.capacity.beyond`."""
    from testbed.net.calibration.capacity import beyond

    return beyond(topology, capacity(), emulator)


def too_much(plan: Plan) -> list[str]:
    """The same of a plan's topology, under each of its profiles."""
    under = [beyond_capacity(plan.under(profile), plan.scenario.emulator) for profile in plan.profiles]
    return list(dict.fromkeys(remark for remarks in under for remark in remarks))


def host_name() -> str:
    """This machine's name, as rows have it."""
    return socket.gethostname()


def cpu_name() -> str:
    """Its processor's."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str
    needed: bool = True  #: a run cannot do without it


def examine() -> list[Finding]:
    """What a run would need, each looked at in turn."""
    from testbed.hosts import rootless
    from testbed.models.sources import available

    root, rootless_not = os.geteuid() == 0, rootless.obstacle()
    no_root = "no: networks are built by `sudo testbed run`; plan, plot and models need none"
    return [
        Finding("python", sys.version_info >= (3, 11), platform.python_version()),
        Finding("root", root, "yes" if root else no_root, False),
        Finding("rootless", not rootless_not, rootless_not or "testbed run --rootless works here", False),
        _packet_sockets(root),
        _netem(root),
        _capacity(),
        _lanes(),
        _program("nsenter", "util-linux"),
        _program("setpriv", "util-linux"),
        _program("iperf3", "iperf3", needed=False),
        _congestion(),
        _cuda(),
        *(
            Finding(
                f"model {m.name}",
                m.fetched,
                "ready" if m.fetched else f"testbed models fetch {m.name}",
                False,
            )
            for m in available()
        ),
    ]


def _packet_sockets(root: bool) -> Finding:
    from testbed.errors import TestbedError
    from testbed.net.emulators.relay.userspace import require_packet_sockets

    obstacle = "" if root else "unknown without root"
    try:
        if root:
            require_packet_sockets()
    except TestbedError as error:
        obstacle = str(error)
    return Finding("packet sockets", not obstacle, obstacle or "for the userspace emulator", False)


def _netem(root: bool) -> Finding:
    from testbed.net.emulators.netem import support

    able = root and support.available()
    lacking = (
        "this kernel has no sch_netem; links use the userspace emulator" if root else "unknown without root"
    )
    return Finding("netem", able, "the kernel's own emulator" if able else lacking, False)


def _capacity() -> Finding:
    found = capacity()
    return Finding(
        "link rates", found is not None, str(found or "not measured: sudo testbed doctor --links"), False
    )


def _lanes() -> Finding:
    found = lanes()
    return Finding(
        "lanes", found is not None, str(found or "not measured: sudo testbed doctor --lanes"), False
    )


def _program(name: str, package: str, needed: bool = True) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or f"not found: apt-get install {package}", needed)


def _congestion() -> Finding:
    try:
        offered = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().strip()
    except OSError:
        offered = ""
    return Finding("congestion control", bool(offered), offered, False)


def _cuda() -> Finding:
    devices = sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*"))
    return Finding("GPU", bool(devices), ", ".join(devices) or "none: models run on the CPU", False)
