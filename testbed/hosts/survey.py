"""What a host has, told by a program that needs nothing there but some Python 3.8 or newer: its source is sent, its standard
output is one JSON value. See `asking`.

    survey            versions, memory, devices, room, kernel, clocks, interfaces
    echo ADDRESS      listens there and says on which port; sends back what comes, until its standard input ends
    reach ADDRESS PORT   connects to such an echo: round trips, the path's MTU, the route
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_TORCH = (
    "import json, torch; n = torch.cuda.device_count(); "
    "print(json.dumps([[torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory] for i in range(n)]))"
)
_PYTHON = (
    "import json, sys, importlib.util as u; "
    "print(json.dumps([list(sys.version_info[:3]), all(map(u.find_spec, ('venv', 'ensurepip')))]))"
)
_EXCHANGES, _CONNECT_S = 20, 3.0
_SIOCGIFCONF, _SIOCGIFMTU = 0x8912, 0x8921
_IFREQ = 16 + 2 * struct.calcsize("L") + 8  # bytes of a struct ifreq, netdevice(7)
_MOST_ADDRESSES = 4096
#: What may keep a clock right, as /proc names it.
_KEEPERS = frozenset({"chronyd", "ntpd", "phc2sys", "ptp4l", "systemd-timesyn"})
_PMTU = slice(60, 64)  # of the kernel's struct tcp_info: tcpi_pmtu


def _said(*argv: str, within_s: float = 20.0) -> tuple[int, str, str] | None:
    """Exit status and output of a program, or None where there is none, or it does not end."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=within_s,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace").strip()


def _text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(1 << 22)
    except OSError:
        return ""


def survey() -> dict[str, Any]:
    """Everything that can be told without a peer. What cannot be found out is empty."""
    memory = dict(re.findall(r"(\w+): +(\d+) kB", _text("/proc/meminfo")))
    model = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages(),
        "testbed": copy_of_testbed(),
        "gpus": _gpus(),
        "board": _text("/proc/device-tree/model").strip("\0\n"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": list(platform.libc_ver()),
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": 1024 * int(memory.get("MemTotal", 0)),
        "available_bytes": 1024 * int(memory.get("MemAvailable", 0)),
        "home": str(Path.home()),
        "congestion": _text("/proc/sys/net/ipv4/tcp_available_congestion_control").split(),
        "sch_netem": sch_netem(),
        "sudo": sudo(),
        "clock": clock(),
        "monotonic": monotonic(),
        "interfaces": interfaces(),
        "ssh_address": (os.environ.get("SSH_CONNECTION", "").split() + [""] * 4)[2],
    }


def packages() -> dict[str, str]:
    """Name, in its normal form, -> version of what this Python has installed."""
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:  # the first that is found is the one that is imported
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def copy_of_testbed(path: str = "") -> dict[str, str]:
    """Where the testbed is that this Python imports, and a digest of its source; empty: there is none."""
    if not path:
        from importlib.util import find_spec

        spec = find_spec("testbed")
        path = str(Path(spec.origin).parent) if spec and spec.origin else ""
    if not path:
        return {}
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            digest.update(
                str(file.relative_to(path)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest()
            )
    return {"path": path, "digest": digest.hexdigest()[:16]}


def torch() -> list[list[Any]] | str:
    """The GPUs that torch sees, as name and bytes; a text: why it cannot be asked. Importing it takes seconds."""
    said = _said(sys.executable, "-I", "-c", _TORCH, within_s=120.0)
    if said is None:
        return "no answer within 120 s"
    lines = (said[1] if said[0] == 0 else said[2]).strip().splitlines() or [f"it ended by status {said[0]}"]
    gpus: list[list[Any]] | str = json.loads(lines[-1]) if said[0] == 0 else lines[-1]
    return gpus


def pythons() -> dict[str, Any]:
    """Paths of Pythons -> their version, and whether they can make environments."""
    found: dict[str, Any] = {}
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        path = shutil.which(name)
        said = _said(path, "-I", "-c", _PYTHON) if path else None
        if path and said and said[0] == 0:
            found[path] = json.loads(said[1])
    return found


def room(path: str) -> int:
    """Bytes that are free where `path` is, or is to be."""
    place = Path(path).expanduser()
    while not os.path.exists(place):  # noqa: PTH110 (Path.exists fails where we may not look)
        place = place.parent
    return shutil.disk_usage(str(place)).free


def _gpus() -> list[str]:
    said = _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if said and said[0] == 0:
        return said[1].strip().splitlines()
    return sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))


def sch_netem() -> str:
    """Whether the kernel has it: ``loaded``, ``built in``, ``module``; ``no``; empty: the kernel's modules are not to be seen."""
    folder = "/lib/modules/" + platform.release()
    if Path("/sys/module/sch_netem").is_dir():
        return "loaded"
    if "sch_netem" in _text(folder + "/modules.builtin"):
        return "built in"
    if "sch_netem" in _text(folder + "/modules.dep"):
        return "module"
    return "no" if Path(folder).is_dir() else ""


def sudo() -> str:
    """``root``, ``yes`` (without a password), or why not."""
    if os.geteuid() == 0:
        return "root"
    python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else "python3"  # as for shaping
    said = _said("sudo", "-n", "--", python, "-I", "-S", "-c", "pass")
    if said is None:
        return "no sudo"
    return "yes" if said[0] == 0 else (said[2].splitlines() or ["no"])[-1]


