"""A host reached over SSH, where a program is looked after by what is sent there with it (`remote.py`).

    with Ssh("ssh://lab@a100:2222", python="~/testbed/.venv/bin/python") as there:
        with there.start(there.module("testbed.endpoints.cloud"), {}, log) as process:    # as any `Host`'s
            process.channel, process.stdin, process.stdout, process.pid, process.status(), process.last_words()
        there.run(["uname", "-r"])              # (0, b"6.1.0-…\\n"): status and standard output, in bounded time and size
        there.put(here, Path("~/there")), there.get(Path("~/there"), here)     # whole, or not at all
        there.describe(), there.clock()
        there.clean()                           # what lost connections and dead runs left there, ended; a line for each
        there.addresses()                       # (ours, the host's) on the SSH connection

Programs run as the user who logs in, in their home directory. All of a host's share one connection, made when it is first needed
and again where it was lost (but a program does not outlive the connection that it was started over).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import secrets
import shlex
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import paramiko

from testbed import descriptors, files
from testbed.deadline import Deadline
from testbed.errors import EndpointError, StorageError
from testbed.hosts import namespaces, processes, remote
from testbed.hosts.connection import LOST, Connection, end, ending
from testbed.hosts.ssh_process import LIVING, SshProcess

#: What is read as Python starts there, any; it has no character that a shell minds between apostrophes.
_BOOT = (
    'import os,sys;sys.version_info<(3,8)and sys.exit("testbed: Python "+sys.version.split()[0]);b=b"";'
    'exec("while len(b)<%d:\\n c=os.read(0,%d-len(b))\\n if not c:os._exit(1)\\n b+=c");'
    'exec(compile(b,"remote.py","exec"),{"__name__":"remote","TESTBED_SENT":1})'
)
_OLD = re.compile(rb"(?m)^testbed: Python ([0-9]\S{0,19})\s*$")
_ANSWER_S, _LOOK_S, _FILE_S = 30.0, 0.25, 3600.0
_MOST_NOISE, _MOST_ANSWER = 1 << 16, 1 << 20
_EXCHANGES = 12
_HEADER = struct.Struct("!I")


class Ssh:
    """A host reached over SSH, as a `Host`. `address`: ``ssh://[user@]name[:port]``; `python`: the one there that has the
    testbed (``~/`` is the home there); any from 3.8 on will do for all but `module`.

    A context manager that closes the connection. Every method raises EndpointError where the host cannot be reached, and
    UsageError where the remedy is the user's: an unknown host, a changed host key, no key that it takes.
    """

    def __init__(self, address: object, python: str = "python3") -> None:
        self.address, self.python = str(address), python
        self._connection = Connection(self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it what was started over it."""
        self._connection.close()

    def module(self, name: str, *arguments: str) -> list[str]:
        # As the host is asked what it has (-I): what its PYTHONPATH says, or lies in its user's own packages, is no part of it.
        return [self.python, "-I", "-m", name, *arguments]

    def start(
        self, argv: Sequence[str], env: Mapping[str, str | None], log: Path | None = None
    ) -> SshProcess:
        return self._start(argv, env, log, None)

    def _start(
        self, argv: Sequence[str], env: Mapping[str, str | None], log: Path | None, given: bytes | None
    ) -> SshProcess:
        printed = None if log is None else _opened(log)
        try:
            asked = {"argv": list(argv), "env": dict(env), "owner": _owner()}
            data = given or b""
            size = None if given is None else len(given)
            channel, told, rest, mark = self._ask("keep", data, **asked, stdin=size)
            if "error" in told:
                end(channel)
                raise EndpointError(f"{self.address}: cannot start {argv[0]}: {_remedied(told)}")
        except BaseException:
            if printed is not None:
                printed.close()
            raise
        return SshProcess(self, channel, mark, rest, told, log, printed)

    def end(self, pid: int, started: int) -> None:
        """Kill a program that runs there, with its group."""
        self._answer("kill", pid=pid, started=started)

    @property
    def connected(self) -> bool:
        return self._connection.stands

    def run(
        self, argv: Sequence[str], stdin: bytes = b"", within_s: float = 60.0, most: int = 16 << 20
    ) -> tuple[int, bytes]:
        """A program's exit status and what it printed. Raises EndpointError where it takes longer, or prints more."""
        deadline, printed = Deadline(within_s), bytearray()
        with self._start(argv, {}, None, stdin) as process:
            try:
                while True:
                    if descriptors.ready([process.stdout], deadline.left()):
                        piece = os.read(process.stdout.fileno(), 1 << 16)
                        printed += piece
                        if len(printed) > most:
                            raise EndpointError(f"{self.address}: {argv[0]} prints more than {most} bytes")
                        if not piece:
                            break
                status = process.status(deadline.left())
            except TimeoutError:
                status = None
            if status is None:
                raise EndpointError(f"{self.address}: {argv[0]} has not ended within {deadline}")
        return status, bytes(printed)

    def put(self, source: Path, target: Path) -> None:
        try:
            with open(files.open_own(source, os.O_RDONLY), "rb") as file:
                status = os.fstat(file.fileno())
                about = {"path": str(target), "size": status.st_size, "mode": status.st_mode & 0o777}
                channel, told, *_ = self._ask("put", file, **about)
        except OSError as error:
            raise StorageError(f"{source}: {error.strerror}") from error
        end(channel)
        self._stored(told, "written")

    def get(self, source: Path, target: Path) -> None:
        channel, told, data, _ = self._ask("get", path=str(source))
        with ending(channel):
            self._stored(told, "read")
            with files.replacing(target, told["mode"]) as temporary, temporary.open("wb") as file:
                left, deadline = told["size"], Deadline(_FILE_S)
                while left:
                    data = data or self._receive(channel, deadline)
                    if not data:
                        raise StorageError(f"{self.address}: {source} came in part: {self._fate()}")
                    file.write(data[:left])
                    left, data = left - min(left, len(data)), b""

    def _stored(self, told: Any, done: str) -> None:
        if isinstance(told, dict) and "error" in told:
            raise StorageError(f"{self.address}: cannot be {done}: {_remedied(told)}")

    def describe(self) -> dict[str, Any]:
        place = self._connection.where
        about = {"kind": "ssh", "address": self.address, "user": place.user}
        return {**about, **self._answer("describe")}

    def addresses(self) -> tuple[str, str]:
        """Our address and the host's, by which SSH goes."""
        return self._connection.addresses()

    def first_hop(self) -> str:
        """The address to which SSH leaves this machine; empty: nobody knows."""
        return self._connection.first_hop()

    def clock(self) -> tuple[float, float]:
        channel, *_ = self._ask("clock")
        best = (0.0, float("inf"))
        with ending(channel):
            for _ in range(_EXCHANGES):
                before = time.monotonic()
                self._send(channel, b"?")
                data = b""
                while len(data) < 8:
                    piece = self._receive(channel, Deadline(_ANSWER_S))
                    if not piece:
                        raise EndpointError(f"{self.address}: its clock is not told: {self._fate()}")
                    data += piece
                after = time.monotonic()
                ahead = struct.unpack("!q", data)[0] / 1e9 - (before + after) / 2
                best = min(best, (ahead, (after - before) / 2), key=lambda each: each[1])
        return best

    def clean(self, others: bool = False, sent: bool = False) -> list[str]:
        """End what dead runs and lost connections left there, and remove what is on record of it; a line for each.

        What a living run holds stays. Of runs of other machines, who cannot be asked, that is what a connection still holds;
        `others`: that is ended too. `sent`: files and models that were sent for runs go, too, where none is on.
        """
        channel, records, rest, mark = self._ask("clean", sent=sent)
        with ending(channel):
            self._require(records)
            dead = [name for name, record in records.items() if others or not _lives(name, record)]
            data = json.dumps(dead).encode()
            self._send(channel, _HEADER.pack(len(data)) + data)
            done, _ = self._told(channel, mark, rest)
            self._require(done)
        lines = []
        for name, ended in done:
            if ended is None:
                lines.append(f"{self.address}: removed {name}, which came in part")
            elif ended == "none":
                lines.append(f"{self.address}: removed {name}, which is no record of ours")
            elif ended == "sent":
                lines.append(f"{self.address}: removed {name}, which was sent there for runs")
            else:
                record = records[name]
                what = shlex.join(record["argv"])[:120]
                fate = "ended" if ended else "removed the record of"
                lines.append(f"{self.address}: {fate} process {record['pid']} ({what})")
        return lines

    def _answer(self, work: str, **asked: Any) -> Any:
        channel, told, *_ = self._ask(work, **asked)
        end(channel)
        self._require(told)
        return told

    def _require(self, told: Any) -> None:
        """Raises EndpointError where what was told is an error."""
        if isinstance(told, dict) and "error" in told:
            raise EndpointError(f"{self.address}: {_remedied(told)}")

    def _ask(self, work: str, data: Any = b"", **asked: Any) -> tuple[paramiko.Channel, Any, bytes, bytes]:
        """Have `remote.py` do its work there: the session, what it told first, what else came by then, and its mark.

        data: bytes, or an open file, that go there behind what is asked.
        """
        nonce = secrets.token_hex(8)
        header = json.dumps({"work": work, "nonce": nonce, **asked}).encode()
        source, mark = _source(), remote.MARK + nonce.encode()
        channel = self._connection.open()
        try:
            channel.settimeout(_ANSWER_S)
            channel.exec_command(
                f"exec {_quoted(self.python)} -I -S -c '{_BOOT % (len(source), len(source))}'"
            )
            try:
                channel.sendall(source + _HEADER.pack(len(header)) + header)
                pieces = [data] if isinstance(data, bytes) else iter(lambda: data.read(1 << 20), b"")
                for piece in pieces:
                    channel.sendall(piece)
            except LOST as error:  # it may have said why
                if isinstance(error, TimeoutError):
                    raise
            return channel, *self._told(channel, mark, b""), mark
        except LOST as error:
            end(channel)
            raise EndpointError(f"{self.address}: {self._fate(error)}") from error
        except BaseException:
            end(channel)
            raise

    def _told(self, channel: paramiko.Channel, mark: bytes, data: bytes) -> tuple[Any, bytes]:
        """What is told behind the mark, and what came behind that."""
        deadline = Deadline(_ANSWER_S)
        while True:
            at = data.find(mark)
            end = data.find(b"\n", at) if at >= 0 else -1
            if end >= 0:
                return json.loads(data[at + len(mark) : end]), data[end + 1 :]
            if len(data) > (_MOST_NOISE if at < 0 else at + _MOST_ANSWER):
                raise EndpointError(f"{self.address}: its login shell prints without end: {_last(data)}")
            piece = self._receive(channel, deadline)
            if not piece:
                raise EndpointError(f"{self.address}: {self._why_none(channel, data)}")
            data += piece

    def _why_none(self, channel: paramiko.Channel, printed: bytes) -> str:
        if not self.connected:
            return self._fate()
        status = channel.exit_status if channel.status_event.wait(1.0) else -1
        said = b""
        with contextlib.suppress(*LOST):
            channel.settimeout(0.2)
            said = channel.recv_stderr(1 << 16)
        if old := _OLD.search(said):
            return (
                f"its {self.python} is Python {old[1].decode()}, and the testbed needs 3.11 or newer; install one there, and "
                "make the environment of `python:` with it"
            )
        # csh's status is 1, whatever went wrong.
        if status in (126, 127) or said.rstrip().endswith((b"Command not found.", b"Permission denied.")):
            return f"no {self.python} there that runs ({_last(said)}); testbed hosts install makes the environment of `python:`"
        return f"its login shell ended with status {status} before {self.python} ran: {_last(printed + said)}"

    def _receive(self, channel: paramiko.Channel, deadline: Deadline) -> bytes:
        try:
            channel.settimeout(deadline.left())
            return channel.recv(1 << 16)
        except TimeoutError as error:
            raise EndpointError(f"{self.address}: no answer within {deadline}") from error
        except LOST:
            return b""

    def _send(self, channel: paramiko.Channel, data: bytes) -> None:
        try:
            channel.sendall(data)
        except LOST as error:
            raise EndpointError(f"{self.address}: {self._fate(error)}") from error

    def _fate(self, error: BaseException | None = None) -> str:
        if not self.connected:
            return "the connection was lost"
        if isinstance(error, TimeoutError):
            return f"no answer within {_ANSWER_S:.0f} s"
        return " ".join(str(error or "it ended early").split())[:300]


