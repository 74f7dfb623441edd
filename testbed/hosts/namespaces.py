"""Network namespaces as `ip netns` knows them: named by a mount under /run/netns. See ip-netns(8), setns(2),
unshare(2).

Creating and entering never moves a thread of the caller for longer than asked: namespaces are made, and calls made in them, by
a thread of its own, and `inside` always brings its thread back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from testbed.errors import NetworkError, UsageError

T = TypeVar("T")

DIRECTORY = Path("/run/netns")

_CLONE_NEWNS, _CLONE_NEWNET = 0x0002_0000, 0x4000_0000
_MS_BIND, _MS_REC, _MS_SLAVE, _MS_SHARED = 1 << 12, 1 << 14, 1 << 19, 1 << 20
_MNT_DETACH = 2
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def may_administer() -> bool:
    """Whether this process may administer networks and namespaces."""
    status = Path("/proc/self/status").read_text()
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    return bool(effective >> _CAP_NET_ADMIN & 1 and effective >> _CAP_SYS_ADMIN & 1)


def require_root(what: str = "this") -> None:
    """Raises UsageError unless this process `may_administer`; touches nothing."""
    if not may_administer():
        raise UsageError(f"{what} needs root: run it as sudo testbed …")


def path(name: str) -> Path:
    """Where the namespace is named: ``/run/netns/<name>``."""
    return DIRECTORY / name


def names() -> list[str]:
    """Everything under /run/netns, mounted or not, ours or not; sorted."""
    try:
        return sorted(entry.name for entry in DIRECTORY.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def create_all(names: Iterable[str], furnish: Callable[[str], None]) -> None:
    """New namespaces of those names, one after the other; `furnish` is called with its name inside each of them, in a thread
    other than the caller's (one for all). `prepare_directory` comes first.

    Raises NetworkError, or what `furnish` raises: then what was made so far stays, and no half-made name.
    """

    stop = threading.Event()

    def make() -> None:
        for name in names:
            if stop.is_set():
                return
            _name_new_namespace(name)
            furnish(name)

    _in_own_thread(make, stop.set)


def _name_new_namespace(name: str) -> None:
    # The calling thread moves into it.
    target = path(name)
    try:
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except OSError as error:
        raise NetworkError(f"network namespace {name}: {error.strerror}") from None
    try:
        _unshare(_CLONE_NEWNET)
        _mount("/proc/thread-self/ns/net", str(target), None, _MS_BIND)
    except OSError as error:
        target.unlink()
        raise NetworkError(f"network namespace {name}: {error.strerror}") from None


def delete(name: str) -> bool:
    """Removes the name, mounted or only half-made; the namespace goes with its last process. False: there was
    none."""
    target = str(path(name))
    if not os.path.lexists(target):
        return False
    while _libc.umount2(os.fsencode(target), _MNT_DETACH) == 0:  # a name can be mounted over more than once
        pass
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise NetworkError(f"network namespace {name}: cannot unmount: {os.strerror(ctypes.get_errno())}")
    Path(target).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread is in the namespace `name` for the block, and back where it was after it; other threads are
    not moved.

    Sockets opened in the block stay in that namespace; ``/proc/sys/net`` and ``/sys``-independent calls see
    it. Raises NetworkError where there is no such namespace.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = _open(name)
        try:
            try:
                _setns(there, _CLONE_NEWNET)
            except OSError as error:
                raise NetworkError(f"network namespace {name}: cannot enter: {error.strerror}") from None
            yield
        finally:
            _setns(home, _CLONE_NEWNET)
            os.close(there)
    finally:
        os.close(home)


def enter(name: str) -> None:
    """Moves this thread into the namespace for good: what a freshly forked child does before it runs a command.

    Raises NetworkError where there is no such namespace, UsageError without the right to enter it.
    """
    there = _open(name)
    try:
        _move(lambda: _setns(there, _CLONE_NEWNET))
    finally:
        os.close(there)


def call_inside(name: str, call: Callable[[], T]) -> T:
    """What `call` returns, or raises, in a thread within the namespace `name`: sockets, devices and processes that it opens stay
    there, and the caller's thread is not moved. Raises as `enter` does.
    """

    def work() -> T:
        enter(name)
        return call()

    return _in_own_thread(work)


def call_in_scratch(call: Callable[[], T]) -> T:
    """What `call` returns within a new, nameless namespace, which ends with the last thing open in it."""

    def work() -> T:
        _move(lambda: _unshare(_CLONE_NEWNET))
        return call()

    return _in_own_thread(work)


def end_with_parent(number: int) -> None:
    """This process gets that signal when its parent ends, even if that is killed (PR_SET_PDEATHSIG). For a fresh child."""
    _check(_libc.prctl(1, number, 0, 0, 0), "prctl")


def private_view(files: Mapping[Path, Path]) -> None:
    """Gives this process its own view of the file system in which /sys shows its namespace's interfaces.

    `files`: files that there are -> what to see in their place. For a freshly forked child that has just called `enter`.
    The host never sees these mounts; what the host unmounts disappears here too (a slave view, as `ip netns
    exec` makes it), so a command that runs on does not keep a removed namespace's name mounted.
    """
    _unshare(_CLONE_NEWNS)
    _mount(None, "/", None, _MS_REC | _MS_SLAVE)
    cgroups = None
    with contextlib.suppress(
        OSError
    ):  # /sys mounted anew has no control groups below it; keep the ones there were
        cgroups = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC)
    with contextlib.suppress(
        OSError
    ):  # a container may forbid it: the tools that read /sys then see the host's
        _mount("sysfs", "/sys", "sysfs", 0)
        if cgroups is not None:
            _mount(f"/proc/self/fd/{cgroups}", "/sys/fs/cgroup", None, _MS_BIND | _MS_REC)
    if cgroups is not None:
        os.close(cgroups)
    for seen, shown in files.items():
        if seen.exists():
            _mount(str(shown), str(seen), None, _MS_BIND)


def prepare_directory(marker: Path) -> None:
    """Makes /run/netns a shared mount, as `ip netns` does; `marker` notes what had to be made, before it is made."""
    made = _made(marker)
    try:
        if not DIRECTORY.is_dir():
            marker.write_text(json.dumps(made | {"directory": True}))
            DIRECTORY.mkdir(mode=0o755, parents=True)
        try:
            _mount(None, str(DIRECTORY), None, _MS_SHARED | _MS_REC)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: not a mount yet
                raise
            marker.write_text(json.dumps(_made(marker) | {"mount": True}))
            _mount(str(DIRECTORY), str(DIRECTORY), None, _MS_BIND | _MS_REC)
            _mount(None, str(DIRECTORY), None, _MS_SHARED | _MS_REC)
    except OSError as error:
        raise NetworkError(f"{DIRECTORY}: cannot make it a shared mount: {error.strerror}") from None


def release_directory(marker: Path) -> None:
    """Undoes `prepare_directory`, once no namespace is named any more and if it was the testbed that made it."""
    if not marker.exists() or names():
        return
    made = _made(marker)
    if made["mount"] and _libc.umount2(os.fsencode(DIRECTORY), 0) != 0 and ctypes.get_errno() == errno.EBUSY:
        return  # somebody is using it at this moment
    if made["directory"]:
        with contextlib.suppress(OSError):
            DIRECTORY.rmdir()
    marker.unlink(missing_ok=True)


def _made(marker: Path) -> dict[str, Any]:
    made = {"directory": False, "mount": False, "boot": boot_id()}
    try:
        noted = json.loads(marker.read_text())
    except (OSError, ValueError):
        return made
    # what was made before the last boot went with it
    return made | noted if isinstance(noted, dict) and noted.get("boot") == made["boot"] else made


def boot_id() -> str:
    """A text that changes with every boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _open(name: str) -> int:
    try:
        return os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetworkError(f"network namespace {name}: {error.strerror}") from None


def _in_own_thread(call: Callable[[], T], interrupted: Callable[[], None] = lambda: None) -> T:
    # Where the wait is interrupted (Ctrl-C), the thread is told and awaited all the same: nothing may be made while its maker's
    # caller takes it away already.
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="namespace")
    thread.start()
    try:
        thread.join()
    except BaseException:
        interrupted()
        thread.join()
        raise
    if failures:
        raise failures[0]
    return results[0]


def _move(change: Callable[[], None]) -> None:
    try:
        change()
    except PermissionError:
        raise UsageError("network namespaces need root; run it with sudo") from None
    except OSError as error:
        raise NetworkError(str(error.strerror)) from None


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _setns(descriptor: int, kind: int) -> None:
    _check(_libc.setns(descriptor, kind), "setns")


def _unshare(kind: int) -> None:
    _check(_libc.unshare(kind), "unshare")


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source or "none", target, kind)]
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], flags, None), f"mount {target}")
