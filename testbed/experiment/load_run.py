"""A run of loads: what is sent is made beforehand, then many edges ask at once, and each load leaves its rows when it has ended.

A load is of use as a whole: one that did not come to its end leaves none, and is put on again where the run is resumed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from msgspec import structs

from testbed.endpoints.load_messages import Happened
from testbed.endpoints.protocol import Span
from testbed.errors import NetworkError
from testbed.experiment import allocation, full_load
from testbed.experiment import wares as making
from testbed.experiment.crowd import Crowd, Put
from testbed.experiment.deployment import Batch
from testbed.experiment.edges import Edge
from testbed.experiment.environment import cpu_name, host_name
from testbed.experiment.handovers import Met, begin_again
from testbed.experiment.progress import Tally
from testbed.experiment.results import FORMAT, utc_now
from testbed.experiment.row import Row
from testbed.experiment.runner import Runner
from testbed.experiment.scenario import Cell
from testbed.experiment.trial import new_row
from testbed.experiment.wares import Made, Wares
from testbed.hosts.processes import interruptible
from testbed.load.closed import Closed
from testbed.load.load import Open
from testbed.net.fabric.accounting import LATE_S
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile
from testbed.net.traffic.traffic import running

if TYPE_CHECKING:
    from testbed.net.calibration.calibrate import Calibration

_LOADS = "loads.json"


@dataclass(frozen=True)
class Episode:
    """A load, put on once."""

    batch: Batch
    cell: Cell
    cell_id: str
    repeat: int

    @property
    def id(self) -> str:
        """The same load has the same one in every start of a run."""
        text = f"{self.cell_id}/{self.batch.index}/{self.repeat}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def trial(self, number: int) -> str:
        """The identity of one of its requests."""
        return hashlib.blake2b(f"{self.id}/{number}".encode(), digest_size=8).hexdigest()


class LoadRunner(Runner):
    """One execution of a plan of loads into a run directory."""

    def execute(self) -> None:
        """Put on every load that has not come to its end. Raises as `Runner.execute` does."""
        self._tally = Tally(self.plan, self.watch, self.plan.trials)
        self._host, self._cpu = host_name(), cpu_name()
        with interruptible(), self.directory.locked():
            self._take_up()
            if not self.settled:
                with making.made(self.plan, self.directory, self._cell_id, self._tally.say) as wares:
                    self._batches = next(iter(wares.batches.values()))
                    if batches := wares.passes():
                        self.directory.write("batches.json", {"format": FORMAT, "batches": batches})
                    self._put_on(wares)
        if not self.settled:
            self.directory.write_parquet()

    def _take_up(self) -> None:
        ended = self.directory.entries(_LOADS, "ended")
        self._done = {str(entry["id"]) for entry in ended}
        self.directory.repair()
        self.directory.keep_first(sum(int(entry["requests"]) for entry in ended))
        planned = self.directory.manifest().get("trials")
        self.settled = self.resumed and isinstance(planned, int) and 0 < planned <= len(self._done)
        if self.settled and not (self.directory.path / "trials.parquet").exists():
            self.directory.write_parquet()

    def _episodes(self) -> Iterator[Episode]:
        for batch in self._batches:
            for repeat in range(self.scenario.repeats):
                for cell in self.plan.cells(batch.task, batch.context_tokens):
                    yield Episode(batch, cell, self._cell_id(cell), repeat)

    def _put_on(self, wares: Wares) -> None:
        ahead = []
        for episode in self._episodes():
            self._expected += 1
            self._tally.expect(episode.cell, 1)
            if episode.id in self._done:
                self._tally.skip(episode.cell)
            else:
                ahead.append(episode)
        self._tally.say("building the network")
        topology = self.plan.under(self.plan.profiles[0])
        with (
            Fabric.build(
                topology, self.scenario.emulator, captures=self.directory.path / "captures"
            ) as fabric,
            Crowd(self.plan, fabric, self.directory, wares) as crowd,
        ):
            self._fabric = fabric
            self._write_manifest(next(iter(wares.loaded.values())), fabric)
            self._calibrate(self._profiles_under(ahead))
            first = {(each.cell.profile, each.cell.allocate): each for each in reversed(ahead)}
            self._fill(list(reversed(first.values())), wares)
            self._tally.begin()
            self._origin = time.monotonic()
            for episode in ahead:
                self._one(episode, crowd, wares)
                self._tally.done(episode.cell)

    def _profiles_under(self, ahead: Sequence[Episode]) -> list[Profile]:
        """All that links of edges will be under, or the swept one."""
        profiles = dict.fromkeys(episode.cell.profile for episode in ahead)
        own = (edge.profile for edge in self.plan.edges if edge.profile is not None)
        used = [*profiles, *own] if ahead else []
        if self.plan.own_links and all(edge.profile is not None for edge in self.plan.edges):
            used = [*own]
        return list(dict.fromkeys(used))

    def _measured(self, profile: Profile) -> Calibration:
        """One of the links that will be under that profile: what makes them is alike."""
        plan = self.plan
        own = [edge.link for edge in plan.edges if (edge.profile or profile) == profile]
        swept = profile in plan.profiles and not plan.own_links
        link = plan.link if swept or not own else own[0]
        self._fabric.settle(link)
        self._fabric.apply(link, profile)
        return self._fabric.calibrate(link, profile)

    def _fill(self, episodes: Sequence[Episode], wares: Wares) -> None:
        """Measure an edge's link once more while the others' are full, and a cell for which they contend; more edges than leave
        them as asked for are refused."""
        for episode in episodes:
            profile = episode.cell.profile
            self._tally.say(f"measuring a link while all others are full: {profile.name}")
            self._conditions(profile)
            shared = self._share_out(episode, wares)
            link = full_load.measured(self._fabric, self.plan)
            if link is not None:
                others = f"all links but {link.calibration.link} were full"
                self._judge_full(profile, shared, link, others)
            cell = full_load.contended(self._fabric, self.plan)
            if cell is not None:
                self._judge_full(profile, shared, cell, f"all edges of cell {cell.cell} were sending")

    def _judge_full(
        self, profile: Profile, shared: dict[str, str], found: full_load.Full | full_load.Contended, when: str
    ) -> None:
        about = {"profile": profile.name, "edges": len(self.plan.edges), "measured_at": utc_now()}
        told = {"allocate": shared} if shared else {}
        self._note("full", {**about, **told, **found.to_dict()})
        if found.ok:
            return
        self._uncalibrated.add(profile.text())
        if not self.accept_uncalibrated:
            raise NetworkError(
                f"{len(self.plan.edges)} edges are more than this machine carries faithfully under {profile.name}: while "
                f"{when}, {found.cause}; ask for fewer edges or lower rates, or continue all the same with --accept-uncalibrated"
            )

    def _note(self, what: str, entry: dict[str, Any]) -> None:
        """Keep one more thing that happened."""
        kept = {name: self.directory.entries(_LOADS, name) for name in ("ended", "full")}
        kept[what].append(entry)
        self.directory.write(_LOADS, kept)

    def _conditions(self, swept: Profile) -> None:
        """Every link under what it is to be under; traces begin now, or began with the run."""
        if self.scenario.at != "run":
            self._origin = time.monotonic()
        links = {} if self.plan.own_links else {self.plan.link: swept}
        for link, profile in {**links, **self.plan.conditions(swept)}.items():
            self._fabric.settle(link)
            self._fabric.apply(link, profile, self._origin)

    def _share_out(self, episode: Episode, wares: Wares) -> dict[str, str]:
        """Have cells be shared out as that load has it; how, by cell, where that says it: by what edges announce, the mean of the
        payloads that each is to send."""
        scheduler = episode.cell.allocate
        if scheduler is None:
            return {}
        sizes = {
            edge.link: fmean(made.result.payload_bytes for made in self._made(episode, edge, wares))
            for edge in self.plan.edges
        }
        told = allocation.shares(scheduler, self._fabric.topology, sizes)
        for cell, text in told.items():
            self._fabric.share_out(cell, text)
        return told

    def _made(self, episode: Episode, edge: Edge, wares: Wares) -> list[Made]:
        """What that edge sends in a load, example by example."""
        return wares.of(episode.batch, self.plan.at_edge(episode.cell, edge), edge)

    def _one(self, episode: Episode, crowd: Crowd, wares: Wares) -> None:
        """Put a load on, and keep what became of it."""
        begin_again(self._fabric, self.plan.handovers)
        self._conditions(episode.cell.profile)
        shared = self._share_out(episode, wares)
        put = self._put(episode, wares)
        before = {edge.link: self._fabric.counters(edge.link) for edge in self.plan.edges}
        with running(self._fabric, self.plan.flows()) as flows:
            asked, met = crowd.ask(episode.cell, put)
        rows = [self._row(episode, wares, met, *each) for each in asked]
        counted = {
            link: {way: now.since(then[way]) for way, now in self._fabric.counters(link).items()}
            for link, then in before.items()
        }
        for row, _ in rows:
            said = [each for way, own in counted[row.link].items() for each in own.complaints(way, LATE_S)]
            row.warnings = "; ".join(filter(None, [row.warnings, *said]))
        late_s = {
            edge.node: max((own.worst_lateness_s for own in counted[edge.link].values()), default=0.0)
            for edge in self.plan.edges
        }
        rows.sort(key=lambda each: (each[0].arrived_at or 0.0, each[0].client))
        self.directory.append_all(rows)
        self.failures += sum(bool(row.error) and not row.refused for row, _ in rows)
        about = {"id": episode.id, "requests": len(rows), "cell": episode.cell_id, "repeat": episode.repeat}
        told: dict[str, Any] = {"allocate": shared} if shared else {}
        told |= {"handovers": [asdict(each) for each in met]} if met else {}
        told |= {"traffic": flows} if flows else {}
        self._note("ended", {**about, **told, "ended_at": utc_now(), "late_s": late_s})

    def _put(self, episode: Episode, wares: Wares) -> Put:
        """Who asks what when."""
        scenario, load = self.scenario, episode.cell.load
        until_s = scenario.warmup + scenario.duration
        seed = f"{scenario.seed}/{episode.batch.index}/{episode.repeat}"
        edges = self.plan.edges
        numbers = [[made.number for made in self._made(episode, edge, wares)] for edge in edges]
        put = Put(episode.cell, until_s, numbers)
        if isinstance(load, Open):
            put.arrivals = load.arrivals([edge.node for edge in edges], until_s, seed)
        elif isinstance(load, Closed):
            put.clients, put.think_s = load.starting(len(edges), seed), load.think
        return put

    def _row(
        self, episode: Episode, wares: Wares, met: Sequence[Met], edge: int, happened: Happened
    ) -> tuple[Row, Sequence[Span]]:
        """A request's row and its spans."""
        made = wares.numbered(happened.ware)
        own = self.plan.edges[edge]
        trial = replace(made.trial, cell=self.plan.at_edge(episode.cell, own), cell_id=episode.cell_id)
        calibrated = trial.cell.profile.text() not in self._uncalibrated
        row = new_row(trial, self.plan.of_edge(own), self._fabric.emulation, made.reference, calibrated)
        row.trial, row.repeat = episode.trial(happened.number), episode.repeat
        row.link, row.client, row.arrived_at = own.link, happened.client, happened.at
        row.warmup, row.refused = happened.at < self.scenario.warmup, happened.refused
        done = happened.at if happened.ended is None else happened.ended
        row.handover = ", ".join(each.links for each in met if each.by(own.node, happened.at, done))
        row.threads = wares.loaded[own.computed]["edge"].threads
        row.host, row.cpu, row.replayed = self._host, self._cpu, True
        if not made.alike:
            row.warnings = "decoded with others at once, its answer is another"
        result = happened.result
        if result is None:
            row.error = happened.error
            return row, ()
        result.replayed = True
        if made.ware.parts is None or not made.ware.parts.choices:  # else each request has its own
            result.payload_bytes = made.result.payload_bytes
        result.shared_bytes, result.question_s = made.result.shared_bytes, made.result.question_s
        kept = max(0, made.outcome.tokens_kept - (result.tokens_left_out or 0))
        row.fill(result, structs.replace(made.outcome, tokens_kept=kept), made.scores)
        return row, result.spans
