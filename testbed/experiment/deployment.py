"""Both endpoints, as a run drives them: loaded, told the tasks, asked for one trial after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from msgspec import structs

from testbed.delivery.adaptive import Adaptive
from testbed.endpoints import protocol
from testbed.endpoints.endpoint import CALL_S, Endpoint
from testbed.endpoints.protocol import Computed, FullCache, Link, Loaded, Message, Outcome, TrialResult
from testbed.errors import EndpointError, UsageError
from testbed.experiment.scenario import Cell, Plan
from testbed.experiment.sending import model_there, there
from testbed.experiment.trial import Trial
from testbed.hosts.host import Host
from testbed.net.profile.future import future
from testbed.transport.secret import secrets

#: What calls may take: loading, or preparing, of large models; what computes for one example or trial, its request's timeout
#: aside; what only hands something over. An endpoint that has died, or been stopped, is noticed at once.
_LOAD_S = 900.0
_SHORT_S = 60.0
#: Between a connection's end, as a peer sees it, and that of the process whose it was.
_ENDING_S = 0.2
#: Between two looks at the network while an answer is awaited.
_NETWORK_S = 1.0
#: What one request may make the cloud allocate: the largest context's cache in 16 bits, twice, and room for headers.
_PAYLOAD_SLACK = 1 << 20

T = TypeVar("T")


@dataclass
class Batch:
    """A task's examples at one context length, as the edge made them."""

    index: int  #: the edge's number for it
    task: int
    context_tokens: int | None
    examples: tuple[protocol.PreparedExample, ...]