def clock() -> dict[str, Any]:
    """What keeps the clock right: PTP's devices, what runs for it, chrony's or the system's own word."""
    found: dict[str, Any] = {"ptp": sorted(map(str, Path("/dev").glob("ptp[0-9]*")))}
    programs = {_text(f"{entry}/comm").strip() for entry in Path("/proc").glob("[0-9]*")}
    found["running"] = sorted(programs & _KEEPERS)
    tracking = _said("chronyc", "-n", "tracking", within_s=5.0)
    if tracking and tracking[0] == 0:
        found["chrony"] = {
            key.strip(): value.strip() for key, value in re.findall("(?m)^(.*?) *: (.*)$", tracking[1])
        }
    synchronized = _said("timedatectl", "show", "--property=NTPSynchronized", "--value", within_s=5.0)
    if synchronized and synchronized[0] == 0:
        found["synchronized"] = synchronized[1].strip() == "yes"
    return found


def monotonic() -> str:
    """Whose monotonic clock is read here: the running kernel's and the time namespace's (time_namespaces(7))."""
    namespace = Path("/proc/self/ns/time")
    own = namespace.readlink() if namespace.exists() else ""
    return f"{_text('/proc/sys/kernel/random/boot_id').strip()} {own}".strip()


def interfaces() -> dict[str, dict[str, Any]]:
    """Name -> IPv4 addresses, the first of them by itself, too, and MTU, of the interfaces that have one."""
    found: dict[str, dict[str, Any]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for name, address in _addresses(asked):
            if name not in found:
                try:
                    request = fcntl.ioctl(asked, _SIOCGIFMTU, struct.pack("256s", name.encode()))
                except OSError:  # it has gone
                    continue
                (mtu,) = struct.unpack("i", request[16:20])
                found[name] = {"address": address, "addresses": [], "mtu": mtu}
            found[name]["addresses"].append(address)
    return found


def _addresses(asked: socket.socket) -> list[tuple[str, str]]:
    # each with its interface's name; an address that has a label has the interface's before a colon
    data = ctypes.create_string_buffer(_MOST_ADDRESSES * _IFREQ)
    about = bytearray(struct.pack("iP", len(data), ctypes.addressof(data)))
    fcntl.ioctl(asked, _SIOCGIFCONF, about)
    (length,) = struct.unpack_from("i", about)
    found = []
    for at in range(0, length, _IFREQ):
        label = data.raw[at : at + 16].split(b"\0")[0].decode()
        found.append((label.partition(":")[0], socket.inet_ntoa(data.raw[at + 20 : at + 24])))
    return found


def echo(address: str) -> None:
    """Until standard input ends."""
    with socket.create_server((address, 0)) as listening:
        print(json.dumps(listening.getsockname()[1]), flush=True)
        with selectors.DefaultSelector() as waiting:  # select(2) would end with the thousandth who talks
            for file in (0, listening):
                waiting.register(file, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select():
                    if key.fileobj == 0:
                        return
                    if key.fileobj is listening:
                        waiting.register(listening.accept()[0], selectors.EVENT_READ)
                    elif isinstance(key.fileobj, socket.socket) and not _echoed(key.fileobj):
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()


def _echoed(talking: socket.socket) -> bool:
    """Whether something came, and was sent back."""
    try:
        data = talking.recv(4096)
        talking.sendall(data)
    except OSError:
        return False
    return bool(data)


def reach(address: str, port: int) -> dict[str, Any]:
    """How far an echo is, over TCP as a run's data; and by which way."""
    try:
        began = time.monotonic()
        with socket.create_connection((address, port), timeout=_CONNECT_S) as talking:
            connect_s = time.monotonic() - began
            talking.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(_EXCHANGES):
                began = time.monotonic()
                talking.sendall(b"?")
                if not talking.recv(1):
                    return {"error": "the connection was closed"}
                times.append(time.monotonic() - began)
            information = talking.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            own = talking.getsockname()[0]
    except OSError as error:  # a timeout, too
        return {"error": error.strerror or f"no answer within {_CONNECT_S:g} s"}
    through = next((name for name, end in interfaces().items() if own in end["addresses"]), "")
    return {
        "connect_s": connect_s,
        "rtt_s": min(times),
        "rtt_median_s": sorted(times)[len(times) // 2],
        "exchanges": len(times),
        "mtu": int.from_bytes(information[_PMTU], sys.byteorder),
        "source": own,
        "interface": through,
        "gateway": "" if through == "lo" else gateway(address),
    }


def gateway(address: str) -> str:
    """Through whom packets for an IPv4 address go; empty: directly. proc(5), /proc/net/route."""
    (target,) = struct.unpack("=I", socket.inet_aton(address))
    best = (-1, "")
    for line in _text("/proc/net/route").splitlines()[1:]:
        _, network, via, _, _, _, _, mask, *_ = line.split()
        bits = int(mask, 16)
        if target & bits == int(network, 16) and bin(bits).count("1") > best[0]:
            by = int(via, 16)
            best = bin(bits).count("1"), socket.inet_ntoa(struct.pack("=I", by)) if by else ""
    return best[1]


def _leave_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> None:
    what, arguments = sys.argv[1], sys.argv[2:]
    if what == "echo":
        echo(arguments[0])
        return
    threading.Thread(target=_leave_with_input, daemon=True).start()
    if what == "reach":
        found = reach(arguments[0], int(arguments[1]))
    else:
        found = survey()
        if "torch" in arguments:
            found["torch"] = torch() if "torch" in found["packages"] else "not installed"
        if "pythons" in arguments:
            found["pythons"] = pythons()
        found["room"] = {path: room(path) for path in arguments if "/" in path}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