def _opened(log: Path) -> IO[bytes]:
    with files.storing(log):
        return os.fdopen(files.open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


@functools.cache
def _source() -> bytes:
    return inspect.getsource(remote).encode()


def _quoted(path: str) -> str:
    return "~/" + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def _last(data: bytes) -> str:
    lines = data.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _remedied(told: Mapping[str, Any]) -> str:
    import errno

    room = told["errno"] in (errno.ENOSPC, errno.EDQUOT)
    return f"{told['error']}{'; make room there' if room else ''}"


@functools.cache
def _machine() -> dict[str, str]:
    boot, name = namespaces.boot_id(), socket.gethostname()
    with contextlib.suppress(OSError):
        return {"machine": f"{Path('/etc/machine-id').read_text().strip()} {name}", "boot": boot}
    return {"machine": f"{boot} {name}", "boot": boot}


def _owner() -> dict[str, Any]:
    """Who starts a program: this process, told from all others of all machines."""
    pid = os.getpid()
    space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (no path)
    return {**_machine(), "space": space, "pid": pid, "started": processes.start_time(pid)}


def _lives(name: str, record: Mapping[str, Any]) -> bool:
    """Whether who started a program still runs, and holds on to it; of others than this machine's, whether somebody does."""
    owner, own, keeper = record["owner"], _owner(), record["keeper_is"]
    if keeper == "gone":
        return False
    if owner == own:
        return name in LIVING
    if owner["machine"] == own["machine"] and owner["boot"] != own["boot"]:
        return False
    if owner["machine"] == own["machine"] and owner["space"] == own["space"]:
        return processes.is_running(owner["pid"], owner["started"])
    return bool(keeper == "running")
