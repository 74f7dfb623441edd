"""Both endpoints, as a run drives them: loaded, told the tasks, asked for one trial after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from testbed.endpoints.answers import Computed, Loaded, Made, Outcome, Port, Reference, Served, checked
from testbed.endpoints.endpoint import CALL_S, Endpoint
from testbed.errors import EndpointError
from testbed.experiment.scenario import Plan
from testbed.experiment.trial import Trial

#: What calls may take: loading, or preparing, of large models; what computes for one example or trial, its request's timeout
#: aside; what only hands something over. An endpoint that has died, or been stopped, is noticed at once.
_LOAD_S = 900.0
_SHORT_S = 60.0
#: Between a connection's end, as a peer sees it, and that of the process whose it was.
_ENDING_S = 0.2
#: What one request may make the cloud allocate: the largest context's cache in 16 bits, twice, and room for headers.
_PAYLOAD_SLACK = 1 << 20


@dataclass
class Batch:
    """A task's examples at one context length, as the edge made them."""

    index: int  #: the edge's number for it
    task: int
    context_tokens: int | None
    examples: list[dict[str, Any]]


class Pair:
    """The edge and the cloud of one run. Every method raises EndpointError where an endpoint fails, has ended or gives an
    answer that cannot be, and NetworkError where a process that the link needs has ended.

    check: raises that NetworkError.
    """

    def __init__(
        self, plan: Plan, edge: Endpoint, cloud: Endpoint, check: Callable[[], None] = lambda: None
    ) -> None:
        self.plan, self.scenario, self.edge, self.cloud = plan, plan.scenario, edge, cloud
        self._check_network = check
        self._link: dict[str, Any] = {}
        self._longest = 0

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
            loaded[side] = self._call(
                endpoint,
                Loaded,
                "load",
                _LOAD_S,
                model=self.scenario.model,
                device=getattr(self.scenario.device, side),
                dtype=getattr(self.scenario.dtype, side),
                threads=self.scenario.threads,
                slowdown=getattr(self.scenario.compute, side),
            )
        return loaded

    def compute(self, side: str) -> dict[str, Any]:
        """How long a fixed piece of compute takes one side (`edge`, `cloud`): ``tokens``, ``seconds``, ``share``."""
        endpoint = self.edge if side == "edge" else self.cloud
        found: dict[str, Any] = self._call(endpoint, Computed, "compute", CALL_S)
        return found

    def prepare(self) -> list[Batch]:
        """Make every task's examples, and both sides know its prefix."""
        batches = []
        for task, context_tokens in self.plan.batches():
            settings = self.scenario.tasks[task]
            made = self._call(
                self.edge,
                Made,
                "prepare",
                _LOAD_S,
                task=settings["task"],
                parameters={k: v for k, v in settings.items() if k != "task"},
                count=self.scenario.examples,
                context_tokens=context_tokens,
                seed=self.scenario.seed,
                codecs=self.scenario.codecs,
                max_new_tokens=self.scenario.max_new_tokens,
                prompt=str(self.plan.prompt),
            )
            learned = {"text": made["prefix_text"], "reach": made["reach"], "closing": made["closing"]}
            self._call(self.cloud, str, "learn_prefix", _LOAD_S, **learned)
            batches.append(Batch(made["batch"], task, context_tokens, made["examples"]))
            self._longest = max(self._longest, made["longest"])
        return batches

    def serve(self, address: str, kv_bytes_per_token: int) -> None:
        """The cloud listens, on `address` as the edge sees it, for payloads of at most what the longest context can make."""
        congestion = self.scenario.congestion or self.plan.swept.congestion
        bound = 2 * self._longest * kv_bytes_per_token + _PAYLOAD_SLACK
        timeout = self.scenario.timeout
        transport, _, kept = self.scenario.transport.partition("+")
        settings = {"max_payload": bound, "congestion": congestion, "request_s": timeout}
        settings["transport"] = transport
        self._link = {
            "transport": transport,
            "address": address,
            "port": self._call(self.cloud, Port, "serve", _SHORT_S, **settings),
            "congestion": congestion,
            "timeout": timeout,
            "reuse": kept == "reuse",
        }

    def reference(self, batch: Batch, number: int) -> dict[str, Any]:
        """The example's answer with the full cache on the edge alone, which the cloud keeps to compare with.

        The cloud forgets the example before.
        """
        self._call(self.cloud, None, "forget", _SHORT_S)
        reference = self._call(self.edge, Reference, "reference", CALL_S, batch=batch.index, example=number)
        self._call(
            self.cloud,
            None,
            "compare",
            _SHORT_S,
            distributions=reference.pop("distributions"),
            vocabulary=reference["vocabulary"],
        )
        return reference

    def local(self, trial: Trial) -> dict[str, Any]:
        """A trial that crosses no link."""
        return self._call(self.edge, Served, "edge", CALL_S, **self._common(trial))

    def request(self, trial: Trial) -> dict[str, Any]:
        """A trial across the link, as it is now."""
        extra: dict[str, Any] = {"codec": trial.cell.codec} if trial.cell.placement == "split" else {}
        link = {**self._link, "name": trial.cell.profile.text()}
        within_s = CALL_S + self.scenario.timeout
        return self._call(
            self.edge, Served, trial.cell.placement, within_s, link=link, **extra, **self._common(trial)
        )

    def outcome(self, request: int, gold: str) -> dict[str, Any]:
        """What the cloud's cache of a request says of the gold answer, measured outside the request's time."""
        return self._call(self.cloud, Outcome, "outcome", CALL_S, id=request, gold=gold)

    def _call(self, endpoint: Endpoint, kind: Any, name: str, within_s: float, **arguments: Any) -> Any:
        """What an endpoint answers, looked at; while it is waited for, so are the other one and the link's processes."""

        def besides() -> None:
            self.edge.check()
            self.cloud.check()
            self._check_network()

        try:
            answer = endpoint.call(name, within_s, besides, **arguments)
        except EndpointError:
            for other in (self.edge, self.cloud):  # whose end is perhaps what the answer tells of
                other.check(within_s=_ENDING_S)
            raise
        return checked(kind, answer, f"the {endpoint.role}, asked to `{name}`,")

    def _common(self, trial: Trial) -> dict[str, Any]:
        return {
            "batch": trial.batch,
            "example": trial.number,
            "repeat": trial.repeat,
            "reuse": self.scenario.reuse,
            "replay": self.plan.replays(trial.cell),
        }
