"""What runs on a host reached over SSH, sent there as text: the standard library alone, of any Python from 3.8 on.

It is told by a header on standard input what to do (`_WORK`), and answers by one line of JSON behind the mark: what a login
shell printed before is no part of that. `keep` stays beside the program that it starts, whose standard input and output are the
session's own:

- where the session is gone (its end of standard output hangs up), the program has 3 s to leave, and is killed with its group;
- where this process dies, the program is killed (PR_SET_PDEATHSIG);
- where the program stands still (SIGSTOP) for more than a second, it is killed;
- it is on record below ``~/.local/state/testbed`` while it runs, by pid, start time and the system's boot, so that `clean` finds
  what was left.

What becomes of it is told on standard error, behind the same mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

MARK = b"\0testbed:"  # and the header's nonce
LEAVE_S, STOPPED_S = 3.0, 1.0
_STATE = Path("~/.local/state/testbed").expanduser()
_PROCESSES, _FILES = _STATE / "processes", _STATE / "files"
_SENT = Path("~/.cache/testbed/sent").expanduser()  # files and models that runs sent
_LOOK_MS = 250


def main() -> None:
    (length,) = struct.unpack("!I", _exactly(4))
    asked = json.loads(_exactly(length))
    say = _Saying(MARK + asked["nonce"].encode())
    if sys.platform != "linux":
        say(1, {"error": f"it runs {platform.system()}, and a host has to run Linux", "errno": 0})
        return
    with contextlib.suppress(OSError):  # wherever the login shell went
        os.chdir(os.path.expanduser("~"))  # noqa: PTH111
    try:
        _WORK[asked["work"]](asked, say)
    except OSError as error:
        said = error.strerror or str(error)
        place = ": " + os.fsdecode(error.filename) if error.filename else ""
        say(1, {"error": said + place, "errno": error.errno or 0})


class _Saying:
    def __init__(self, mark: bytes) -> None:
        self.mark = mark

    def __call__(self, to: int, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            _write(to, self.mark + json.dumps(value).encode() + b"\n")


def _exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(0, min(count - len(data), 1 << 20))
        if not piece:
            raise OSError(0, "cut off")
        data += piece
    return data


def _write(to: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(to, view) :]


def _copy(count: int, write: Callable[[bytes], Any]) -> None:
    while count:
        piece = _exactly(min(count, 1 << 20))
        write(piece)
        count -= len(piece)


# --- processes ---


def _stat(pid: int) -> Any:
    # state, group, session, start time; None: there is none, or only its zombie
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[2]), int(fields[3]), int(fields[19]))


def _runs(pid: int, started: int) -> bool:
    found = _stat(pid)
    return found is not None and found[3] == started


def _members(pid: int, started: int) -> list[int]:
    # The process and all of its session. While any is left the kernel gives the number to nobody else; where somebody else has
    # it, none is left.
    leader = _stat(pid)
    if leader is not None and leader[3] != started:
        return []
    others = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = {other: _stat(other) for other in others if other != os.getpid()}
    return [other for other, status in found.items() if status and (other == pid or status[2] == pid)]


def _end(pid: int, started: int) -> bool:
    until = time.monotonic() + LEAVE_S
    ended = False
    while True:
        left = _members(pid, started)
        if not left or time.monotonic() > until:
            return ended
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        ended = True
        time.sleep(0.02)


def keep(asked: dict[str, Any], say: _Saying) -> None:
    environment = {**os.environ, **asked["env"]}
    environment = {name: value for name, value in environment.items() if value is not None}
    argv = [_own(asked["argv"][0]), *asked["argv"][1:]]
    if shutil.which(argv[0], path=environment.get("PATH")) is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    given = 0
    if asked["stdin"] is not None:
        spool = tempfile.TemporaryFile()  # noqa: SIM115 (the program closes it)
        _copy(asked["stdin"], spool.write)
        spool.seek(0)
        given = spool.fileno()
    waking, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    waits, goes = os.pipe()
    keeper = os.getpid()
    program = os.fork()
    if program == 0:
        _become(argv, environment, given, keeper, waits, goes)
    record = _PROCESSES / asked["nonce"]
    try:
        started, own = (_stat(pid)[3] for pid in (program, keeper))
        about = {"pid": program, "started": started, "keeper": [keeper, own], "boot": _boot()}
        _note(record, {**about, "argv": argv, "owner": asked["owner"]})
        say(1, about)
        os.write(goes, b"1")  # what it prints is behind that
        _beside(program, waking, say)
    finally:
        _kill(program)
        _, fate = os.waitpid(program, 0)
        with contextlib.suppress(OSError):
            record.unlink()
        _tidy()
        say(2, {"ended": -os.WTERMSIG(fate) if os.WIFSIGNALED(fate) else os.WEXITSTATUS(fate)})


def _become(
    argv: list[str], environment: dict[str, str], given: int, keeper: int, waits: int, goes: int
) -> None:
    # In the fresh child: the program, once it is on record.
    try:
        os.setsid()
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        os.close(goes)
        if os.getppid() == keeper and os.read(waits, 1):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.dup2(given, 0)
            os.execvpe(argv[0], argv, environment)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _kill(program: int) -> None:
    for end in (os.killpg, os.kill):  # it may not be of a group of its own yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(program, signal.SIGKILL)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(1)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _note(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}")
    for last in (False, False, True):  # others may take it away as none, and the directory, which is empty
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside.write_text(json.dumps(value))
            beside.replace(path)
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            if last or not isinstance(error, FileNotFoundError):
                raise OSError(error.errno, error.strerror, str(path)) from None


def _beside(pid: int, waking: int, say: _Saying) -> None:
    # until the program has ended, which is then still to be waited for
    poller = select.poll()
    poller.register(1, 0)
    poller.register(waking, select.POLLIN)
    kill_at = stopped_at = None
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for descriptor, _ in poller.poll(_LOOK_MS):
            if descriptor == waking:
                with contextlib.suppress(BlockingIOError):
                    os.read(waking, 4096)
            else:
                poller.unregister(1)
                kill_at = time.monotonic() + LEAVE_S
        now = time.monotonic()
        found = _stat(pid)
        if found is None or found[0] != "T":
            stopped_at = None
        elif stopped_at is None:
            stopped_at = now
        elif now - stopped_at > STOPPED_S:
            _kill(pid)
            say(2, {"stopped_s": now - stopped_at})
            return
        if kill_at is not None and now > kill_at:
            _kill(pid)
            return


def kill(asked: dict[str, Any], say: _Saying) -> None:
    say(1, _end(asked["pid"], asked["started"]))


# --- files ---


def put(asked: dict[str, Any], say: _Saying) -> None:
    path = Path(_own(asked["path"]))
    beside = path.absolute().with_name(f".{path.name[:200]}.{asked['nonce']}")
    note = _FILES / asked["nonce"]
    own = _stat(os.getpid())
    _note(note, {"path": str(beside), "pid": os.getpid(), "started": own[3]})
    try:
        with beside.open("xb") as file:
            _copy(asked["size"], file.write)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), asked["mode"])
        beside.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        for left in (beside, note):
            with contextlib.suppress(OSError):
                left.unlink()
        _tidy()
    say(1, True)


def get(asked: dict[str, Any], say: _Saying) -> None:
    with Path(_own(asked["path"])).open("rb") as file:
        status = os.fstat(file.fileno())
        say(1, {"size": status.st_size, "mode": status.st_mode & 0o777})
        left = status.st_size
        while left:
            piece = file.read(min(left, 1 << 20))
            if not piece:
                return
            _write(1, piece)
            left -= len(piece)


def _own(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 (only a leading ~ is one)


# --- what else there is ---


def describe(asked: dict[str, Any], say: _Saying) -> None:
    system = platform.uname()
    about = {"hostname": socket.gethostname(), "system": f"{system.system} {system.release}"}
    say(1, {**about, "machine": system.machine, "python": platform.python_version()})


def clock(asked: dict[str, Any], say: _Saying) -> None:
    say(1, True)
    while os.read(0, 1):
        os.write(1, struct.pack("!q", time.monotonic_ns()))


def clean(asked: dict[str, Any], say: _Saying) -> None:
    # What is on record is told; what is named in answer is ended, and told again with what became of it.
    records = {}
    done: list[Any] = []
    for path in _listed(_PROCESSES):
        record = _record(path)
        under_way = path.name.startswith(".")
        if record is None or (under_way and record["keeper_is"] == "gone"):
            if _removed(path):
                done.append([str(path), "none"])
        elif not under_way:
            records[path.name] = record
    say(1, records)
    (length,) = struct.unpack("!I", _exactly(4))
    for name in json.loads(_exactly(length)):
        record = records[name]
        # After another boot these numbers are other programs'.
        ended = [record["boot"] == _boot() and _end(*record[one]) for one in ("keeper", "program")]
        done.append([name, any(ended)])
        _removed(_PROCESSES / name)
    for path in _listed(_FILES):
        try:
            noted = json.loads(path.read_text())
            if _runs(noted["pid"], noted["started"]):
                continue
            if _removed(Path(noted["path"])):
                done.append([noted["path"], None])
            elif os.path.lexists(noted["path"]):
                continue
        except _UNREADABLE:  # it is no note
            pass
        _removed(path)
    _tidy()
    if asked["sent"] and not os.path.lexists(_STATE):  # no run is on
        with contextlib.suppress(OSError):
            shutil.rmtree(_SENT)
            done.append([str(_SENT), "sent"])
    say(1, done)


_UNREADABLE = (OSError, ValueError, LookupError, TypeError, RecursionError)


def _record(path: Path) -> Any:
    # what `keep` wrote, and how its keeper is; None: it is none
    try:
        record = json.loads(path.read_text())
        pid, started = record["keeper"]
        owner = record["owner"]
        numbers = [pid, started, record["pid"], record["started"], owner["pid"], owner["started"]]
        words = [*record["argv"], record["boot"], owner["machine"], owner["boot"], owner["space"]]
        if not all(type(each) is int for each in numbers) or not all(type(each) is str for each in words):
            return None
    except _UNREADABLE:
        return None
    keeper: Any = _stat(pid) if record["boot"] == _boot() else None
    there = keeper is not None and keeper[3] == started
    state = ("standing" if keeper[0] == "T" else "running") if there else "gone"
    return {**record, "program": [record["pid"], record["started"]], "keeper_is": state}


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _listed(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(directory.iterdir())
    return []


def _tidy() -> None:
    for directory in (_PROCESSES, _FILES, _STATE):
        with contextlib.suppress(OSError):
            directory.rmdir()


_WORK: dict[str, Callable[[dict[str, Any], _Saying], None]] = {
    each.__name__: each for each in (keep, kill, put, get, describe, clock, clean)
}

if "TESTBED_SENT" in globals():  # not where it is imported for its words
    main()
