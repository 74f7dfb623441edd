"""The shards of a plan on the machines of a Ray cluster: a task a shard, in a lane of whichever machine is free.

A lane is one of the resource ``testbed_lane``, which a machine has as often as it carries runs at once: that keeps what is
measured on it apart. What is there of a shard goes along as files; a program of its own goes on with it there, as if somebody
had typed ``testbed run --resume`` on that machine. Its rows come back as they are written. What is lost with a worker or a
machine goes on elsewhere behind the rows that came. Ray is imported here alone, and only where it is asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import files
from testbed.errors import StorageError, UsageError
from testbed.experiment import lanes, shards
from testbed.experiment.environment import host_name
from testbed.experiment.progress import Progress, Watcher
from testbed.experiment.results import SPANS, RunDirectory
from testbed.experiment.runner import plan_of
from testbed.experiment.scenario import Plan
from testbed.experiment.shard import Shard, first_places, of_folder
from testbed.hosts import survey
from testbed.hosts.processes import interruptible

LANE = "testbed_lane"
_ROWS = "trials.jsonl"
#: How often a shard is begun that its worker or machine is lost with.
_ATTEMPTS = 5
_LOOK_S, _GRACE_S = 0.2, 30.0
_START = f"ray start --resources '{{\"{LANE}\": 1}}'"
_HEAD = _START.replace("start", "start --head")

#: How a client of HTTP/2 begins, as gRPC's do, and how a server has to: with a frame SETTINGS, whose length comes first, of
#: stream 0 (RFC 9113, 3.4 and 6.5).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = bytes([4, 0, 0, 0, 0, 0])
_KNOCK_S = 5.0

#: What a worker sends: ("host", its name), ("lines", of which file, them), ("files", in a tar), ("end", exit status, last words).
Message = tuple[Any, ...]


@dataclass(frozen=True)
class ShardEnd:
    """What became of a shard. hosts: on which it was made, in turn; error: why it did not end; attempts: that were made now."""

    shard: Shard
    hosts: tuple[str, ...]
    attempts: int
    error: str = ""


@dataclass
class _Share:
    """A shard on its way. begun: when its present attempt was."""

    shard: Shard
    directory: RunDirectory
    hosts: tuple[str, ...] = ()
    attempts: int = 0
    error: str = ""
    ended: bool = False


@contextlib.contextmanager
def connected(address: str, lanes: int | None) -> Iterator[int]:
    """This process drives a cluster for the block: one of its own (``local``, with so many lanes), the one on this machine
    (``auto``), or that at an address; gives how many lanes it has. Raises UsageError with the remedy."""
    if address != "local" and lanes is not None:
        raise UsageError(
            f"--lanes is for --ray local; a cluster's machines say themselves how many they have: {_START}"
        )
    ray = _ray()
    _knock(address)
    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    with files.scratch("tb-ray-") as place:
        try:
            if address == "local":
                own = {
                    "resources": {LANE: lanes or 1},
                    "_temp_dir": str(place),
                    "_node_ip_address": "127.0.0.1",
                }
                ray.init(address="local", **quiet, **own)
            else:
                del quiet["include_dashboard"]
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            why = str(error).strip().splitlines()[0]
            if address == "auto" and isinstance(error, ConnectionError):
                why = f"no Ray is found on this machine; start one by  {_HEAD}  or take --ray local, for this run alone"
            raise UsageError(f"--ray {address}: {why}") from error
        try:
            there = int(ray.cluster_resources().get(LANE, 0))
            if there < 1:
                raise UsageError(
                    f"--ray {address}: no machine has a lane for a run; start each one's Ray by  {_START}"
                )
            yield there
        finally:
            ray.shutdown()


def run(
    plan: Plan,
    out: Path,
    count: int,
    watch: Watcher,
    options: Sequence[str] = (),
    *,
    accept_uncalibrated: bool = False,
) -> list[ShardEnd]:
    """Make what is missing of a plan's `count` shards, in `out`/shards, on the cluster that is `connected`.

    options: of ``testbed run --resume``, for every worker. Raises UsageError as `shards.prepare` does, StorageError, and
    KeyboardInterrupt: rows so far stay, and workers clean up.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible())
        shares = []
        for number in range(1, count + 1):
            shard = Shard(number, count)
            runner = shards.prepare(plan, shard, out, watch, accept_uncalibrated, elsewhere=True)
            stack.enter_context(runner.directory.locked())
            runner.directory.repair()
            shares.append(_Share(runner.shard, runner.directory))
        driver = _Driver(
            plan, shares, [*options, *(["--accept-uncalibrated"] if accept_uncalibrated else [])], watch
        )
        driver.drive()
        return [ShardEnd(s.shard, s.hosts, s.attempts, s.error) for s in shares]


