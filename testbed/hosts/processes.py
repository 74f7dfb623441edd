"""Processes by identity: a pid is only ever signalled together with the start time that makes it one process; waiting for a
child as a shell does; and being ended cleanly oneself.

See proc_pid_stat(5) (field 22) and pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from testbed import descriptors
from testbed.hosts import namespaces

#: What somebody who ends or asks a command sends to the process that started it.
PASSED_ON = frozenset(
    {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
)
_GRACE_S = 2.0


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which the process started; None where there is none, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    after_name = text.rpartition(")")[2].split()  # the name may hold spaces and brackets
    return None if after_name[0] in "ZX" else int(after_name[19])


def scheduled() -> dict[str, tuple[int, int]]:
    """Nanoseconds that each of this process's threads has run, and has waited for a processor, so far (sched-stats.rst)."""
    threads = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            fields = path.read_text(encoding="ascii").split()
        except OSError:  # a thread that ended meanwhile, or a kernel without these figures
            continue
        threads[path.parent.name] = int(fields[0]), int(fields[1])
    return threads


def processor_share(before: dict[str, tuple[int, int]]) -> float | None:
    """Of the time since `before` (`scheduled`) in which threads that still run had something to do, what they were given a
    processor for; None where the kernel does not count it."""
    now = scheduled()
    ran, waited = (sum(own[i] - before.get(thread, (0, 0))[i] for thread, own in now.items()) for i in (0, 1))
    return ran / (ran + waited) if ran > 0 else None


def command(pid: int) -> str:
    """What was typed to start the process, as far as that is known."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "gone"
    return " ".join(filter(None, words))[:200] or "unknown"


def is_running(pid: int, started: int) -> bool:
    """Whether exactly that process is still there."""
    return pid > 0 and start_time(pid) == started


def is_stopped(pid: int) -> bool:
    """Whether the process stands still (SIGSTOP)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


class Watch:
    """Looks after a process that may be stopped (SIGSTOP), which nothing but its state tells."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped: float | None = None

    def stopped_s(self) -> float:
        """For how long it has been seen standing still, in seconds, look after look; 0: it runs, or is gone."""
        if not is_stopped(self._pid):
            self._stopped = None
            return 0.0
        if self._stopped is None:
            self._stopped = time.monotonic()
        return time.monotonic() - self._stopped


def end(pid: int, started: int) -> bool:
    """Ends the process that had this pid and start time: SIGTERM, then SIGKILL. False: it was gone."""
    if pid <= 1 or pid == os.getpid():
        return False
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Checked while the handle is held: what it names can no longer become another process.
        if not is_running(pid, started):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not descriptors.ready([handle], _GRACE_S):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                descriptors.ready([handle], _GRACE_S)
        return True
    finally:
        os.close(handle)


def passed_on() -> frozenset[signal.Signals]:
    """The signals that `await_child` takes note of; block them before the child is made."""
    return PASSED_ON | {signal.SIGCHLD}


def await_child(child: int) -> int:
    """The exit status of a child (128 + n where signal n ended it). Signals that come meanwhile are handed on to it."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        arrived = signal.sigwaitinfo(passed_on())
        # What is typed at the terminal (si_code > 0, from the kernel) the command has had itself, being in the same group; but
        # that the terminal is gone is told to the session's leader alone, which this process may be.
        if arrived.si_signo == signal.SIGHUP or (arrived.si_signo != signal.SIGCHLD and arrived.si_code <= 0):
            os.kill(child, arrived.si_signo)


def running_inside(names: Iterable[str]) -> list[tuple[int, int]]:
    """(pid, start time) of every process whose network namespace is one of the named ones; never this
    process."""
    wanted = set()
    for name in names:
        with contextlib.suppress(OSError):
            wanted.add(_identity(namespaces.path(name)))
    return _matching(lambda entry: _identity(entry / "ns/net") in wanted) if wanted else []


def writing_below(directory: Path) -> list[tuple[int, int]]:
    """(pid, start time) of every process that has a file below `directory` open for writing; never this process."""
    prefix = f"{directory.resolve()}/"

    def writes(entry: Path) -> bool:
        # the link's own permissions say how the file was opened (proc_pid_fd(5))
        return any(
            link.lstat().st_mode & stat.S_IWUSR and str(link.readlink()).startswith(prefix)
            for link in (entry / "fd").iterdir()
        )

    return _matching(writes)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _matching(fits: Callable[[Path], bool]) -> list[tuple[int, int]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile
                started = start_time(int(entry.name))
                if started is not None and fits(entry):
                    found.append((int(entry.name), started))
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: cleaned up, resumable."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