class Pair:
    """The edge and the cloud of one run. Every method raises EndpointError where an endpoint fails, has ended or gives an
    answer that cannot be, and NetworkError where a process that the link needs has ended.

    check: raises that NetworkError; hosts: on which of them each side runs, where files of ours may have to be sent.
    """

    def __init__(
        self,
        plan: Plan,
        edge: Endpoint,
        cloud: Endpoint,
        check: Callable[[], None] = lambda: None,
        hosts: Mapping[str, Host] | None = None,
    ) -> None:
        self.plan, self.scenario, self.edge, self.cloud = plan, plan.scenario, edge, cloud
        self._check_network, self._hosts = check, hosts or {}
        self._links: dict[str, Link] = {}  #: by transport
        self._longest = 0
        self.bound = 0  #: bytes that a request's payload may have
        self._rehearsed: set[tuple[Any, ...]] = set()  #: trials of the example at hand

    @property
    def alive(self) -> bool:
        """Whether both processes still run."""
        return self.edge.alive and self.cloud.alive

    def load(self) -> dict[str, Loaded]:
        """Load the model on one side, then the other: two loads at once would only fight over memory and cores.

        Returns what each says of its model, by side. Raises UsageError where they have models of two tokenizers, or one is not on
        a host and too large to be sent.
        """
        loaded = {}
        for side, endpoint in (("edge", self.edge), ("cloud", self.cloud)):
            name = getattr(self.scenario.models, side)
            message = protocol.Load(
                model_there(self._hosts[side], name) if side in self._hosts else name,
                device=getattr(self.scenario.device, side),
                dtype=getattr(self.scenario.dtype, side),
                threads=self.scenario.threads,
                speed=getattr(self.scenario.compute, side),
                times=self.plan.devices[side].times if side in self.plan.devices else None,
            )
            try:
                loaded[side] = self._call(endpoint, message, _LOAD_S)
            except UsageError as error:
                if self.plan.topology.kind == "namespaces":
                    raise
                raise UsageError(f"{side}: {error}") from error  # what a machine lacks is that one's
        if loaded["edge"].tokenizer != loaded["cloud"].tokenizer:
            models = self.scenario.models
            raise UsageError(
                f"models {models.edge} (edge) and {models.cloud} (cloud) have different tokenizers: what the one counts and "
                "numbers as tokens is none of the other's; name two models of one family"
            )
        return loaded

    def compute(self, side: str) -> Computed:
        """How long a fixed piece of compute takes one side (`edge`, `cloud`)."""
        return self._call(self.edge if side == "edge" else self.cloud, protocol.Compute(), CALL_S)

    def prepare(self) -> list[Batch]:
        """Make every task's examples, and both sides know its prefix."""
        batches = []
        for task, context_tokens in self.plan.batches():
            settings = self.scenario.task(task)
            if "edge" in self._hosts and (path := settings.get("path")):
                settings = {**settings, "path": there(self._hosts["edge"], str(path))}
            message = protocol.Prepare(
                settings["task"],
                parameters={k: v for k, v in settings.items() if k != "task"},
                count=self.scenario.examples_of(task),
                context_tokens=context_tokens,
                seed=self.scenario.seed,
                codecs=tuple(map(str, self.plan.codecs)),
                max_new_tokens=self.scenario.max_new_tokens,
                prompt=str(self.plan.prompt),
            )
            made = self._call(self.edge, message, _LOAD_S)
            self._call(self.cloud, made.prefix, _LOAD_S)
            batches.append(Batch(made.batch, task, context_tokens, made.examples))
            self._longest = max(self._longest, made.longest)
        return batches

    def serve(self, address: str, kv_bytes_per_token: int, apart: bool = False, closed: bool = False) -> None:
        """The cloud listens by each transport, on `address` alone, for payloads of at most what the longest context
        can make. apart: its clock is another than the edge's; closed: it serves this run's edge alone."""
        congestion, timeout = self.plan.swept.congestion, self.scenario.timeout
        self.bound = bound = 2 * self._longest * kv_bytes_per_token + _PAYLOAD_SLACK
        serving, asking = secrets() if closed else (None, None)
        for transport in map(str, self.scenario.transport):
            message = protocol.Serve(
                bound, congestion, timeout, transport=transport, address=address, secret=serving
            )
            port = self._call(self.cloud, message, _SHORT_S)
            self._links[transport] = Link(
                address, port, "", transport, congestion, timeout=timeout, apart=apart, secret=asking
            )

    def reference(self, batch: Batch, number: int) -> FullCache:
        """The example's answer with the full cache of the model that rows name, on one side alone; the cloud keeps it to compare
        with. Where both sides have that model it is the edge's, whose prefill trials then take over; else the cloud's.

        The cloud forgets the example before.
        """
        self._call(self.cloud, protocol.Forget(), _SHORT_S)
        self._rehearsed.clear()
        if not self.scenario.one_model:
            asked = self._call(self.edge, protocol.Show(batch.index, number), _SHORT_S)
            return self._call(self.cloud, protocol.Read(asked), CALL_S)
        reference = self.alone(batch, number)
        if reference.vocabulary:
            self._call(self.cloud, protocol.Compare(reference.distributions, reference.vocabulary), _SHORT_S)
        return reference

    def alone(self, batch: Batch, number: int) -> FullCache:
        """The example's answer by the edge's model, with its full cache, on the edge alone."""
        return self._call(self.edge, protocol.Reference(batch.index, number), CALL_S)

    def trial(self, trial: Trial, origin: float = 0.0, lingers: bool = False) -> TrialResult:
        """A trial; across the link, where its placement crosses one, as it is now. origin: when its traces began, monotonic
        seconds. lingers: its connection is left open, for `hang_up`."""
        asked = self._asked(trial, origin)
        if lingers and asked.link is not None:
            asked = structs.replace(asked, link=structs.replace(asked.link, lingers=True))
        return self._call(self.edge, asked, CALL_S + self.scenario.timeout)

    def hang_up(self, result: TrialResult) -> TrialResult:
        """Close the connection of a trial that lingers; its result, with all that it cost."""
        cost = self._call(self.edge, protocol.HangUp(), _SHORT_S)
        return structs.replace(result, wire_bytes=cost.wire_bytes, retransmits=cost.retransmits)

    def stock(self, trial: Trial) -> None:
        """What a trial of `store` finds made; not where each trial is to make all of its own."""
        if trial.cell.placement == "store" and self.scenario.reuse == "all":
            self._call(self.edge, protocol.Stock(self._asked(trial, 0.0)), CALL_S)

    def rehearse(self, trial: Trial) -> None:
        """Have a trial's computing done before its clock runs, where devices are waited for that take less than this host: both
        sides remember it, and the trial waits. Nothing where that was done for this example.
        """
        cell = trial.cell
        key = (cell.placement, cell.codec_text, str(cell.delivery), str(cell.transport), trial.repeat)
        if key not in self._rehearsed:
            message = structs.replace(self._asked(trial), replay=False)
            self._call(self.edge, message, CALL_S + self.scenario.timeout)
            self._rehearsed.add(key)

    def together(self, request: int, most: int) -> protocol.Passes:
        """What decoding the cloud's latest request with others like it takes, up to so many at once."""
        return self._call(self.cloud, protocol.Together(request, most), CALL_S)

    def keep(self, trial: Trial, path: str) -> protocol.Ware:
        """What a trial that was made has sent, in a file of that path."""
        return self._call(self.edge, protocol.Keep(self._asked(trial), path), CALL_S)

    def _asked(self, trial: Trial, origin: float = 0.0) -> protocol.TrialRequest:
        cell = trial.cell
        link = self._links.get(str(cell.transport))
        return protocol.TrialRequest(
            cell.placement,
            trial.batch,
            trial.number,
            trial.repeat,
            reuse=self.scenario.reuse,
            replay=self.plan.replays(cell),
            codec=cell.codec_text,
            delivery=str(cell.delivery),
            link=structs.replace(link, name=cell.profile.text()) if link else None,
            rate=self._future(cell, origin),
        )

    def _future(self, cell: Cell, origin: float) -> tuple[tuple[float, float | None], ...]:
        """The rate to come of the swept link's way up, where the delivery's policy may know it."""
        if not (isinstance(cell.delivery, Adaptive) and cell.delivery.policy.foresees):
            return ()
        now = time.monotonic()
        steps = future(cell.profile, "up", now - origin, self.scenario.timeout)
        return tuple((now + at, None if rate == math.inf else rate) for at, rate in steps)

    def outcome(self, request: int, trial: Trial) -> Outcome:
        """What the cloud's cache of a trial's request says of the gold answer, measured outside the request's time."""
        selector = trial.cell.codec_text if trial.cell.placement == "scout" else ""
        return self._call(self.cloud, protocol.Examine(request, trial.gold, selector=selector), CALL_S)

    def _call(self, endpoint: Endpoint, message: Message[T], within_s: float) -> T:
        """What an endpoint answers; while it is waited for, the other one and the link's processes are looked after."""

        look_at = time.monotonic() + _NETWORK_S

        def besides() -> None:
            nonlocal look_at
            self.edge.check()
            self.cloud.check()
            if time.monotonic() >= look_at:  # a look may cost a host something that computes meanwhile
                self._check_network()
                look_at = time.monotonic() + _NETWORK_S

        try:
            answer = endpoint.call(message, within_s, besides)
        except EndpointError:
            for other in (self.edge, self.cloud):  # whose end is perhaps what the answer tells of
                other.check(within_s=_ENDING_S)
            raise
        self._check_network()  # an answer may come too soon for anybody to have looked
        return answer
