"""A guest kernel that has sch_netem, for the tests that need it on a host whose kernel has none.

Debian's package ``user-mode-linux`` is a Linux kernel that runs as an ordinary program, with the host's file system as its
root. `run_in_guest` boots it, runs one command in it and returns its exit status::

    python -m tests.guest -- .venv/bin/python -m pytest -m netem tests/net

The guest covers /run, /tmp, /var/tmp and /dev/shm with memory of its own; **the rest of the file system is the host's, live**.
It has one processor, no network but its own namespaces, and HZ=100 with high-resolution timers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KERNEL = "linux.uml"
INIT = Path(__file__).resolve().with_name("guest-init.sh")
PROJECT = INIT.parents[1]
MAP_COUNT = Path("/proc/sys/vm/max_map_count")
TORCH_MAP_COUNT = (
    4_000_000  # the guest maps each of its pages on its own; torch needs far more than the usual 65,530
)


class GuestError(RuntimeError):
    """The guest did not boot, or ended without the command's exit status."""


@dataclass(frozen=True)
class GuestResult:
    """What a command in the guest left: its exit status (None: ran out of time), its output, and the kernel's console."""

    status: int | None
    output: str
    console: str


def missing() -> str:
    """Why no guest can be started here; empty when one can."""
    if shutil.which(KERNEL) is None:
        return "user-mode-linux is not installed (apt install user-mode-linux)"
    if shutil.which("insmod") is None:
        return "insmod is missing (apt install kmod)"
    if os.geteuid() != 0:
        return "the guest's root needs the host's file system as root"
    return ""


def run_in_guest(
    command: list[str],
    *,
    limit_s: float = 300,
    memory_mb: int = 4096,
    echo: bool = False,
) -> GuestResult:
    """Boots a guest, runs *command* in it in the project's directory, and switches it off, whatever happens.

    *limit_s* bounds everything from boot to end. The host's ``vm.max_map_count`` is raised for as long as the guest runs. *echo*
    copies the output to ours as it comes. Raises `GuestError` when the guest failed to start.
    """
    with tempfile.TemporaryDirectory(prefix="testbed-guest-") as scratch, _raised_map_count():
        exchange = Path(scratch)
        _write_orders(exchange, command)
        with open(exchange / "console", "wb") as console:
            guest = subprocess.Popen(
                _command_line(exchange, memory_mb),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    "HOME": scratch,
                    "TMPDIR": _memory_directory(),
                },
                cwd=scratch,
                start_new_session=True,
            )
            try:
                _follow(guest, exchange, limit_s, echo)
            finally:
                _end(guest)
        return _result(exchange)


def _memory_directory() -> str:
    # The guest's memory is a file; on a memory file system it never reaches a disk.
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


def _command_line(exchange: Path, memory_mb: int) -> list[str]:
    return [
        # What is measured in there is time: on a busy host, a guest that has to wait its turn measures the waiting.
        *("nice", "-n", "-15"),
        shutil.which(KERNEL) or KERNEL,
        f"mem={memory_mb}M",
        "rootfstype=hostfs",
        "rootflags=/",
        "rw",
        f"init={INIT}",
        "con=null",
        "con0=null,fd:1",
        f"uml_dir={exchange}/uml",
        "quiet",
        f"GUEST_EXCHANGE={exchange}",  # the kernel hands what it does not know to process 1 as environment
    ]


def _write_orders(exchange: Path, command: list[str]) -> None:
    variables = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/run/tmp",
        "TMPDIR": "/run/tmp",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TESTBED_GUEST": "1",
    }
    (exchange / "command").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in command))
    (exchange / "environment").write_bytes(
        b"".join(f"{k}={v}".encode() + b"\0" for k, v in variables.items())
    )
    (exchange / "directory").write_text(str(PROJECT))
    (exchange / "output").touch()


def _follow(guest: subprocess.Popen[bytes], exchange: Path, limit_s: float, echo: bool) -> None:
    """Waits until the command has ended, the guest has, or time is up; copies new output meanwhile."""
    end = time.monotonic() + limit_s
    with open(exchange / "output", "rb") as output:
        while True:
            over = (exchange / "status").exists() or guest.poll() is not None or time.monotonic() > end
            while echo and (piece := output.read(65536)):
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            if over:
                return
            time.sleep(0.05)


def _end(guest: subprocess.Popen[bytes]) -> None:
    """The guest and its processes, which all are in a session of their own, are gone afterwards."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        guest.wait(timeout=3 if guest.poll() is None else 0)
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guest.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            guest.wait(timeout=10)


def _result(exchange: Path) -> GuestResult:
    console = (exchange / "console").read_text(errors="replace")
    if (exchange / "boot").exists():
        console += (exchange / "boot").read_text(errors="replace")
    status = int((exchange / "status").read_text()) if (exchange / "status").exists() else None
    if not (exchange / "started").exists():
        raise GuestError(f"the guest did not get to run the command; its console said:\n{console[-2000:]}")
    return GuestResult(status, (exchange / "output").read_text(errors="replace"), console)


@contextlib.contextmanager
def _raised_map_count() -> Iterator[None]:
    before = MAP_COUNT.read_text()
    MAP_COUNT.write_text(str(max(int(before), TORCH_MAP_COUNT)))
    try:
        yield
    finally:
        MAP_COUNT.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guest", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--limit", type=float, default=300, metavar="SECONDS", help="time for everything (default 300)"
    )
    parser.add_argument(
        "--memory", type=int, default=4096, metavar="MB", help="the guest's memory (default 4096)"
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    options = parser.parse_args()
    if reason := missing():
        print(f"no guest: {reason}", file=sys.stderr)
        return 2
    # A terminated lane must still end its guest and put the setting back: SystemExit unwinds, a bare SIGTERM does not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = run_in_guest(options.command, limit_s=options.limit, memory_mb=options.memory, echo=True)
    if result.status is None:
        print(f"no exit status after at most {options.limit:g} s", file=sys.stderr)
        return 124
    return result.status


if __name__ == "__main__":
    sys.exit(main())
