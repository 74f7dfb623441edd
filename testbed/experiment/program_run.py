"""A run of programs of one's own: servers stand while their command is the same, a trial is one client from its start to its end.

Repeats are outermost, so that a slow drift of the machine touches all settings alike; then parameters, then links.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import files
from testbed.descriptors import ready as readable
from testbed.errors import EndpointError, NetworkError, SpecError
from testbed.experiment import programs as words
from testbed.experiment import provenance
from testbed.experiment.environment import cpu_name, describe_host, host_name
from testbed.experiment.programs import CLIENT, Program, Scalar
from testbed.experiment.progress import Progress
from testbed.experiment.results import FORMAT, utc_now
from testbed.experiment.row import COLUMNS, Row
from testbed.experiment.runner import Runner
from testbed.hosts.listening import await_port
from testbed.hosts.processes import interruptible
from testbed.net.fabric.accounting import Account
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile

if TYPE_CHECKING:
    from testbed.experiment.scenario import Plan
    from testbed.hosts.host import Process
    from testbed.net.calibration.calibrate import Calibration

PLACEMENT = "program"
_MOST_PRINTED = 16 << 20  #: bytes of a client's standard output
_LOOK_S, _TRY_S = 0.05, 0.1
#: What a server prints on its standard output goes where its errors go: into its log.
_TO_LOG = ["sh", "-c", 'exec "$0" "$@" >&2']


@dataclass(frozen=True)
class Setting:
    """One combination of parameters on one link: a cell of the sweep."""

    values: dict[str, Scalar]
    label: str
    profile: Profile
    cell: str

    def trial(self, repeat: int) -> str:
        """The same trial has the same identity in every start of a run."""
        return hashlib.blake2b(f"{self.cell}/{repeat}".encode(), digest_size=8).hexdigest()


def settings(plan: Plan) -> list[Setting]:
    """The plan's settings, links innermost."""
    scenario = plan.scenario
    shared = {
        "programs": {name: each.model_dump(mode="json") for name, each in (scenario.programs or {}).items()},
        "topology": plan.topology.name,
        "link": plan.link,
        "traffic": scenario.traffic,
        "at": scenario.at,
    }
    found = []
    for values in words.combinations(scenario.parameters):
        for profile in plan.profiles:
            text = json.dumps({**shared, "values": values, "profile": profile.text()}, sort_keys=True)
            cell = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
            found.append(Setting(values, words.label(values, scenario.parameters), profile, cell))
    return found


