"""What the testbed has on this machine, written down before it is made, so that whoever comes later can
remove it.

One JSON file a network, ``/run/testbed/<id>.json`` (TESTBED_STATE names another directory). It says which
process made the network; when that one is gone, or the machine was booted again, the network is dead, and
`removal.clean` removes everything the file names. What was made by ``testbed up`` is marked persistent and stays
until ``testbed down``. Nothing is ever touched that no state file names, and a state file can only name
things that carry its id.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from testbed.errors import NetworkError, UsageError
from testbed.files import storing
from testbed.hosts import namespaces, processes
from testbed.identity import as_root
from testbed.net.topology import naming
from testbed.net.topology.topology import Topology

VERSION = 1
_DEFAULT_DIRECTORY = "/run/testbed"
_ID = re.compile(r"[0-9a-f]{4}")
_CALLED = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_MAX_BYTES = 16_000_000
_SILENT_S = 2.0  # a network of a thousand nodes takes longer, most others do not


@dataclass(frozen=True)
class Process:
    """A helper process: signalled only while this pid still has this start time (clock ticks since boot)."""

    pid: int
    started: int
    what: str


@dataclass(frozen=True)
class State:
    """One network and the process it belongs to. Raises ValueError where it names what is not its own."""

    id: str
    pid: int
    started: int
    boot: str
    created_at: str
    persistent: bool
    emulator: str
    topology: Topology
    namespaces: tuple[str, ...]
    processes: tuple[Process, ...] = ()
    version: int = VERSION
    name: str = ""  #: what whoever built it calls it

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version {self.version} of the format, not {VERSION}")
        if not _ID.fullmatch(self.id):
            raise ValueError(f"no id: {self.id!r}")
        if self.name and not _CALLED.fullmatch(self.name):
            raise ValueError(f"no name: {self.name!r}")
        for name in self.namespaces:
            if not re.fullmatch(rf"tb-{self.id}-[A-Za-z0-9_-]+", name):
                raise ValueError(f"namespace {name!r} does not carry the id {self.id}")

    def namespace(self, node: str) -> str:
        """The namespace of a node. Raises SpecError where there is no such node."""
        return namespace_name(self.id, self.topology.require_node(node))

    @property
    def called(self) -> str:
        """For people: its name, where it has one, and its id."""
        return f"{self.name} ({self.id})" if self.name else self.id

    @property
    def wire(self) -> str:
        """The namespace in which the links' conditions are imposed."""
        return namespace_name(self.id, "wire")

    @property
    def mark(self) -> str:
        """What is noted in each of its namespaces, should this state be lost: that it is the testbed's, and whose."""
        return f"testbed {place()} {self.id} {self.pid} {self.started}"

    @property
    def directory(self) -> Path:
        """Files of this network: hosts files, and what outliving emulators keep."""
        return directory() / self.id

    def write_names(self, node: str) -> dict[Path, Path]:
        """What a node sees in the place of files in /etc, so that it knows the others by name, and the host by its own.

        Made where it is not there yet: a thousand of them, each with a thousand lines, would take longer than the rest of the
        network. Raises SpecError, NetworkError.
        """
        names = [node.name for node in self.topology.nodes]
        wanted = {
            naming.HOSTS: (
                self.directory / "hosts" / node,
                self.topology.hosts(node) + naming.own_names(names),
            ),
            naming.SWITCH: (self.directory / "nsswitch.conf", naming.switch()),
        }
        for path, text in wanted.values():
            try:
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                    fresh.write_text(text)
                    fresh.rename(path)
            except OSError as error:
                raise NetworkError(f"{path}: {error.strerror}") from None
        return {seen: path for seen, (path, _) in wanted.items()}

    @property
    def keep(self) -> Path:
        """Where emulators that outlive their maker keep what they need to be found again."""
        return self.directory / "links"


def namespace_name(run_id: str, node: str) -> str:
    """``tb-<id>-<node>``."""
    return f"tb-{run_id}-{node}"


def directory() -> Path:
    """Where the state files are: TESTBED_STATE, or /run/testbed."""
    return Path(os.environ.get("TESTBED_STATE") or _DEFAULT_DIRECTORY)


def place() -> str:
    """A short text that is another for each directory of states."""
    return hashlib.blake2b(os.fsencode(directory().absolute()), digest_size=6).hexdigest()


