"""A program on a host reached over SSH: pumps between its session and pipes here, and what its keeper tells of it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import paramiko

from testbed.errors import TestbedError
from testbed.hosts.connection import LOST, end
from testbed.hosts.remote import LEAVE_S, MARK
from testbed.hosts.started import Started

if TYPE_CHECKING:
    from testbed.hosts.ssh import Ssh

_LOST, _AT_ONCE_S = 255, 5.0
_PIECE = 1 << 16
#: This process's programs that it still hears of, as they are on record.
LIVING: set[str] = set()


class SshProcess(Started):
    """A `Process` of another machine; what its parts are for is said there. A status of 255 also says that its keeper, or the
    connection to its host, was lost, as the last words do.

    printed: its log, open for adding to; None: it is kept for the last words.
    """

    def __init__(
        self,
        host: Ssh,
        session: paramiko.Channel,
        mark: bytes,
        first: bytes,
        told: dict[str, Any],
        log: Path | None,
        printed: IO[bytes] | None,
    ) -> None:
        given, stdin = os.pipe()
        stdout, made = os.pipe()
        self._out: IO[bytes] = printed or tempfile.TemporaryFile()  # noqa: SIM115 (until `stop`)
        super().__init__(int(told["pid"]), os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb"), log, self._out)
        self._host, self._session, self._mark = host, session, mark
        self._started = int(told["started"])
        self._name = mark.removeprefix(MARK).decode()
        LIVING.add(self._name)
        self._fate: int | None = None
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._stopped = 0.0
        session.settimeout(None)
        pumps = ((self._give, given), (self._take, made, first), (self._listen,))
        self._pumps = [
            threading.Thread(target=pump, args=arguments, name=f"ssh-{self.pid}", daemon=True)
            for pump, *arguments in pumps
        ]
        for pump in self._pumps:
            pump.start()

    def status(self, within_s: float | None = 0.0) -> int | None:
        self._ended.wait(within_s)
        return self._fate

    def stopped_s(self) -> float:
        return self._stopped

    def last_words(self) -> str:
        words = super().last_words()
        if "No module named 'testbed" in words:
            words += f" ({self._host.address}: testbed hosts install TOPOLOGY puts it there)"
        return words

    def _kept_words(self) -> bytes:
        with self._writing:
            return super()._kept_words()

    def kill(self) -> None:
        if self.status() is None and self._host.connected:
            with contextlib.suppress(TestbedError):
                self._host.end(self.pid, self._started)
            self.status(_AT_ONCE_S)

    def stop(self) -> None:
        self._hang_up()
        if self.status(LEAVE_S) is None:
            self.kill()
        end(self._session)
        self._ended.wait(_AT_ONCE_S)
        for pump in self._pumps:
            pump.join(_AT_ONCE_S)
        self._out.close()

    def _give(self, given: int) -> None:
        with os.fdopen(given, "rb", buffering=0) as pipe, contextlib.suppress(*LOST):
            while piece := pipe.read(_PIECE):
                self._session.sendall(piece)
            self._session.shutdown_write()

    def _take(self, made: int, piece: bytes) -> None:
        with os.fdopen(made, "wb", buffering=0) as pipe:
            read = True
            while piece or (piece := _received(self._session.recv)):
                try:
                    while read and piece:
                        piece = piece[pipe.write(piece) :]
                except OSError:  # nobody reads it any more; it is emptied all the same
                    read = False
                piece = b""

    def _listen(self) -> None:
        held = b""
        while piece := _received(self._session.recv_stderr):
            held = self._kept(held + piece)
        self._print(held)
        if self._fate is None:
            stands = self._session.get_transport().is_active()
            lost = "its keeper there has ended" if stands else "the connection was lost"
            self._print(f"{self._host.address}: {lost}\n".encode())
            self._fate = _LOST
        LIVING.discard(self._name)
        self._ended.set()

    def _kept(self, data: bytes) -> bytes:
        """Print what the program said, hear what its keeper did; what is left may be the beginning of the latter."""
        while (at := data.find(self._mark)) >= 0:
            end = data.find(b"\n", at)
            self._print(data[:at])
            if end < 0:
                return data[at:]
            self._hear(json.loads(data[at + len(self._mark) : end]))
            data = data[end + 1 :]
        at = data.rfind(self._mark[:1], max(0, len(data) - len(self._mark)))
        if at < 0 or not self._mark.startswith(data[at:]):
            at = len(data)
        self._print(data[:at])
        return data[at:]

    def _hear(self, told: dict[str, Any]) -> None:
        if "stopped_s" in told:
            said = f"it has been stopped for {told['stopped_s']:.1f} s (SIGSTOP), and was ended\n"
            self._print(said.encode())
            self._stopped = told["stopped_s"]
        if "ended" in told:
            self._fate = int(told["ended"])
            self._ended.set()

    def _print(self, data: bytes) -> None:
        with self._writing, contextlib.suppress(OSError, ValueError):  # no room, or closed
            self._out.seek(0, os.SEEK_END)
            self._out.write(data)
            self._out.flush()


def _received(receive: Callable[[int], bytes]) -> bytes:
    """What comes next; empty at the end, also that of the connection."""
    try:
        return receive(_PIECE)
    except LOST:
        return b""
