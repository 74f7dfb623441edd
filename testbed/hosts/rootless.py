"""Networks without root: everything inside user, network, mount and process namespaces of one's own, user_namespaces(7).

`enter` puts the rest of the command there. It is root inside, and nobody but the user outside: its /run is a file system in
memory, its namespaces end with its processes, and its processes end with it, so nothing can be left behind, whatever kills what.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

from testbed.errors import UsageError
from testbed.hosts import namespaces
from testbed.hosts.processes import await_child, passed_on
from testbed.identity import INSIDE, give_up_root

_NEWNS, _NEWUSER, _NEWPID, _NEWNET = 0x0002_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_SWITCHES = {
    # a file that forbids user namespaces, where it says so -> the remedy
    "/proc/sys/user/max_user_namespaces": ("0", "sysctl user.max_user_namespaces=10000"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl kernel.unprivileged_userns_clone=1"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
}


def inside() -> bool:
    """Whether this process is in namespaces that `enter` made."""
    return INSIDE in os.environ


def enter() -> None:
    """Goes on inside, as a new process, whose exit status becomes this one's. Returns at once where this is inside already.

    To be called from a process with one thread. Raises UsageError with the remedy where the kernel does not allow it.
    """
    if inside():
        return
    give_up_root()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on())
    try:
        _unshare()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    first = os.fork()
    if first:
        os._exit(await_child(first))
    # The first process of a process namespace: signals without a handler do not reach it, and all others end with it.
    namespaces.end_with_parent(signal.SIGKILL)
    worker = os.fork()
    if worker:
        os._exit(await_child(worker))
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _private_file_systems()
    os.environ[INSIDE] = "1"
    for name in ("SUDO_UID", "SUDO_GID", "TESTBED_STATE"):
        os.environ.pop(name, None)


def obstacle() -> str:
    """Why `enter` would not do here; empty where it would. Tried out in a child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _unshare()
            second = os.fork()
            if second == 0:
                _private_file_systems()
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    return said


def _unshare() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWUSER | _NEWNS | _NEWPID | _NEWNET) != 0:
        raise UsageError(f"rootless: the kernel allows no user namespace: {_reason(ctypes.get_errno())}")
    try:
        # What the kernel lets anybody map: oneself, and no groups but one's own.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        raise UsageError(f"rootless: the kernel lets nobody map {uid}: {_reason(error.errno or 0)}") from None


def _reason(number: int) -> str:
    for name, (forbids, remedy) in _SWITCHES.items():
        with contextlib.suppress(OSError):
            if Path(name).read_text().strip() == forbids:
                return f"{os.strerror(number)}; {remedy}"
    return f"{os.strerror(number)}; run it with sudo instead"


def _private_file_systems() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (*(ctypes.c_char_p,) * 3, ctypes.c_ulong, ctypes.c_char_p)
    for source, target, kind, flags in (
        (None, "/", None, _MS_REC | _MS_PRIVATE),
        ("tmpfs", "/run", "tmpfs", 0),
        ("proc", "/proc", "proc", 0),
    ):
        encoded = [None if text is None else text.encode() for text in (source, target, kind)]
        if libc.mount(*encoded, flags, None) != 0:
            problem = os.strerror(ctypes.get_errno())
            raise UsageError(
                f"rootless: cannot mount {target} anew ({problem}), as in many containers; use sudo"
            )