class ProgramRunner(Runner):
    """One execution of a plan of programs into a run directory."""

    def execute(self) -> None:
        """Run every trial that has not finished. Raises as `Runner.execute` does."""
        self._settings = settings(self.plan)
        self._host, self._cpu = host_name(), cpu_name()
        self._total = len(self._settings) * self.scenario.repeats
        self._made = 0
        self._current: Profile | None = None  # what the link is under
        with interruptible(), self.directory.locked():
            self.directory.repair()
            self._done = self.directory.finished()
            self.settled = self.resumed and self._total <= len(self._done)
            if not self.settled:
                self._across_links()
            self.directory.write_parquet()

    def _across_links(self) -> None:
        self._say("building the network")
        topology = self.plan.under(self.plan.profiles[0])
        captures = self.directory.path / "captures"
        with Fabric.build(topology, self.scenario.emulator, captures=captures) as fabric:
            self._fabric = fabric
            self._account = Account(fabric, self.plan.link)
            self._write_about()
            ahead = [each for each in self._settings if any(map(self._is_ahead, self._trials_of(each)))]
            self._calibrate(list(dict.fromkeys(each.profile for each in ahead)))
            self._origin, self._current = time.monotonic(), None
            with _Servers(self.plan, fabric, self._log) as servers:
                try:
                    self._make(servers)
                finally:
                    self._write_stretch(
                        "counters.json", {"link": self.plan.link}, profiles=self._account.record()
                    )

    def _trials_of(self, setting: Setting) -> Iterator[str]:
        return map(setting.trial, range(self.scenario.repeats))

    def _is_ahead(self, trial: str) -> bool:
        return trial not in self._done

    def _make(self, servers: _Servers) -> None:
        for repeat in range(self.scenario.repeats):
            for setting in self._settings:
                if self._is_ahead(setting.trial(repeat)):
                    row, more = self._program_trial(setting, repeat, servers)
                    self.failures += bool(row.error)
                    self.directory.append(row, more=more)
                self._made += 1
                self._say(f"{setting.profile.name}  {setting.label or CLIENT}")

    def _program_trial(self, setting: Setting, repeat: int, servers: _Servers) -> tuple[Row, dict[str, Any]]:
        """One client: its row, and what it has of its own."""
        self._fabric.check()
        row = _new_row(self.plan, setting, repeat, self._fabric.emulation)
        row.host, row.cpu = self._host, self._cpu
        row.calibrated = setting.profile.text() not in self._uncalibrated
        row.warnings = "" if row.calibrated else "link out of tolerance"
        values = {**setting.values, **_addresses(self._fabric), "repeat": repeat}
        more: dict[str, Any] = dict(setting.values)
        warnings: list[str] = []
        try:
            servers.ready(values)
            row.trace_s = self._conditions(setting.profile)
            before = self._fabric.counters(self.plan.link)
            with self._account.trial(setting.profile.name) as warnings:
                row.e2e_s, printed = self._client(values)
            crossed = [
                now.since(before[way]).bytes for way, now in self._fabric.counters(self.plan.link).items()
            ]
            row.wire_bytes = sum(crossed)
            found_columns = words.columns_of(words.last_object(printed), self._programs[CLIENT].columns)
        except (EndpointError, SpecError) as error:
            row.error, row.e2e_s = str(error), None
            return row, more
        finally:
            row.warnings = "; ".join([*filter(None, [row.warnings]), *warnings])
        row.ttft_s = row.e2e_s
        for name, value in found_columns.items():
            if name in words.MEASURED:
                _put(row, name, value)
            else:
                more[f"{CLIENT}_{name}" if name in COLUMNS or name in more else name] = value
        return row, more

    @property
    def _programs(self) -> dict[str, Program]:
        return self.scenario.programs or {}

    def _client(self, values: Mapping[str, Scalar]) -> tuple[float, bytes]:
        """Runs the client: seconds from its start to its end, and what it printed. Raises EndpointError where it fails."""
        program = self._programs[CLIENT]
        host = self._fabric.host(program.node)
        environment = dict(zip(program.env, words.filled(list(program.env.values()), values), strict=True))
        started = time.monotonic()
        until = started + self.scenario.timeout
        with host.start(words.filled(program.run, values), environment, self._log(CLIENT)) as process:
            process.stdin.close()
            try:
                printed = _printed(process, until)
                status = process.status(max(0.0, until - time.monotonic()))
                seconds = time.monotonic() - started
            finally:
                _end_group(process)
        if status is None:
            raise EndpointError(f"{CLIENT}: not over after {self.scenario.timeout:g} s")
        if status != 0:
            said = process.last_words()
            raise EndpointError(f"{CLIENT}: ended with status {status}{': ' + said if said else ''}")
        return seconds, printed

    def _conditions(self, profile: Profile) -> float | None:
        """Puts the link under a profile, whose traces begin with the trial or the run; how far they have come."""
        restart = profile.changes and self.scenario.at != "run"
        if restart or profile != self._current:
            self._fabric.settle(self.plan.link)
            self._origin = time.monotonic() if restart else self._origin
            self._fabric.apply(self.plan.link, profile, self._origin)
            self._current = profile
        return time.monotonic() - self._origin if profile.changes else None

    def _measured(self, profile: Profile) -> Calibration:
        self._fabric.settle(self.plan.link)
        self._fabric.apply(self.plan.link, profile)
        return self._fabric.calibrate(self.plan.link, profile)

    def _say(self, text: str) -> None:
        self.watch(Progress(self._made, self._total, None, text))

    def _log(self, name: str) -> Path:
        logs = self.directory.path / "logs"
        with files.storing(logs):
            logs.mkdir(exist_ok=True)
        return logs / f"{name}.log"

    def _write_about(self) -> None:
        profiles = {p.name: {"text": p.text(), "source": p.source} for p in self.plan.profiles}
        before, node = self.directory.manifest(), self._fabric.host(self._programs[CLIENT].node)
        self.directory.write(
            "manifest.json",
            {
                **before,
                "format": FORMAT,
                "topology": self.plan.topology.name,
                "link": self.plan.link,
                "profiles": profiles,
                "emulator": self._fabric.emulation,
                "trials": self._total,
                "starts": [*self.directory.entries("manifest.json", "starts"), utc_now()],
                "host": describe_host(),
                "provenance": provenance.recorded(before.get("provenance"), self.plan, node),
            },
        )


def _put(row: Row, name: str, value: Any) -> None:
    """What a client measured itself, in the row's own column, where it is of its kind."""
    if name == "answer":
        row.answer = str(value)
    elif isinstance(value, int | float):
        whole = name in ("answer_tokens", "payload_bytes")
        setattr(row, name, int(value) if whole else float(value))


