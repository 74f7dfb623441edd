"""Taking networks away: everything that their states name (`testbed.net.fabric.state`), and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

from testbed.errors import TestbedError, UsageError
from testbed.hosts import namespaces, processes
from testbed.net.fabric.state import (
    Process,
    State,
    directory,
    file_of,
    find,
    is_alive,
    list_states,
    locked,
    netns_marker,
    place,
)

_NAME = re.compile(r"tb-([0-9a-f]{4})-[A-Za-z0-9_-]+")
_MARK = re.compile(r"testbed ([0-9a-f]+) ([0-9a-f]{4}) (\d{1,10}) (\d{1,20})")  # `State.mark`


def remove(state: State) -> list[str]:
    """Removes everything the state names, however much of it was made, and then the state. Call it `locked`.

    Returns what it removed, a line each. What still runs inside the namespaces, and would keep them alive, is ended;
    so is what writes to the network's files: an emulator that its maker had no time to put on record.
    """
    helpers: list[Process] = []
    if state.boot == namespaces.boot_id():
        helpers = [*state.processes, *_working(state.namespaces, state.directory)]
    removed = _take_away(helpers, state.namespaces, state.directory)
    if file_of(state.id).exists():
        file_of(state.id).unlink()
        removed.append(f"state {file_of(state.id)}")
    namespaces.release_directory(netns_marker())
    return removed


def orphans() -> dict[str, list[str]]:
    """Networks of the testbed whose state was deleted: id -> their namespaces, each of which has the testbed's mark. Not those
    whose maker still runs, which may write it anew, nor those whose state is there and cannot be read: of another version, say.
    To be called with the right to enter them."""
    known = {path.stem for path in directory().glob("*.json")}
    found: dict[str, list[str]] = {}
    for name in namespaces.names():
        match = _NAME.fullmatch(name)
        if match and match[1] not in known and _left_behind(name, match[1]):
            found.setdefault(match[1], []).append(name)
    return found


def _left_behind(name: str, identifier: str) -> bool:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with namespaces.inside(name), IPRoute() as network:
            (loopback,) = network.link("get", index=1)
    except (TestbedError, NetlinkError, OSError):  # no namespace, or none that can be entered
        return False
    mark = _MARK.fullmatch(loopback.get("ifalias") or "")
    ours = mark is not None and mark[1] == place() and mark[2] == identifier
    return ours and not processes.is_running(int(mark[3]), int(mark[4]))  # type: ignore[index]


def _working(names: Iterable[str], directory: Path) -> list[Process]:
    """What runs in these namespaces or writes below the directory."""
    found = {*processes.running_inside(names), *processes.writing_below(directory)}
    return [Process(*process, "working for the network") for process in found]


def _take_away(helpers: Iterable[Process], names: Iterable[str], directory: Path) -> list[str]:
    removed = [f"process {p.pid} ({p.what})" for p in helpers if processes.end(p.pid, p.started)]
    removed += [f"namespace {name}" for name in names if namespaces.delete(name)]
    if directory.is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        removed.append(f"directory {directory}")
    return removed


def clean() -> list[str]:
    """Removes what dead runs left and returns what that was, a line each, also where their state was deleted (`orphans`).
    Networks that are alive or up stay.

    Raises UsageError without root, where there is something to remove.
    """
    if not directory().is_dir() and not any(map(_NAME.fullmatch, namespaces.names())):
        return []
    if any(not is_alive(state) for state in list_states()):
        namespaces.require_root("removing what dead runs left")
    elif not os.access(directory(), os.W_OK):
        return []
    removed = []
    with locked():
        for state in list_states():
            if not is_alive(state):
                removed += remove(state)
        if namespaces.may_administer():
            for network, names in orphans().items():
                rest = directory() / network
                removed += _take_away(_working(names, rest), names, rest)
        for unfinished in directory().glob(".*.tmp"):  # whoever writes holds the lock
            unfinished.unlink()
            removed.append(f"file {unfinished}")
        namespaces.release_directory(netns_marker())
    return removed


def remove_own() -> None:
    """Removes what this very process made and has not removed, whether it was to stay or not. Not to be interrupted."""
    own = os.getpid(), processes.start_time(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, processes.PASSED_ON)
    try:
        with locked():
            for state in list_states():
                if (state.pid, state.started) == own:
                    remove(state)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def down(run_id: str | None = None) -> list[str]:
    """Removes a network that is up (the only one, unless its id is given); returns what it removed, a line
    each.

    Raises UsageError where there is no such network, several, or no root; also for a run still at work.
    """
    state = find(run_id)
    if not state.persistent and is_alive(state):
        raise UsageError(f"network {state.id} belongs to a run at work (process {state.pid}); stop that one")
    namespaces.require_root("removing a network")
    with locked():
        return remove(state)