def check(plan: Plan) -> None:
    """Raises UsageError where a plan is not for a cluster's machines."""
    shards.check_shares(plan, 2)
    if plan.topology.kind != "namespaces":
        raise UsageError(
            "--ray: each machine builds a network of its own, and this topology names hosts; run it without"
        )


def count_of(out: Path, plan: Plan, lanes: int, asked: int | None) -> int:
    """How many shards a run in `out` has: as many as are there, as asked, or one a lane, but no more than examples."""
    begun = {shard.count for path in shards.found_in(out) if (shard := of_folder(path.name))}
    if begun:
        return begun.pop()
    (task, _), first = list(first_places(plan).items())[-1]
    return min(asked or lanes, first + plan.scenario.examples_of(task))


class _Driver:
    """Hands shards out, takes their rows in, and hands those out again whose worker is lost."""

    def __init__(self, plan: Plan, shares: Sequence[_Share], options: list[str], watch: Watcher) -> None:
        self._ray, self._options, self._watch = _ray(), options, watch
        self._all, self._under_way = shares, dict[Any, _Share]()
        self._total = sum(share.shard.trials(plan) for share in shares)
        self._done = sum(len(share.directory.finished()) for share in shares)
        self._before, self._since = self._done, time.monotonic()
        task = self._ray.remote(max_retries=0, num_cpus=0, num_returns="streaming", resources={LANE: 1})
        self._task = task(work)

    def drive(self) -> None:
        """Until every shard has ended, or failed for good."""
        try:
            for share in self._all:
                if not _settled(share):
                    self._hand_out(share)
            self._tell(f"{len(self._under_way)} shards wait for a lane")
            while self._under_way:
                ready, _ = self._ray.wait(list(self._under_way), timeout=1.0)
                for stream in ready:
                    self._take(stream)
        except BaseException:
            self._call_off()
            raise

    def _hand_out(self, share: _Share) -> None:
        share.attempts += 1
        path = share.directory.path
        given = _packed(path, _files(path))
        self._under_way[self._task.remote(survey.copy_of_testbed()["digest"], given, self._options)] = share

    def _take(self, stream: Any) -> None:
        """The next message of a worker, or its end."""
        share = self._under_way[stream]
        try:
            message = self._ray.get(next(stream))
        except StopIteration:
            self._ended(stream, share)
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.RayTaskError):  # of the worker's own program, anywhere
                share.error = str(error).strip().splitlines()[-1]
                share.ended = True
            self._ended(stream, share)
        else:
            self._receive(share, message)

    def _ended(self, stream: Any, share: _Share) -> None:
        del self._under_way[stream]
        if share.ended:
            return
        if share.attempts < _ATTEMPTS:
            self._tell(
                f"shard {share.shard}: its worker on {share.hosts[-1] if share.hosts else '?'} is lost; it goes on elsewhere"
            )
            self._hand_out(share)
        else:
            share.error = f"its worker was lost {share.attempts} times"

    def _receive(self, share: _Share, message: Message) -> None:
        kind, *values = message
        if kind == "host":
            share.hosts += (values[0],)
            self._tell(f"shard {share.shard} on {values[0]}")
        elif kind == "lines":
            name, lines = values
            files.append(share.directory.path / name, lines)
            if name == _ROWS:
                self._done += lines.count(b"\n")
                self._tell(f"{share.hosts[-1]}  shard {share.shard}")
        elif kind == "files":
            _unpack(values[0], share.directory.path)
        else:
            status, words = values
            # Failed trials are rows, too.
            well = status == 0 or (status == 1 and not _lacks(share))
            share.error = "" if well else words or f"it ended with status {status}"
            share.ended = True

    def _tell(self, text: str) -> None:
        made, taken = self._done - self._before, time.monotonic() - self._since
        left = (self._total - self._done) * taken / made if made > 1 else None
        self._watch(Progress(self._done, self._total, left, text))

    def _call_off(self) -> None:
        """Workers end what they do, and are waited for while they clean up."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            for stream in self._under_way:
                self._ray.cancel(stream)
        deadline = time.monotonic() + _GRACE_S
        for stream, share in self._under_way.items():
            with contextlib.suppress(StopIteration, StorageError, self._ray.exceptions.RayError):
                while (left := deadline - time.monotonic()) > 0:
                    self._receive(share, self._ray.get(next(stream), timeout=left))


def work(digest: str, given: bytes, options: Sequence[str]) -> Iterator[Message]:
    """A worker's part: goes on with a shard whose files are given, and sends what is written, as it is written."""
    yield "host", host_name()
    if why := _unlike(digest) or _powerless("--rootless" in options):
        yield "end", 2, why
        return
    with files.scratch("testbed-shard-") as place:
        path = place / "run"  # which whoever goes on with it locks
        path.mkdir()
        _unpack(given, path)
        if why := _crowded(path):
            yield "end", 2, why
            return
        sent = _states(path)
        with tempfile.TemporaryFile() as log:
            with _started(path, options, log) as process:
                while process.poll() is None:
                    yield from _written(path, sent)
                    time.sleep(_LOOK_S)
            yield from _written(path, sent)
            log.seek(0)
            words = log.read()[-4096:].decode(errors="replace").strip().splitlines()
            yield "end", process.returncode, words[-1] if words else ""