def _addresses(fabric: Fabric) -> dict[str, Scalar]:
    return {f"{node.name}.address": fabric.address(node.name) for node in fabric.topology.nodes}


def _new_row(plan: Plan, setting: Setting, repeat: int, emulator: str) -> Row:
    steady = setting.profile.steady()
    return Row(
        trial=setting.trial(repeat),
        cell=setting.cell,
        repeat=repeat,
        started_at=utc_now(),
        model="",
        task=plan.scenario.name,
        example=str(repeat),
        context_tokens=0,
        placement=PLACEMENT,
        codec=setting.label,
        delivery="",
        profile=setting.profile.name,
        link=plan.link,
        emulator=emulator,
        transport="",
        congestion="",
        rate_up_bps=setting.profile.up.mean_rate_bps("up"),
        rate_down_bps=setting.profile.down.mean_rate_bps("down"),
        delay_up_s=steady.up.delay_s,
        delay_down_s=steady.down.delay_s,
        loss_up=steady.up.loss,
        loss_down=steady.down.loss,
    )


def _printed(process: Process, until: float) -> bytes:
    """A program's standard output, to its end or that time. Raises EndpointError where it is more than anybody reads."""
    pieces, size = [], 0
    while (left := until - time.monotonic()) > 0:
        if not readable([process.stdout], min(left, _LOOK_S)):
            continue
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
        if size > _MOST_PRINTED:
            raise EndpointError(f"{CLIENT}: printed more than {_MOST_PRINTED >> 20} MiB")
    return b"".join(pieces)


def _end_group(process: Process) -> None:
    """Ends a program with all that it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class _Servers:
    """The servers of a plan: each is started when its command is another than before, or when it has ended. A context manager."""

    def __init__(self, plan: Plan, fabric: Fabric, log: Any) -> None:
        self._programs = {
            name: each for name, each in (plan.scenario.programs or {}).items() if name != CLIENT
        }
        self._fabric, self._log, self._patience_s = fabric, log, plan.scenario.timeout
        self._running: dict[str, tuple[Process, list[str]]] = {}

    def __enter__(self) -> _Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self._stop(name)

    def ready(self, values: Mapping[str, Scalar]) -> None:
        """Has every server stand and take callers. Raises EndpointError where one does not."""
        for name, program in self._programs.items():
            command = words.filled(program.run, values)
            process, before = self._running.get(name, (None, None))
            if process is not None and (before != command or process.status() is not None):
                self._stop(name)
                process = None
            if process is None:
                environment = dict(
                    zip(program.env, words.filled(list(program.env.values()), values), strict=True)
                )
                log = self._log(name)
                seen = log.stat().st_size if log.exists() else 0
                process = self._fabric.host(program.node).start([*_TO_LOG, *command], environment, log)
                process.stdin.close()
                self._running[name] = process, command
                self._await(name, program, process, values, seen)

    def _stop(self, name: str) -> None:
        process, _ = self._running.pop(name)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        process.status(1.0)
        _end_group(process)
        process.stop()

    def _await(
        self, name: str, program: Program, process: Process, values: Mapping[str, Scalar], seen: int
    ) -> None:
        """Waits until a server that was just started is ready, as its program says."""
        until = time.monotonic() + self._patience_s
        while not self._is_ready(program, values, process.log, seen):
            status = process.status(_TRY_S)
            if status is not None or time.monotonic() > until:
                how = (
                    f"ended with status {status}"
                    if status is not None
                    else f"not ready after {self._patience_s:g} s"
                )
                said = process.last_words()
                self._stop(name)
                raise EndpointError(f"{name}: {how}{': ' + said if said else ''}")

    def _is_ready(self, program: Program, values: Mapping[str, Scalar], log: Path | None, seen: int) -> bool:
        ready = program.ready
        if ready is None:
            return True
        if ready.after is not None:
            time.sleep(ready.after)
            return True
        if ready.port is not None:
            (port,) = words.filled([ready.port], values)
            with contextlib.suppress(NetworkError):
                await_port(self._fabric.namespace(program.node), int(port), 0.0)
                return True
            return False
        if ready.log is not None:
            printed = files.read(log)[seen:].decode(errors="replace") if log is not None else ""
            return re.search(ready.log, printed) is not None
        return self._asked(program.node, words.filled(ready.run or [], values))

    def _asked(self, node: str, command: Sequence[str]) -> bool:
        with self._fabric.host(node).start([*_TO_LOG, *command], {}) as process:
            process.stdin.close()
            try:
                return process.status(self._patience_s) == 0
            finally:
                _end_group(process)
