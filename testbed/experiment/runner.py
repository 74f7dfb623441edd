"""A run: opens a session, proves links and compute, makes the trials of each cell, and keeps whole rows whatever happens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from testbed import lookup
from testbed.codecs.spec import CodecSpec
from testbed.endpoints.protocol import Loaded, Outcome, Span
from testbed.errors import EndpointError, NetworkError
from testbed.experiment import expected, inputs, provenance
from testbed.experiment.compute import Start
from testbed.experiment.crossing import Crossing
from testbed.experiment.deployment import Batch
from testbed.experiment.environment import cpu_name, describe_host, host_name
from testbed.experiment.gate import Gate
from testbed.experiment.progress import Tally, Watcher
from testbed.experiment.results import FORMAT, RunDirectory, utc_now
from testbed.experiment.row import Row
from testbed.experiment.scenario import Cell, Plan
from testbed.experiment.session import Opening, as_asked
from testbed.experiment.shard import WHOLE, Shard
from testbed.experiment.shard import parse as parse_shard
from testbed.experiment.trial import Reference, Trial, new_row
from testbed.hosts.processes import interruptible
from testbed.models.sources import resolve
from testbed.net.network import Network
from testbed.net.profile.profile import Profile
from testbed.net.traffic.traffic import require_tools
from testbed.tasks.task import Task

if TYPE_CHECKING:
    from testbed.net.calibration.calibrate import Calibration

#: Files to which every start of a run adds.
_CONTINUED = ("calibration.json", "compute.json", "counters.json", "traffic.json")


class Runner:
    """One execution of a plan, or of a shard of it, into a run directory: `execute`, or `try_codec` while it is `on`.

    on_row: given each row, and its spans, once it is on the disk.
    """

    def __init__(
        self,
        plan: Plan,
        directory: RunDirectory,
        watch: Watcher,
        accept_uncalibrated: bool = False,
        opening: Opening = as_asked,
        shard: Shard = WHOLE,
        on_row: Callable[[Row, Sequence[Span]], None] | None = None,
    ) -> None:
        self.plan, self.scenario, self.directory, self.watch = plan, plan.scenario, directory, watch
        self.accept_uncalibrated = accept_uncalibrated
        self.opening = opening
        self.shard, self.on_row = shard, on_row
        self.failures = 0
        self._tally = Tally(plan, watch, shard.trials(plan))
        self._identities: dict[Cell, str] = {}
        self._done: set[str] = set()  # what failed is tried again, and leaves another row
        self._expected = 0  #: trials, of which some may be done
        self.resumed = False  #: that all are done already is an end
        self.settled = False  #: they were
        self._batches: list[Batch] = []
        self._gate: Gate | None = None
        self._uncalibrated: set[str] = set()
        self._threads: int | None = None  #: of the edge's compute
        self._host = self._cpu = ""  #: the machine's, as rows have them
        self._unlike = ""  #: that an earlier start of this run computed in another number

    def execute(self) -> None:
        """Run every trial that has not finished. Raises KeyboardInterrupt, NetworkError, EndpointError: the rows so far stay."""
        with self.on():
            if not self.settled:
                self._make_trials()

    def try_codec(self, codec: CodecSpec) -> None:
        """Run every trial with this codec, whichever the plan has. Raises as `execute` does."""
        self.plan = replace(self.plan, scenario=self.scenario.model_copy(update={"codecs": [codec]}))
        self._tally = Tally(
            self.plan, self.watch, self.shard.trials(self.plan)
        )  # what is told of the time left begins anew
        self._expect()
        self._make_trials()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Everything that trials need is there, and measured as fit; unless the run is `settled`. Raises as `execute` does."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruptible())
            stack.enter_context(self.directory.locked())
            self._take_up()
            if self.settled:
                yield
                return
            self.session = stack.enter_context(self.opening(self.plan, self.directory, self._tally.say))
            self._crossing = Crossing(self.plan, self.session)
            loaded = self._load()
            if self.session.linked:
                self._gate = self._prove_compute(loaded)
                self._calibrate(self._profiles_ahead())
            try:
                with self.session.traffic():
                    yield
                if self._gate is not None:
                    self._gate.close()
            finally:
                account = self.session.account.record()
                self._write_stretch("counters.json", {"link": self.plan.link}, profiles=account)
                self._write_stretch("traffic.json", {}, flows=self.session.flows)
        self.directory.write_parquet()

    def _load(self) -> dict[str, Loaded]:
        """Has both sides load the model and learn the examples, and writes what they say into the manifest."""
        models = self.scenario.models
        one = f"{models.edge} on both sides"
        self._tally.say(
            f"loading {one if self.scenario.one_model else f'{models.edge} at the edge, {models.cloud} in the cloud'}"
        )
        pair, network = self.session.pair, self.session.network
        loaded = pair.load()
        self._batches = pair.prepare()
        self._expect()
        address, kv_bytes = network.address(self.scenario.cloud), loaded["edge"].kv_bytes_per_token
        pair.serve(address, kv_bytes, apart=not network.one_clock, closed=network.closed)
        self._threads = loaded["edge"].threads
        self._host, self._cpu = self._machine()
        before = list(self.directory.rows())
        found = (other_threads(before, self._threads), other_hosts(before, self._host))
        self._unlike = "; ".join(filter(None, found))
        if self._unlike:
            self._tally.say(self._unlike)
        expected.write(self.directory, self.plan, self._batches)
        self._write_manifest(loaded, network)
        return loaded

    def _machine(self) -> tuple[str, str]:
        """The name and the processor of the machine on which trials are made; of two, those of the edge and of the cloud."""
        described = self.session.network.described()
        sides = [described.get(side, {}) for side in (self.scenario.edge, self.scenario.cloud)]
        if not all(sides):
            return host_name(), cpu_name()
        return tuple(" + ".join(str(side.get(key, "")) for side in sides) for key in ("host", "cpu"))  # type: ignore[return-value]

    def _take_up(self) -> None:
        # Only now does nobody else add rows.
        self.directory.repair()
        self._done = self.directory.finished()
        planned = self.directory.manifest().get("trials")
        self.settled = self.resumed and isinstance(planned, int) and 0 < planned <= len(self._done)
        if self.shard.trials(self.plan) == 0:  # of more shards than examples
            self.settled = True
        elif self.settled and not (self.directory.path / "trials.parquet").exists():
            self.directory.write_parquet()

    def _expect(self) -> None:
        for batch in self._batches:
            for cell in self.plan.cells(batch.task, batch.context_tokens):
                trials = len(self._numbers(batch)) * self.scenario.repeats
                self._tally.expect(cell, trials)
                self._expected += trials

    def _numbers(self, batch: Batch) -> list[int]:
        """The examples of a batch whose trials are this shard's."""
        return self.shard.numbers(self.plan, batch.task, batch.context_tokens, len(batch.examples))

    def _write_stretch(self, name: str, about: dict[str, str], **figures: Any) -> None:
        # One entry for each time the run was started: its figures are of one stretch of time.
        if any(figures.values()):
            before = self.directory.entries(name, "starts")
            ended = {"ended_at": utc_now(), "host": self._host, **figures}
            self.directory.write(name, {"format": FORMAT, **about, "starts": [*before, ended]})

    def _write_manifest(self, loaded: dict[str, Loaded], network: Network) -> None:
        before = self.directory.manifest()
        machines = kept if isinstance(kept := before.get("machines"), dict) else {}
        provenance.keep_questions(self.directory, self.plan, self._batches)
        edge = network.host(self.plan.edges[0].node if self.plan.edges else self.scenario.edge)
        self.directory.write(
            "manifest.json",
            {
                **before,
                "format": FORMAT,
                "name": self.scenario.name,
                "settings": self.scenario.model_dump(mode="json"),
                "prompt": str(self.plan.prompt),
                "topology": self.plan.topology.name,
                "cells": {cell.name: cell.scheduler for cell in self.plan.topology.cells},
                "link": self.plan.link,
                "profiles": {p.name: {"text": p.text(), "source": p.source} for p in self.plan.profiles},
                "emulator": network.emulation,
                "endpoints": {side: structs.asdict(about) for side, about in loaded.items()},
                "trials": self._expected,
                "starts": [*self.directory.entries("manifest.json", "starts"), utc_now()],
                "host": describe_host(),
                "machines": {**machines, self._host: describe_host()},
                **({"hosts": hosts} if (hosts := network.described()) else {}),
                "provenance": provenance.recorded(before.get("provenance"), self.plan, edge),
                "command": sys.argv,
            },
        )

    def _profiles_ahead(self) -> list[Profile]:
        """The profiles under which trials are still to be made, in the plan's order."""
        ahead = {
            trial.cell.profile
            for batch in self._batches
            for number in self._numbers(batch)
            for trial in self._trials(batch, number)
            if trial.id not in self._done
        }
        return [profile for profile in self.plan.profiles if profile in ahead]

    def _calibrate(self, profiles: list[Profile]) -> None:
        """Measure these profiles before the first trial; out of tolerance stops the run unless told to go on."""
        from testbed.net.calibration.calibrate import foretell

        history = self.directory.entries("calibration.json", "measurements")
        for number, profile in enumerate(profiles):
            self._tally.say(
                f"measuring the link: {profile.name} ({number + 1} of {len(profiles)}){foretell(profile)}"
            )
            measured = self._measured(profile)
            record = measured.to_dict()
            history = [
                *history,
                {"profile": profile.name, "measured_at": utc_now(), "host": self._host, **record},
            ]
            self.directory.write("calibration.json", {"format": FORMAT, "measurements": history})
            if not measured.ok:
                self._uncalibrated.add(profile.text())
                if not self.accept_uncalibrated:
                    raise NetworkError(
                        f"link {self.plan.link} is not what was asked for under {profile.name}: {measured.cause}; "
                        "continue all the same with --accept-uncalibrated"
                    )

    def _measured(self, profile: Profile) -> Calibration:
        """The swept link, put under that profile."""
        self._crossing.apply(profile)
        return self.session.network.calibrate(self.plan.link, profile)

    def _prove_compute(self, loaded: dict[str, Loaded]) -> Gate:
        """Measure how the sides compute before the first trial; a machine far from fit stops the run unless told to go on."""
        self._tally.say("measuring compute on both sides")
        edge, cloud = ((side.device, side.dtype, side.threads) for side in (loaded["edge"], loaded["cloud"]))
        before = self.directory.entries("compute.json", "starts")

        def write(start: Start) -> None:
            self.directory.write(
                "compute.json",
                {"format": FORMAT, "starts": [*before, replace(start, host=self._host).record()]},
            )

        # Of two machines nobody says that they should be alike.
        alike = edge == cloud and self.scenario.one_model and not self.session.network.apart
        gate = Gate(self.session.pair, alike, write)
        gate.open(self.accept_uncalibrated)
        return gate

    def _make_trials(self) -> None:
        self._tally.begin()
        self._crossing.begin()
        for batch in self._batches:
            task = self.plan.tasks[batch.task]
            for number in self._numbers(batch):
                todo = self._todo(batch, number)
                if not todo:
                    continue
                if self._gate is not None:
                    self._gate.between()
                reference = self._reference(batch, number, task, todo)
                for trial, following in zip(todo, [*todo[1:], None], strict=True):
                    row, spans = self._trial(trial, task, reference, following)
                    self.directory.append(row, spans)
                    if self.on_row is not None:
                        self.on_row(row, spans)
                    self._tally.done(trial.cell)

    def _reference(self, batch: Batch, number: int, task: Task, todo: Sequence[Trial]) -> Reference:
        """The full cache's answer, scored."""
        pair, example = self.session.pair, todo[0].example
        try:
            full = pair.reference(batch, number)
            edge_nll = full.nll
            if not self.scenario.one_model and any(trial.cell.placement == "edge" for trial in todo):
                edge_nll = pair.alone(batch, number).nll
        except EndpointError as error:
            if not self.session.pair.alive:
                raise
            return Reference(error=f"full cache: {error}")
        score = task.score(full.answer, example)["score"] if full.nll is not None else None
        return Reference(full.context_tokens, full.kv_bytes, full.answer, score, full.nll, edge_nll)

    def _trials(self, batch: Batch, number: int) -> Iterator[Trial]:
        """All trials of an example, in the order in which they are made."""
        prepared = batch.examples[number]
        for repeat in range(self.scenario.repeats):
            for cell in self.plan.cells(batch.task, batch.context_tokens):
                about = (batch.index, number, prepared.example, prepared.gold)
                yield Trial(cell, self._cell_id(cell), repeat, *about)

    def _todo(self, batch: Batch, number: int) -> list[Trial]:
        """An example's trials that have not finished yet."""
        todo = []
        for trial in self._trials(batch, number):
            if trial.id in self._done:
                self._tally.skip(trial.cell)
            else:
                todo.append(trial)
        return todo

    def _cell_id(self, cell: Cell) -> str:
        if cell not in self._identities:
            self._identities[cell] = cell.identity(self.plan)
        return self._identities[cell]

    def _trial(
        self, trial: Trial, task: Task, reference: Reference, following: Trial | None
    ) -> tuple[Row, Sequence[Span]]:
        """One request: its row and its spans; what fails is in the row's `error`. following: the one behind it, if any."""
        profile = trial.cell.profile
        calibrated = profile.text() not in self._uncalibrated
        row = new_row(trial, self.plan, self.session.network.emulation, reference, calibrated)
        complaints = self._gate.complaints if self._gate is not None else ()
        row.compute_steady = not complaints
        row.threads, row.host, row.cpu = self._threads, self._host, self._cpu
        row.warnings = "; ".join([*filter(None, [row.warnings, self._unlike]), *complaints])
        warnings: list[str] = []
        if reference.error:
            row.error = reference.error
            self.failures += 1
            return row, ()
        try:
            if trial.cell.placement == "edge":
                result = self.session.pair.trial(trial)
                # Two models' distributions are not compared.
                kl = 0.0 if reference.nll is not None and self.scenario.one_model else None
                outcome = Outcome(reference.context_tokens, reference.edge_nll, kl)
            else:
                self.session.pair.stock(trial)
                if self.plan.rehearses(trial.cell):
                    self.session.pair.rehearse(trial)
                row.trace_s = self._crossing.align(trial)
                with self.session.account.trial(profile.name) as warnings:
                    result = self._crossing.trial(trial, following)
                outcome = self.session.pair.outcome(result.request, trial)
        except EndpointError as error:
            if not self.session.pair.alive:
                raise
            row.error = str(error)
            self.failures += 1
            return row, ()
        finally:
            row.warnings = "; ".join([*filter(None, [row.warnings]), *warnings])
        # What a shape answers is worth nothing, and not zero.
        scores = {} if reference.nll is None else task.score(result.answer, trial.example)
        if scores and result.verified_s is not None:
            scores["verified_score"] = task.score(result.verified_answer, trial.example)["score"]
        if result.unverified:
            unverified = f"the answer was not verified: {result.unverified}"
            row.warnings = "; ".join([*filter(None, [row.warnings]), unverified])
        row.fill(result, outcome, scores)
        if not self.session.linked:
            row.wire_bytes = 0  # its connection's bytes crossed none
        if self.scenario.placement_free:
            row.leave_out_times()
            return row, ()
        return row, (*result.spans, *result.later)


