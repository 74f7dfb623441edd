"""A run: builds the network, starts the endpoints, proves the links, walks the cells, and keeps whole rows whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed.endpoints.launch import Endpoint, invoking_user
from testbed.environment import describe_host
from testbed.errors import EndpointError, NetworkError, UsageError
from testbed.estimate import Estimator
from testbed.models.sources import resolve
from testbed.net.accounting import Account
from testbed.net.fabric import Fabric
from testbed.net.profile import Profile
from testbed.net.topology import Topology
from testbed.net.traffic import running
from testbed.results import FORMAT, Row, RunDirectory
from testbed.scenario import Cell, Plan
from testbed.tasks.task import Example

_LOAD_TIMEOUT_S = 900.0
#: What one request may make the cloud allocate: the largest context's cache in 16 bits, twice, and room for headers.
_PAYLOAD_SLACK = 1 << 20


@dataclass
class Progress:
    """What a watcher is told after each step."""

    done: int
    total: int
    skipped: int
    remaining_s: float | None
    text: str


Watcher = Callable[[Progress], None]


@dataclass
class Batch:
    """A task's examples at one context length, as the edge made them."""

    index: int  #: the edge's number for it
    task: int
    context_tokens: int | None
    examples: list[dict[str, Any]]


class Run:
    """One execution of a plan into a run directory."""

    def __init__(
        self, plan: Plan, directory: RunDirectory, watch: Watcher, accept_uncalibrated: bool = False
    ) -> None:
        self.plan, self.scenario, self.directory, self.watch = plan, plan.scenario, directory, watch
        self.accept_uncalibrated = accept_uncalibrated
        self._identities: dict[Cell, str] = {}
        self._done = {row["trial"]: row for row in directory.rows() if "trial" in row}
        self._uncalibrated: set[str] = set()
        self._current: Profile | None = None
        self._origin = time.monotonic()  #: when traces begin
        self.failures = 0
        self._estimator = Estimator(plan)
        self._work_done = self._work_total = self._seconds = 0.0
        self._trials_done = 0

    def execute(self) -> None:
        """Run every cell that has no row yet. Raises KeyboardInterrupt, NetworkError, EndpointError: the rows so far stay."""
        first = replace_profile(self.plan, self.plan.profiles[0])
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruptible())
            stack.enter_context(locked(self.directory.path))
            self._say("building the network")
            self.fabric = stack.enter_context(self._build(first))
            self._say(f"loading {self.scenario.model} on both sides")
            self.edge = self._start("edge", self.scenario.edge, stack)
            self.cloud = self._start("cloud", self.scenario.cloud, stack)
            loaded = self._load()
            batches = self._prepare()
            self._link_settings = self._serve(batches, loaded)
            self._write_manifest(loaded)
            self._calibrate()
            self._account = Account(self.fabric, self.plan.link)
            try:
                with running(self.fabric, self.plan.flows()) as traffic:
                    self._walk(batches)
            finally:
                self._write_stretch(
                    "counters.json", {"link": self.plan.link}, profiles=self._account.record()
                )
            self._write_stretch("traffic.json", {}, flows=traffic)
        self.directory.write_parquet()

    def _write_stretch(self, name: str, about: dict[str, str], **found: Any) -> None:
        # One entry for each time the run was started: its figures are of one stretch of time.
        if any(found.values()):
            path = self.directory.path / name
            before = json.loads(path.read_text())["starts"] if path.exists() else []
            ended = {"ended_at": utc_now(), **found}
            self.directory.write(name, {"format": FORMAT, **about, "starts": [*before, ended]})

    def _build(self, topology: Topology) -> Fabric:
        captures = self.directory.path / "captures"
        fabric = Fabric.build(topology, self.scenario.emulator, captures=captures)
        if captures.is_dir():
            for path in (captures, *captures.iterdir()):
                self.directory.claim(path)
        return fabric

    def _start(self, role: str, node: str, stack: contextlib.ExitStack) -> Endpoint:
        log = self.directory.path / "logs" / f"{role}.log"
        log.parent.mkdir(exist_ok=True)
        endpoint = Endpoint.start(role, self.fabric.namespace(node), log)
        stack.callback(endpoint.stop)
        self.directory.claim(log.parent)
        self.directory.claim(log)
        return endpoint

    def _load(self) -> dict[str, Any]:
        """Load the model on one side, then the other: two loads at once would only fight over memory and cores."""
        loaded = {}
        for side, endpoint in (("edge", self.edge), ("cloud", self.cloud)):
            loaded[side] = endpoint.call(
                "load",
                _LOAD_TIMEOUT_S,
                model=self.scenario.model,
                device=getattr(self.scenario.device, side),
                dtype=getattr(self.scenario.dtype, side),
                threads=self.scenario.threads,
                slowdown=getattr(self.scenario.compute, side),
            )
        return loaded

    def _prepare(self) -> list[Batch]:
        batches = []
        for task, context_tokens in self.plan.batches():
            settings = self.scenario.tasks[task]
            made = self.edge.call(
                "prepare",
                _LOAD_TIMEOUT_S,
                task=settings["task"],
                parameters={k: v for k, v in settings.items() if k != "task"},
                count=self.scenario.examples,
                context_tokens=context_tokens,
                seed=self.scenario.seed,
                codecs=self.scenario.codecs,
                max_new_tokens=self.scenario.max_new_tokens,
                prompt=str(self.plan.prompt),
            )
            self.cloud.call("learn_prefix", _LOAD_TIMEOUT_S, text=made["prefix_text"])
            batches.append(Batch(made["batch"], task, context_tokens, made["examples"]))
            self._longest = max(getattr(self, "_longest", 0), made["longest"])
        for batch in batches:
            for cell in self.plan.cells(batch.task, batch.context_tokens):
                repeats = len(batch.examples) * self.scenario.repeats
                self._work_total += repeats * self._estimator.seconds(cell)
        return batches

    def _serve(self, batches: list[Batch], loaded: dict[str, Any]) -> dict[str, Any]:
        congestion = self.scenario.congestion or self._link().congestion
        bound = 2 * self._longest * loaded["edge"]["kv_bytes_per_token"] + _PAYLOAD_SLACK
        port = self.cloud.call("serve", 60, max_payload=bound, congestion=congestion)
        return {
            "address": self.fabric.address(self.scenario.cloud),
            "port": port,
            "congestion": congestion,
            "timeout": self.scenario.timeout,
            "reuse": self.scenario.connection == "reuse",
        }

    def _link(self) -> Any:
        return next(link for link in self.plan.topology.links if link.name == self.plan.link)

    def _write_manifest(self, loaded: dict[str, Any]) -> None:
        before = self.directory.manifest() if (self.directory.path / "manifest.json").exists() else {}
        self.directory.write(
            "manifest.json",
            {
                **before,
                "format": FORMAT,
                "name": self.scenario.name,
                "settings": self.scenario.model_dump(mode="json"),
                "prompt": str(self.plan.prompt),
                "topology": self.plan.topology.name,
                "link": self.plan.link,
                "profiles": {p.name: {"text": p.text(), "source": p.source} for p in self.plan.profiles},
                "emulator": self.fabric.emulator.name,
                "endpoints": loaded,
                "trials": self.plan.trials,
                "starts": [*before.get("starts", []), utc_now()],
                "host": describe_host(),
                "command": sys.argv,
            },
        )

    def _calibrate(self) -> None:
        """Measure every profile before the first trial; out of tolerance stops the run unless told to go on."""
        from testbed.net.calibrate import calibrate

        history = self.directory.calibration().get("measurements", [])
        for number, profile in enumerate(self.plan.profiles):
            self._say(f"measuring the link: {profile.name} ({number + 1} of {len(self.plan.profiles)})")
            self._apply(profile)
            measured = calibrate(self.fabric, self.plan.link, profile)
            record = measured.to_dict()
            history = [*history, {"profile": profile.name, "measured_at": utc_now(), **record}]
            self.directory.write("calibration.json", {"format": FORMAT, "measurements": history})
            if not measured.ok:
                self._uncalibrated.add(profile.text())
                if not self.accept_uncalibrated:
                    raise NetworkError(
                        f"link {self.plan.link} is not what was asked for under {profile.name}: {measured.cause}; "
                        "continue all the same with --accept-uncalibrated"
                    )

    def _apply(self, profile: Profile) -> None:
        if profile != self._current:
            self.fabric.apply(self.plan.link, profile, self._origin)
            self._current = profile

    def _align(self, profile: Profile) -> float | None:
        """Puts the link under a trial's profile; how far its traces, which begin with the trial or the run, have come."""
        if profile.changes and self.scenario.at == "trial":
            self._origin, self._current = time.monotonic(), None
        self._apply(profile)
        return time.monotonic() - self._origin if profile.changes else None

    def _walk(self, batches: list[Batch]) -> None:
        self._origin, self._current = time.monotonic(), None
        for batch in batches:
            task = self.plan.tasks[batch.task]
            cells = self.plan.cells(batch.task, batch.context_tokens)
            for number, made in enumerate(batch.examples):
                example = Example(made["id"], made["context"], made["question"], tuple(made["answers"]))
                todo = [
                    (cell, repeat)
                    for repeat in range(self.scenario.repeats)
                    for cell in cells
                    if not self._skip(cell, example, repeat)
                ]
                if not todo:
                    continue
                self.cloud.call("forget")
                reference = self.edge.call("reference", None, batch=batch.index, example=number)
                self.cloud.call(
                    "compare",
                    60,
                    distributions=reference.pop("distributions"),
                    vocabulary=reference["vocabulary"],
                )
                reference["score"] = task.score(reference["answer"], example)["score"]
                for cell, repeat in todo:
                    row = self._trial(batch, number, made["gold"], example, task, cell, repeat, reference)
                    self.directory.append(row)
                    self._report(cell, row)

    def _skip(self, cell: Cell, example: Example, repeat: int) -> bool:
        if self._trial_id(cell, example, repeat) not in self._done:
            return False
        self._trials_done += 1
        self._work_total -= self._estimator.seconds(cell)
        return True

    def _cell_id(self, cell: Cell) -> str:
        if cell not in self._identities:
            self._identities[cell] = cell.identity(self.plan)
        return self._identities[cell]

    def _trial_id(self, cell: Cell, example: Example, repeat: int) -> str:
        text = f"{self._cell_id(cell)}/{example.id}/{repeat}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _trial(
        self,
        batch: Batch,
        number: int,
        gold: str,
        example: Example,
        task: Any,
        cell: Cell,
        repeat: int,
        reference: dict[str, Any],
    ) -> Row:
        """One request, and its row; what fails is in the row's `error`."""
        row = self._row(batch, example, cell, repeat, reference)
        told: list[str] = []
        common = {"batch": batch.index, "example": number, "repeat": repeat, "reuse": self.scenario.reuse}
        try:
            if cell.placement == "edge":
                result = self.edge.call("edge", None, **common)
                outcome = {"tokens_kept": reference["context_tokens"], "nll": reference["nll"], "kl": 0.0}
            else:
                row.trace_s = self._align(cell.profile)
                link = {**self._link_settings, "name": cell.profile.text()}
                extra = {"codec": cell.codec} if cell.placement == "split" else {}
                with self._account.trial(cell.profile.name) as told:
                    result = self.edge.call(cell.placement, None, link=link, **extra, **common)
                outcome = self.cloud.call("outcome", None, id=result["request"], gold=gold)
        except EndpointError as error:
            if not (self.edge.alive and self.cloud.alive):
                raise
            row.error = str(error)
            self.failures += 1
            return row
        finally:
            row.warnings = "; ".join([*filter(None, [row.warnings]), *told])
        fill(row, result, outcome, task.score(result["answer"], example))
        return row

    def _row(self, batch: Batch, example: Example, cell: Cell, repeat: int, reference: dict[str, Any]) -> Row:
        profile, steady = cell.profile, cell.profile.steady()
        uncalibrated = profile.text() in self._uncalibrated
        return Row(
            trial=self._trial_id(cell, example, repeat),
            cell=self._cell_id(cell),
            repeat=repeat,
            started_at=utc_now(),
            model=self.scenario.model,
            task=task_label(self.plan, batch.task, batch.context_tokens),
            example=example.id,
            context_tokens=reference["context_tokens"],
            placement=cell.placement,
            codec=cell.codec,
            profile=profile.name,
            link=self.plan.link,
            emulator=self.fabric.emulator.name,
            transport=self.scenario.transport,
            congestion="",
            rate_up_bps=steady.up.rate_bps,
            rate_down_bps=steady.down.rate_bps,
            delay_up_s=steady.up.delay_s,
            delay_down_s=steady.down.delay_s,
            loss_up=steady.up.loss,
            loss_down=steady.down.loss,
            kv_bytes=reference["kv_bytes"],
            edge_slowdown=self.scenario.compute.edge,
            cloud_slowdown=self.scenario.compute.cloud,
            reference_answer=reference["answer"],
            reference_score=reference["score"],
            reference_nll=reference["nll"],
            calibrated=not uncalibrated,
            warnings="link out of tolerance" if uncalibrated else "",
        )

    def _report(self, cell: Cell, row: Row) -> None:
        self._trials_done += 1
        self._work_done += self._estimator.seconds(cell)
        remaining = None
        spent = time.monotonic() - self._walk_started
        if self._work_done > 0 and spent > 5:
            remaining = max(0.0, self._work_total - self._work_done) * spent / self._work_done
        what = row.codec or f"{row.placement} placement"
        self.watch(Progress(self._trials_done, self.plan.trials, 0, remaining, f"{row.profile}  {what}"))

    @property
    def _walk_started(self) -> float:
        if not self._seconds:
            self._seconds = time.monotonic()
        return self._seconds

    def _say(self, text: str) -> None:
        self.watch(Progress(self._trials_done, self.plan.trials, 0, None, text))


