"""A host: a place where processes of ours run. Who has one starts programs there, and never asks where it is, or how it is
reached.

Kinds are a registry, `KINDS`. One more is a file with a class that does what `Host` says, and a line there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, Self

from testbed import descriptors
from testbed.errors import EndpointError
from testbed.hosts.channel import Channel
from testbed.kinds import load


class Process(Protocol):
    """A program that runs on a host. Its standard input and output are ours: to talk over, by `channel` or as they are.

    A context manager that stops it; left by an exception, that kills it.
    """

    pid: int  #: by which messages name it
    log: Path | None  #: what it prints besides; None: kept for `last_words` alone
    stdin: IO[bytes]
    stdout: IO[bytes]

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    @property
    def channel(self) -> Channel:
        """Calls and results over its standard input and output."""

    def status(self, within_s: float | None = 0.0) -> int | None:
        """Its exit status, -n where signal n ended it; None: it still runs after so long (None: as long as it takes)."""

    def stopped_s(self) -> float:
        """For how long it has been seen standing still (SIGSTOP), in seconds, look after look."""

    def last_words(self) -> str:
        """The last line of what it printed besides."""

    def kill(self) -> None:
        """End it at once."""

    def stop(self) -> None:
        """End it: it leaves when its standard input ends, and is killed where it does not."""


class Host(Protocol):
    """Where processes run: as the invoking user, without capabilities, and no longer than whoever started them."""

    def start(self, argv: Sequence[str], env: Mapping[str, str | None], log: Path | None = None) -> Process:
        """Start a program. `env`: what its environment has besides the host's own; None takes a variable out.

        log: a file of ours for what it prints besides; it is appended to. Raises EndpointError, StorageError.
        """

    def module(self, name: str, *arguments: str) -> list[str]:
        """The argument vector that runs a module of the testbed, or of the Python that has it, there."""

    def put(self, source: Path, target: Path) -> None:
        """Copy a file of ours to the host. Raises StorageError."""

    def get(self, source: Path, target: Path) -> None:
        """Copy a file of the host's here. Raises StorageError."""

    def describe(self) -> dict[str, Any]:
        """What there is to say of it: its ``kind``, and what tells it from others of that kind."""

    def clock(self) -> tuple[float, float]:
        """By how much its monotonic clock is ahead of ours, and how far that may be off; seconds."""


#: A process that stands still for longer is given up.
_STOPPED_S, _LOOK_S = 1.0, 0.25


def lines(process: Process, what: str) -> Iterator[bytes]:
    """What a process prints, line by line, until it ends, however long that takes. Raises EndpointError, naming `what` it is,
    where it stands still."""
    rest = b""
    while True:
        ended = False
        if descriptors.ready([process.stdout], _LOOK_S):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
            if ended := not piece:
                # Its host may have ended it for standing still, and says so as it says that it ended.
                process.status(_STOPPED_S)
        if (stopped_s := process.stopped_s()) > _STOPPED_S:
            raise EndpointError(
                f"{what} (process {process.pid}) has been stopped for {stopped_s:.1f} s (SIGSTOP)"
            )
        if ended:
            break
    if rest:
        yield rest


#: Kind -> the class, as ``module:name``; imported once such a host is asked for.
KINDS = {
    "local": "testbed.hosts.local:Local",
    "namespace": "testbed.hosts.local:Namespace",
    "ssh": "testbed.hosts.ssh:Ssh",
}


def host(kind: str, **settings: Any) -> Host:
    """A host of a kind; the settings are what its class takes. Raises KeyError for a kind that there is not."""
    made: Host = load(KINDS[kind])(**settings)
    return made