def other_threads(rows: Iterable[dict[str, Any]], threads: int) -> str:
    """A sentence where these rows of earlier trials say another number of the edge's threads; else empty."""
    others = {int(row["threads"]) for row in rows if row.get("threads") is not None} - {threads}
    earlier = " and ".join(map(str, sorted(others)))
    sentence = f"computed in {threads} threads, earlier trials of this run in {earlier}: last bits may differ"
    return sentence if others else ""


def other_hosts(rows: Iterable[dict[str, Any]], host: str) -> str:
    """A sentence where these rows of earlier trials are of another machine; else empty."""
    others = {str(row["host"]) for row in rows if row.get("host")} - {host}
    earlier = " and ".join(sorted(others))
    return f"measured on {host}, earlier trials of this run on {earlier}" if others else ""


def check_ready(plan: Plan) -> None:
    """What can be known to fail before anything is written or built. Raises UsageError."""
    if plan.topology.kind == "hosts":  # who have the models, and say so where they do not
        return
    if plan.scenario.programs is None:
        for model in plan.models:
            resolve(model)
    if plan.scenario.placement_free:
        return
    require_tools(plan.flows())
    from testbed.net.calibration.calibrate import foretell
    from testbed.net.emulators import choose

    for profile in plan.profiles:
        foretell(profile)

    choose(plan.scenario.emulator)


