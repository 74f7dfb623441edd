"""Whose files these are: behind `sudo`, everything is read and written as the user who typed it; root is for networks alone.

Linux tells apart as whom a thread opens files, setfsuid(2). Under `assumed` that is the invoking user, so a link, a pipe or a
swapped directory among the user's files leads root nowhere that the user could not go; `as_root` takes that back for a
block, for files below /run that are root's own. Programs that are started have root's identity again, unless they are given
`of_user`. Called by root itself, or without root, all of this changes nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.errors import UsageError

INSIDE = "TESTBED_ROOTLESS"
"""The environment variable that is set inside a network without root, where uid 0 is whoever called."""
_PR_SET_DUMPABLE, _NOBODY = 4, 0xFFFF_FFFF
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_libc = ctypes.CDLL(None)
_assumed: User | None = None  #: whose files this process opens, where they are not its own
_came_with: tuple[dict[str, str], list[int]] | None = None  #: environment and groups that `assumed` put away


@dataclass(frozen=True)
class User:
    """Whom files belong to, and endpoints run as."""

    uid: int
    gid: int
    name: str
    home: str

    def groups(self) -> list[int]:
        """The groups that this user is in."""
        return [self.gid] if self.name.isdigit() else os.getgrouplist(self.name, self.gid)


def behind_sudo() -> bool:
    """Whether root acts for somebody else, who typed `sudo`."""
    return os.getuid() == 0 and INSIDE not in os.environ and _number("SUDO_UID", 0) != 0


def invoking_user() -> User:
    """The user who typed the command: behind `sudo` the one who typed `sudo`, otherwise the process's own."""
    uid, gid = os.getuid(), os.getgid()
    if INSIDE in os.environ:
        return User(uid, gid, os.environ.get("USER", str(uid)), os.environ.get("HOME", "/"))
    if behind_sudo():
        uid = _number("SUDO_UID", 0)
        gid = _number("SUDO_GID", uid)
    try:
        entry = pwd.getpwuid(uid)
        return User(uid, gid, entry.pw_name, entry.pw_dir)
    except KeyError:
        return User(uid, gid, str(uid), "/")


@contextlib.contextmanager
def assumed() -> Iterator[None]:
    """Files are the invoking user's for the block: opened, made and owned as by that user. To be called from a process with
    one thread; threads that are made in the block do likewise.

    Programs are looked for where the system has them. Raises UsageError where the user cannot read this program itself.
    """
    global _assumed, _came_with
    if not behind_sudo() or _assumed is not None:
        yield
        return
    user = invoking_user()
    _came_with = dict(os.environ), os.getgroups()
    os.setgroups(user.groups())
    os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name, PATH=_SYSTEM_PATH)
    _open_files_as(user.uid, user.gid)
    _assumed = user
    try:
        _require_readable(user)
        yield
    finally:
        if _assumed is not None:  # root was not given up meanwhile
            resume_root()
            _assumed = _came_with = None


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    """This thread, and those that it makes in the block, open files as root again: those below /run that are root's own."""
    if _assumed is None:
        yield
        return
    before = _now(_libc.setfsuid), _now(_libc.setfsgid)
    _open_files_as(0, 0)
    try:
        yield
    finally:
        _open_files_as(*before)


def give_up_root() -> None:
    """The process becomes the invoking user's, for good."""
    global _assumed
    if not behind_sudo():
        return
    user, _assumed = invoking_user(), None
    os.setgroups(user.groups())
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # or its files in /proc would stay root's


def resume_root() -> None:
    """The process is as it was started, for good: a child in which a command is to run as root."""
    if _came_with is not None:
        environment, groups = _came_with
        _open_files_as(0, 0)
        os.setgroups(groups)
        os.environ.clear()
        os.environ.update(environment)


def of_user() -> dict[str, Any]:
    """What makes `subprocess.Popen` start a program as the invoking user; nothing where this process has no other."""
    if not behind_sudo():
        return {}
    user = invoking_user()
    return {"user": user.uid, "group": user.gid, "extra_groups": user.groups()}


def _open_files_as(uid: int, gid: int) -> None:
    # These calls concern the calling thread alone, and report no failure: so each is asked what it came to.
    for change, wanted in ((_libc.setfsgid, gid), (_libc.setfsuid, uid)):
        change(ctypes.c_uint(wanted))
        if _now(change) != wanted:
            raise UsageError(f"the kernel does not let root open files as user {uid}")


def _now(change: Callable[[ctypes.c_uint], int]) -> int:
    return change(ctypes.c_uint(_NOBODY)) & _NOBODY  # no id: changes nothing, and returns what is


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 11 and int(text) < _NOBODY else default


def _require_readable(user: User) -> None:
    for file in (__file__, os.__file__):
        try:
            Path(file).stat()
        except PermissionError:
            raise UsageError(
                f"{user.name}, who typed sudo, cannot read {file}; install testbed where everybody can, "
                "or work as root altogether: env -u SUDO_UID testbed …"
            ) from None