def fill(row: Row, result: dict[str, Any], outcome: dict[str, Any], scores: dict[str, float]) -> None:
    """Put what the endpoints measured, and the answer's scores, into a row."""
    for stage, seconds in result["stages"].items():
        setattr(row, stage, seconds)
    row.e2e_s = result["e2e_s"]
    row.ttft_s = row.e2e_s - row.generate_s
    row.reused = ",".join(result["reused"])
    row.wire_bytes, row.payload_bytes = result["wire_bytes"], result["payload_bytes"]
    row.retransmits, row.congestion = result["retransmits"], result["congestion"]
    row.answer = result["answer"].strip()
    row.score, row.em, row.f1 = scores["score"], scores["em"], scores["f1"]
    row.nll, row.kl = outcome["nll"], outcome.get("kl")
    row.tokens_kept = outcome["tokens_kept"]
    row.payload_digest = outcome.get("payload_digest", "")
    row.kept_digest = outcome.get("kept_digest", "")
    if row.placement == "split" and row.kv_bytes:
        row.bits_per_element = row.payload_bytes * 8 / (row.kv_bytes / 2)


def task_label(plan: Plan, task: int, context_tokens: int | None) -> str:
    """A task as rows name it: with its parameters, and the context length where the scenario has several."""
    label = plan.tasks[task].label
    return f"{label}@{context_tokens or 'own'}" if len(plan.scenario.context_tokens) > 1 else label


