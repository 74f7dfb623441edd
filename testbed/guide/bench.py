"""Trials without a network: edge and cloud in one process, over loopback. What a codec does to the answers needs no link."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from testbed.endpoints.deployment import Batch, Pair, launch
from testbed.experiment.compute import Gate
from testbed.experiment.plan import make_plan
from testbed.experiment.progress import Tally, Watcher
from testbed.experiment.results import Row, RunDirectory
from testbed.experiment.runner import Run
from testbed.experiment.scenario import Plan
from testbed.experiment.trial import Trial
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Direction, Profile
from testbed.net.topology.topology import Topology
from testbed.tasks.task import Task

#: No conditions at all. Its name is what rows say of their link.
LOOPBACK = Profile("loopback", Direction(), Direction(), "no link: two threads of one process")


class Loopback:
    """What a run asks of its `Fabric`, where there is none."""

    emulator = SimpleNamespace(name="none")

    def namespace(self, node: str) -> None:
        """Processes stay where they are."""

    def address(self, node: str, link: str | None = None) -> str:
        """Every node's."""
        return "127.0.0.1"

    def counters(self, link: str) -> dict[str, Any]:
        """Nobody counts."""
        return {}

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bench(Run):
    """A run whose codecs are asked for one after the other, by `procedure`, which gets this bench.

    Rows are those of any run, made by the same endpoints, and finished ones are not repeated. Their profile is `LOOPBACK`,
    their emulator "none", and ``wire_bytes`` 0: nothing crossed a link.
    """

    def __init__(
        self, plan: Plan, directory: RunDirectory, watch: Watcher, procedure: Callable[[Bench], None]
    ) -> None:
        super().__init__(plan, directory, watch)
        self._procedure = procedure
        self._made: list[Batch] = []

    def measure(self, codec: str) -> None:
        """Every example with this codec, into the directory's rows. Raises EndpointError where the process ends."""
        scenario = self.plan.scenario.model_copy(update={"codecs": [codec]})
        self.plan = replace(self.plan, scenario=scenario)
        self._tally = Tally(self.plan, self.watch)  # what is told of the time left begins anew
        self._expect(self._made)
        super()._walk(self._made)

    def _walk(self, batches: list[Batch]) -> None:
        self._made = batches
        self._procedure(self)

    def _build(self, topology: Topology) -> Fabric:
        return cast(Fabric, Loopback())

    def _pair(self, stack: contextlib.ExitStack) -> Pair:
        both = launch("both", None, self.directory, stack)
        return Pair(self.plan, both, both)

    def _calibrate(self, profiles: list[Profile]) -> None:
        """There is no link to be measured."""

    def _prove_compute(self, loaded: dict[str, Any]) -> Gate | None:
        """Nor are its times what is asked for."""
        return None

    def _apply(self, profile: Profile, restart: bool = False) -> None:
        """Nor to be changed."""

    def _write_stretch(self, name: str, about: dict[str, str], **found: Any) -> None:
        """Nor one whose packets were counted."""

    def _trial(self, trial: Trial, task: Task, reference: dict[str, Any]) -> Row:
        row = super()._trial(trial, task, reference)
        # The endpoints count the interfaces' bytes, which here are other programs'.
        return replace(row, wire_bytes=0)


def bench_plan(settings: dict[str, Any], place: str | Path) -> Plan:
    """The plan of these scenario settings, on no link. Raises UsageError naming `place`."""
    plan = make_plan({**settings, "profiles": ["delay=0ms"]}, str(place))
    # Loopback is the host's: which congestion controls it permits is not for us to say.
    links = tuple(replace(link, congestion=None) for link in plan.topology.links)
    return replace(plan, profiles=(LOOPBACK,), topology=replace(plan.topology, links=links))