def netns_marker() -> Path:
    """The note that /run/netns was made by the testbed."""
    return directory() / "netns-directory"


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One testbed command at a time makes or removes networks (flock(2)). Not to be nested. Files opened meanwhile are root's."""
    with as_root(), _lock():
        yield


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    try:
        directory().mkdir(mode=0o755, parents=True, exist_ok=True)
        _require_ours(directory(), directory().stat(), 0o022)
        # Whoever can open it can lock it: nobody else may.
        lock = os.open(directory() / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise NetworkError(f"{directory()}: cannot keep state there: {error.strerror}") from None
    try:
        _require_ours(directory() / ".lock", os.fstat(lock), 0o000)
        os.fchmod(lock, 0o600)
        _await_lock(lock)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def _require_ours(path: Path, status: os.stat_result, forbidden: int) -> None:
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & forbidden:
        raise NetworkError(
            f"{path}: others may write there, and the testbed's state is nobody else's; remove it, or name another "
            "directory by TESTBED_STATE"
        )


def _await_lock(lock: int) -> None:
    """Locks it. After a moment, says on standard error who is waited for."""
    until = time.monotonic() + _SILENT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                break
        time.sleep(0.02)
    holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
    who = (
        f"process {holder} ({processes.command(int(holder))})"
        if holder.isdigit()
        else "another testbed process"
    )
    print(f"testbed: waiting for {who}, which makes or removes a network", file=sys.stderr, flush=True)
    fcntl.flock(lock, fcntl.LOCK_EX)


def file_of(run_id: str) -> Path:
    """The state file of the network with that id."""
    return directory() / f"{run_id}.json"


def new(
    topology: Topology, emulator: str, *, persistent: bool, run_id: str | None = None, name: str = ""
) -> State:
    """A state of this process for a network that is to be made, written down. Call it `locked`.

    Raises UsageError where `run_id` or `name` is none or taken already.
    """
    if name and (not _CALLED.fullmatch(name) or _ID.fullmatch(name)):
        raise UsageError(
            f"name {name[:64]!r}: begin with a letter, then up to 63 of A-Z, a-z, 0-9, '_', '.', '-'; and no id"
        )
    if name and any(state.name == name and is_alive(state) for state in list_states()):
        raise UsageError(f"a network {name} is up already; see `testbed ls`")
    if run_id is not None and not _ID.fullmatch(run_id):
        raise UsageError(f"run id {run_id!r}: expected four hexadecimal digits, such as 1a2b")
    if run_id is not None and _is_taken(run_id):
        raise UsageError(f"a network {run_id} exists already; see `testbed show`")
    while run_id is None or _is_taken(run_id):
        run_id = secrets.token_hex(2)
    names = [*(node.name for node in topology.nodes), "wire"]
    state = State(
        id=run_id,
        pid=os.getpid(),
        started=processes.start_time(os.getpid()) or 0,
        boot=namespaces.boot_id(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        persistent=persistent,
        emulator=emulator,
        topology=topology,
        namespaces=tuple(namespace_name(run_id, node) for node in names),
        name=name,
    )
    write(state)
    return state


def _is_taken(run_id: str) -> bool:
    prefix = namespace_name(run_id, "")
    return file_of(run_id).exists() or any(name.startswith(prefix) for name in namespaces.names())


def write(state: State) -> None:
    """Puts the state on disk, whole or not at all, whatever happens meanwhile. Call it `locked`."""
    target = file_of(state.id)
    fresh = target.with_name(f".{state.id}.tmp")
    with storing(target), fresh.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state)))
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(target)
    folder = os.open(directory(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def add_processes(state: State, helpers: Iterable[tuple[int, int, str]]) -> State:
    """The state with more helper processes (pid, start time, what it is), written down. Call it `locked`."""
    grown = replace(state, processes=(*state.processes, *(Process(*helper) for helper in helpers)))
    write(grown)
    return grown


def read_states() -> tuple[list[State], list[str]]:
    """All networks on record, oldest first, and one line for each file here that is not a state of ours."""
    states, problems = [], []
    for path in sorted(directory().glob("*.json")):
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            state = msgspec.json.decode(path.read_bytes(), type=State)
            if state.id != path.stem:
                raise ValueError(f"says it is {state.id!r}")
            states.append(state)
        except FileNotFoundError:
            continue  # removed by its owner meanwhile
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path}: not a state file of this version ({error}); left alone")
    return sorted(states, key=lambda state: (state.created_at, state.id)), problems


def list_states() -> list[State]:
    """All networks on record, dead ones too, oldest first."""
    return read_states()[0]


def is_alive(state: State) -> bool:
    """Whether the network is still wanted: its process runs, or it is persistent; and the machine was not
    booted since."""
    if state.boot != namespaces.boot_id():
        return False
    return state.persistent or processes.is_running(state.pid, state.started)


def find(run_id: str | None = None) -> State:
    """The network of that id or name, or the only persistent one. Raises UsageError with the remedy."""
    states = list_states()
    if run_id is not None:
        for state in sorted(states, key=is_alive, reverse=True):
            if run_id in (state.id, state.name):
                return state
        known = ", ".join(state.called for state in states) or "none"
        raise UsageError(f"no network {run_id!r} on this machine (there is: {known})")
    standing = [state for state in states if state.persistent and is_alive(state)]
    if not standing:
        raise UsageError("no network is up; make one with `sudo testbed up TOPOLOGY`")
    if len(standing) > 1:
        several = ", ".join(state.called for state in standing)
        raise UsageError(f"several networks are up ({several}); say which with --id")
    return standing[0]