def start(plan: Plan, out: Path, watch: Watcher, accept_uncalibrated: bool) -> Runner:
    """A run into a new directory `out`, not yet executed."""
    check_ready(plan)
    return _runner(plan)(plan, begin(plan, out), watch, accept_uncalibrated)


def _runner(plan: Plan) -> type[Runner]:
    """What runs a plan: trial by trial, or loads, or programs of one's own."""
    if plan.scenario.programs is not None:
        from testbed.experiment.program_run import ProgramRunner

        return ProgramRunner
    if not plan.scenario.loaded:
        return Runner
    from testbed.experiment.load_run import LoadRunner

    return LoadRunner


def begin(plan: Plan, out: Path, shard: Shard | None = None) -> RunDirectory:
    """The new directory of a run, or of a shard of one, with what is known before it. Raises UsageError."""
    directory = RunDirectory.create(out)
    with directory.locked():
        directory.check_new()  # another process may have begun in it meanwhile
        directory.write(
            "manifest.json",
            {
                "format": FORMAT,
                "name": plan.scenario.name,
                "settings": plan.scenario.model_dump(mode="json"),
                "asked": plan.asked,
                "created": utc_now(),
                "traces": inputs.keep_traces(plan, directory),
                "inputs": inputs.described(plan),
                **({"shard": str(shard)} if shard else {}),
            },
        )
    return directory


