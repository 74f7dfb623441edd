"""Both endpoints, as a run drives them: started on their nodes, loaded, told the tasks, asked for one trial after another."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from testbed import files
from testbed.endpoints.launch import Endpoint
from testbed.net.fabric import Fabric
from testbed.results import RunDirectory
from testbed.scenario import Plan
from testbed.trial import Trial

_LOAD_TIMEOUT_S = 900.0
_SHORT_S = 60.0
#: What one request may make the cloud allocate: the largest context's cache in 16 bits, twice, and room for headers.
_PAYLOAD_SLACK = 1 << 20


@dataclass
class Batch:
    """A task's examples at one context length, as the edge made them."""

    index: int  #: the edge's number for it
    task: int
    context_tokens: int | None
    examples: list[dict[str, Any]]


def launch(
    role: str, namespace: str | None, directory: RunDirectory, stack: contextlib.ExitStack
) -> Endpoint:
    """Start an endpoint whose log is in the run's directory; `stack` ends it. Raises EndpointError."""
    logs = directory.path / "logs"
    with files.storing(logs):
        logs.mkdir(exist_ok=True)
    endpoint = Endpoint.start(role, namespace, logs / f"{role}.log")
    stack.callback(endpoint.stop)
    return endpoint


class Pair:
    """The edge and the cloud of one run. Every method raises EndpointError where an endpoint fails or has ended."""

    def __init__(self, plan: Plan, edge: Endpoint, cloud: Endpoint) -> None:
        self.plan, self.scenario, self.edge, self.cloud = plan, plan.scenario, edge, cloud
        self._link: dict[str, Any] = {}
        self._longest = 0

    @classmethod
    def start(cls, plan: Plan, fabric: Fabric, directory: RunDirectory, stack: contextlib.ExitStack) -> Pair:
        """Start both processes on their nodes; `stack` ends them."""
        edge = launch("edge", fabric.namespace(plan.scenario.edge), directory, stack)
        cloud = launch("cloud", fabric.namespace(plan.scenario.cloud), directory, stack)
        return cls(plan, edge, cloud)

    @property
    def alive(self) -> bool:
        """Whether both processes still run."""
        return self.edge.alive and self.cloud.alive

    def load(self) -> dict[str, Any]:
        """Load the model on one side, then the other: two loads at once would only fight over memory and cores.

        Returns what each says of its model, by side.
        """
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

    def prepare(self) -> list[Batch]:
        """Make every task's examples, and both sides know its prefix."""
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
            self.cloud.call(
                "learn_prefix",
                _LOAD_TIMEOUT_S,
                text=made["prefix_text"],
                reach=made["reach"],
                closing=made["closing"],
            )
            batches.append(Batch(made["batch"], task, context_tokens, made["examples"]))
            self._longest = max(self._longest, made["longest"])
        return batches

    def serve(self, address: str, kv_bytes_per_token: int) -> None:
        """The cloud listens, on `address` as the edge sees it, for payloads of at most what the longest context can make."""
        congestion = self.scenario.congestion or self.plan.swept.congestion
        bound = 2 * self._longest * kv_bytes_per_token + _PAYLOAD_SLACK
        self._link = {
            "address": address,
            "port": self.cloud.call("serve", _SHORT_S, max_payload=bound, congestion=congestion),
            "congestion": congestion,
            "timeout": self.scenario.timeout,
            "reuse": self.scenario.connection == "reuse",
        }

    def reference(self, batch: Batch, number: int) -> dict[str, Any]:
        """The example's answer with the full cache on the edge alone, which the cloud keeps to compare with.

        The cloud forgets the example before.
        """
        self.cloud.call("forget")
        reference: dict[str, Any] = self.edge.call("reference", batch=batch.index, example=number)
        self.cloud.call(
            "compare",
            _SHORT_S,
            distributions=reference.pop("distributions"),
            vocabulary=reference["vocabulary"],
        )
        return reference

    def local(self, trial: Trial) -> dict[str, Any]:
        """A trial that crosses no link."""
        result: dict[str, Any] = self.edge.call("edge", **self._common(trial))
        return result

    def request(self, trial: Trial) -> dict[str, Any]:
        """A trial across the link, as it is now."""
        extra: dict[str, Any] = {"codec": trial.cell.codec} if trial.cell.placement == "split" else {}
        link = {**self._link, "name": trial.cell.profile.text()}
        result: dict[str, Any] = self.edge.call(
            trial.cell.placement, link=link, **extra, **self._common(trial)
        )
        return result

    def outcome(self, request: int, gold: str) -> dict[str, Any]:
        """What the cloud's cache of a request says of the gold answer, measured outside the request's time."""
        found: dict[str, Any] = self.cloud.call("outcome", id=request, gold=gold)
        return found

    def _common(self, trial: Trial) -> dict[str, Any]:
        return {
            "batch": trial.batch,
            "example": trial.number,
            "repeat": trial.repeat,
            "reuse": self.scenario.reuse,
        }