def _unlike(digest: str) -> str:
    """Why this machine's testbed is not the one that is wanted; empty: it is."""
    found = survey.copy_of_testbed()
    if found.get("digest") == digest:
        return ""
    return (
        f"its testbed ({found.get('path') or 'none'}) is not the one that drives the cluster; install the same there, such as by "
        "`testbed hosts install`, and start its Ray from that environment"
    )


def _powerless(rootless: bool) -> str:
    """Why whose worker this is cannot build a network; empty: they can, or the program that will says why not."""
    if os.geteuid() == 0:
        return ""
    # A worker has threads, whose locks a child that it forks itself may find taken.
    asked = [sys.executable, "-c", "from testbed.hosts.rootless import obstacle; print(obstacle())"]
    why = subprocess.run(asked, capture_output=True, text=True, timeout=_GRACE_S, check=False).stdout.strip()
    who = f"Ray runs there as user {os.geteuid()}, who may build no network"
    if not why:
        return "" if rootless else f"{who}: run with --rootless, which works there, or start its Ray as root"
    return f"{who}, and --rootless does not work there either: start its Ray as root, or allow it ({why})"


def _crowded(path: Path) -> str:
    """Why this machine has more lanes than it carries of what is to be run, or cannot run it; empty: neither is known."""
    ray = _ray()
    here = ray.get_runtime_context().get_node_id()
    count = next(node["Resources"].get(LANE, 0) for node in ray.nodes() if node["NodeID"] == here)
    try:
        lanes.check(plan_of(path), int(count))
    except UsageError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _started(path: Path, options: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The program that goes on with the run in `path`. It ends, and cleans up, with the block, and with this process."""
    # Ray says one thread, of a task that asks for no processor.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    program = [sys.executable, "-m", "testbed", "run", "--resume", str(path), *options]
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", *program],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _written(path: Path, sent: dict[Path, int]) -> Iterator[Message]:
    """What came since: files that are written anew, then whole lines of spans, then those of rows, which are theirs."""
    now = _states(path)
    appended = [path / SPANS, path / _ROWS]
    changed = [file for file, state in now.items() if file not in appended and sent.get(file) != state]
    if changed:
        sent.update({file: now[file] for file in changed})
        yield "files", _packed(path, changed)
    for file in appended:
        if now.get(file, 0) > sent.get(file, 0):
            with open(file, "rb") as stream:
                stream.seek(sent.get(file, 0))
                lines = stream.read(now[file] - sent.get(file, 0))
            whole = lines[: lines.rfind(b"\n") + 1]
            if whole:
                sent[file] = sent.get(file, 0) + len(whole)
                yield "lines", file.name, whole


def _states(path: Path) -> dict[Path, int]:
    """By file what changes when it is written: the length of one to which lines are appended, rows first; else when it was."""
    states: dict[Path, int] = {}
    for file in (path / _ROWS, path / SPANS, *_files(path)):
        with contextlib.suppress(OSError):
            about = file.stat()
            states.setdefault(file, about.st_size if file.name in (_ROWS, SPANS) else about.st_mtime_ns)
    return states


def _settled(share: _Share) -> bool:
    """Whether there is nothing left to do."""
    planned = share.directory.manifest().get("trials")
    return isinstance(planned, int) and 0 < planned <= len(share.directory.finished())


def _lacks(share: _Share) -> bool:
    """Whether a shard that ended has trials without a row, or never came so far as to know them."""
    planned = share.directory.manifest().get("trials")
    tried = {row["trial"] for row in share.directory.rows()}
    return not isinstance(planned, int) or planned > len(tried)


def _files(path: Path) -> list[Path]:
    """Of a run, but for what locks it, and what is being written."""
    return [
        f
        for f in sorted(path.rglob("*"))
        if f.is_file() and not f.is_symlink() and not f.name.startswith(".")
    ]


def _packed(path: Path, chosen: Sequence[Path]) -> bytes:
    """Files of a directory in a tar; one that is gone meanwhile is left out."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for file in chosen:
            with contextlib.suppress(FileNotFoundError):
                tar.add(file, str(file.relative_to(path)), recursive=False)
    return data.getvalue()


def _unpack(data: bytes, path: Path) -> None:
    """Put a tar's files into a directory; each is whole or not there. Raises StorageError."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member) if member.isfile() else None
            place = (path / member.name).resolve()
            if content is None or not place.is_relative_to(path.resolve()):
                raise StorageError(f"{member.name}: is not a file of a run")
            place.parent.mkdir(parents=True, exist_ok=True)
            files.replace(place, content.read())


def _knock(address: str) -> None:
    """Raises UsageError where no head of a cluster answers at HOST:PORT, which Ray itself finds out after minutes, or never."""
    if address == "local":
        return
    written, where = (address, "") if address != "auto" else _known()
    host, colon, port = written.rpartition(":")
    if address == "auto" and not written:
        return  # it looks for processes
    if not colon or not port.isdecimal() or "/" in host:
        raise UsageError(
            f"--ray {address}{where}: write local, auto, or the HOST:PORT of the cluster's head, such as 192.0.2.1:6379"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S) as head:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                head.sendall(_PREFACE)
                answers = head.recv(len(_SETTINGS) + 3, socket.MSG_WAITALL)[3:] == _SETTINGS
                if not answers:
                    raise OSError("what listens there is no Ray's head")
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray {address}{where}: cannot be reached: {error}") from error


def _known() -> tuple[str, str]:
    """The address that `auto` takes, by Ray's environment or what was last started here, and a note of that; empty: neither."""
    if written := os.environ.get("RAY_ADDRESS", ""):
        return ("" if written == "auto" else written), f" (RAY_ADDRESS={written})"
    noted = (
        Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
        / "ray"
        / "ray_current_cluster"
    )
    with contextlib.suppress(OSError, StorageError, UnicodeDecodeError):
        written = files.read(noted).decode().strip()
        return written, f" ({written}, by {noted})"
    return "", ""


def _ray() -> Any:
    """Ray, which only those need who ask for it; it sends nothing home. Raises UsageError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'testbed[ray]'") from error
    return ray