def plan_of(path: Path) -> Plan:
    """The plan of the run in `path`. Raises UsageError where it is none."""
    from testbed.experiment.plan import make_plan

    directory = RunDirectory.open(path)
    with lookup.among(inputs.kept_traces(directory.manifest().get("traces"), path.absolute())):
        return make_plan(directory.settings(), str(path / "manifest.json"))


def shard_of(directory: RunDirectory) -> Shard:
    """Which shard of its plan a run is; of most the whole. Raises UsageError where its manifest says what is none."""
    written = directory.manifest().get("shard")
    return WHOLE if written is None else parse_shard(str(written), {})


def resume(path: Path, watch: Watcher, accept_uncalibrated: bool) -> Runner:
    """Take up the run in `path` where it ended: what has no row and what failed. Raises UsageError where it is none."""
    directory = RunDirectory.open(path)
    for name in _CONTINUED:
        directory.entries(name, "")  # unreadable is better said now than after the trials
    return take_up(plan_of(path), directory, watch, accept_uncalibrated)


def take_up(
    plan: Plan, directory: RunDirectory, watch: Watcher, accept_uncalibrated: bool, elsewhere: bool = False
) -> Runner:
    """Take up a run of this very plan, to be executed here or elsewhere. Raises UsageError where what it reads is not what it
    was."""
    if not elsewhere:
        check_ready(plan)
    inputs.check_unchanged(directory.manifest().get("inputs"), plan)
    runner = _runner(plan)(plan, directory, watch, accept_uncalibrated, shard=shard_of(directory))
    runner.resumed = True
    return runner