def replace_profile(plan: Plan, profile: Profile) -> Any:
    """The plan's topology with the swept link under `profile`."""
    links = tuple(replace(k, profile=profile) if k.name == plan.link else k for k in plan.topology.links)
    return replace(plan.topology, links=links)


def utc_now() -> str:
    """The time as rows have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: cleaned up, resumable."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time may work on a run directory. Raises UsageError where another does."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{path}: another testbed process is working on this run") from error
        yield
    finally:
        os.close(fd)


def check_ready(plan: Plan) -> None:
    """What can be known to fail before anything is written or built. Raises UsageError."""
    resolve(plan.scenario.model)
    from testbed.net.emulators import choose

    choose(plan.scenario.emulator)


def start(plan: Plan, out: Path, watch: Watcher, accept_uncalibrated: bool) -> Run:
    """A run into a new directory `out`, not yet executed."""
    user = invoking_user()
    check_ready(plan)
    directory = RunDirectory.create(out, (user.uid, user.gid))
    directory.write(
        "manifest.json",
        {
            "format": FORMAT,
            "name": plan.scenario.name,
            "settings": plan.scenario.model_dump(mode="json"),
            "created": utc_now(),
        },
    )
    return Run(plan, directory, watch, accept_uncalibrated)


def resume(path: Path, watch: Watcher, accept_uncalibrated: bool) -> Run:
    """Take up the run in `path` where it ended. Raises UsageError where it is not one."""
    from testbed.planning import make_plan

    user = invoking_user()
    directory = RunDirectory.open(path, (user.uid, user.gid))
    manifest = directory.manifest()
    plan = make_plan(manifest["settings"], str(path / "manifest.json"))
    check_ready(plan)
    directory.repair()
    return Run(plan, directory, watch, accept_uncalibrated)
