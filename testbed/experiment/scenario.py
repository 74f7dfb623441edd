"""A scenario: one YAML file that says what to run, and the plan that it unfolds into: what it names, and its cells.

`plan` reads the file and looks up what it names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    model_validator,
)

from testbed.codecs.spec import CodecSpec
from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.delivery import Delivery, Pipelined
from testbed.delivery.whole import Whole
from testbed.errors import SpecError
from testbed.experiment import readers
from testbed.experiment.allocation import Allocation
from testbed.experiment.edges import Edge, Edges, edges_from
from testbed.experiment.handovers import Entry as HandoverEntry
from testbed.experiment.handovers import Handover
from testbed.experiment.programs import Parameters, Programs, combinations
from testbed.experiment.readers import EXAMPLES, MOST_EXAMPLES
from testbed.experiment.row import SENDING
from testbed.experiment.sides import Compute, Models, Sides, known_devices, model_from, sides_from, written
from testbed.load.load import Load
from testbed.load.sequential import Sequential
from testbed.models.shapes import is_shape
from testbed.net import emulators
from testbed.net.profile.profile import Profile
from testbed.net.sharing.contract import Scheduler
from testbed.net.topology.topology import Link, Topology
from testbed.net.traffic.traffic import Flow
from testbed.serving.fifo import Fifo
from testbed.serving.serving import Serving
from testbed.speed.files import Device
from testbed.speed.words import Speed
from testbed.tasks.prompt import DEFAULT, PromptFormat, choose_prompt
from testbed.tasks.task import Task
from testbed.transport.tcp import Tcp
from testbed.transport.transport import Transport
from testbed.units import exact_time

Placement = Literal["split", "store", "cloud", "scout", "edge"]
#: Those that need no cache of the other side's model.
OF_TWO_MODELS = ("cloud", "scout", "edge")


#: Settings that programs of one's own do not have.
_OF_MODELS = (
    "model",
    "device",
    "dtype",
    "compute",
    "placements",
    "codecs",
    "delivery",
    "tasks",
    "edges",
    "load",
    "serving",
)


class Scenario(BaseModel):
    """The file, checked. Lists may be written as a single value."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    description: str = ""
    topology: str = "edge-cloud"
    edge: str = "edge"  #: node that holds the context
    cloud: str = "cloud"  #: node that answers
    #: the link whose profile is swept; None: the topology's only one, or its "bottleneck"
    link: str | None = None
    #: of the swept link; none: between hosts, its own
    profiles: Annotated[list[Any], BeforeValidator(readers.listed), Field(min_length=1)] = []
    model: Annotated[
        str | InstanceOf[Models], BeforeValidator(model_from), PlainSerializer(written, when_used="json")
    ] = "smollm2-135m"
    device: Annotated[Sides, BeforeValidator(sides_from), AfterValidator(known_devices)] = Sides()
    dtype: Annotated[Sides, BeforeValidator(sides_from)] = Sides()
    compute: Compute = Compute()  #: emulates slower machines: stretches their compute stages in real time
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    placements: Annotated[list[Placement], BeforeValidator(readers.listed), Field(min_length=1)] = ["split"]
    codecs: Annotated[
        list[
            Annotated[
                InstanceOf[CodecSpec], BeforeValidator(readers.codec), PlainSerializer(str, when_used="json")
            ]
        ],
        BeforeValidator(readers.listed),
        Field(min_length=1, default_factory=lambda: [parse_codec("fp16")]),
    ]
    #: how a cache crosses; a text crosses whole
    delivery: Annotated[
        list[
            Annotated[
                InstanceOf[Delivery],
                BeforeValidator(readers.delivery),
                PlainSerializer(str, when_used="json"),
            ]
        ],
        BeforeValidator(readers.listed),
        Field(min_length=1),
    ] = [Whole()]
    #: what moves it, and a text
    transport: Annotated[
        list[
            Annotated[
                InstanceOf[Transport],
                BeforeValidator(readers.transport),
                PlainSerializer(str, when_used="json"),
            ]
        ],
        BeforeValidator(readers.listed),
        Field(min_length=1),
    ] = [Tcp()]
    #: who asks, where that is not `edge` alone
    edges: Annotated[Edges | None, BeforeValidator(edges_from)] = None
    #: who asks when, for how long, and for how long before anything of that counts
    load: Annotated[
        list[
            Annotated[InstanceOf[Load], BeforeValidator(readers.load), PlainSerializer(str, when_used="json")]
        ],
        BeforeValidator(readers.listed),
        Field(min_length=1),
    ] = [Sequential()]
    duration: Annotated[
        float,
        BeforeValidator(readers.seconds),
        Field(gt=0, le=86400),
        PlainSerializer(exact_time, when_used="json"),
    ] = 60.0
    warmup: Annotated[
        float,
        BeforeValidator(readers.seconds),
        Field(ge=0, le=86400),
        PlainSerializer(exact_time, when_used="json"),
    ] = 0.0
    #: in which order the cloud answers who asks at the same time
    serving: Annotated[
        list[
            Annotated[
                InstanceOf[Serving], BeforeValidator(readers.serving), PlainSerializer(str, when_used="json")
            ]
        ],
        BeforeValidator(readers.listed),
        Field(min_length=1),
    ] = [Fifo()]
    #: how the cells of its links are shared out; none: as the topology says
    allocate: Annotated[list[Allocation], BeforeValidator(readers.listed)] = []
    handovers: Annotated[
        list[HandoverEntry], BeforeValidator(readers.listed)
    ] = []  #: of edges, while a load is on
    tasks: Annotated[
        list[Annotated[dict[str, Any], BeforeValidator(readers.task)]], BeforeValidator(readers.listed)
    ] = []
    #: in place of tasks: programs of one's own, and what of their commands is varied
    programs: Programs | None = None
    parameters: Parameters = {}
    prompt: Annotated[str, BeforeValidator(readers.prompt)] = (
        "auto"  #: how the task's texts are laid out for the model
    )
    context_tokens: Annotated[
        list[Annotated[int, Field(ge=8, le=1_000_000)] | None],
        BeforeValidator(readers.listed),
        Field(min_length=1),
    ] = [256]
    examples: Annotated[int, Field(ge=1, le=MOST_EXAMPLES)] = (
        10  #: of each task that has no number of its own
    )
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    #: when traces begin: with each trial; once, with the first; or with each trial, where its example's turn is
    at: Literal["trial", "run", "example"] = "trial"
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    #: None: what the task says its answers need
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    #: of every TCP in `transport`, in whose parameters they are kept
    connection: Annotated[Literal["per-request", "reuse"], Field(exclude=True)] = "per-request"
    congestion: Annotated[str | None, Field(exclude=True)] = None
    emulator: Annotated[str, AfterValidator(emulators.known)] = "auto"
    reuse: Literal["all", "prefill", "none"] = "all"
    placement_free: bool = False  #: answers and bytes alone, in one process, without a network
    questions_per_context: Annotated[int, Field(ge=1, le=1_000_000)] = (
        1  #: that share what making a stored cache costs
    )
    timeout: Annotated[
        float,
        BeforeValidator(readers.seconds),
        Field(gt=0, le=86400),
        PlainSerializer(exact_time, when_used="json"),
    ] = 120.0
    links: dict[str, Any] = {}  #: profiles of links that are not swept
    traffic: Annotated[
        list[Annotated[dict[str, Any], BeforeValidator(readers.flow)]], BeforeValidator(readers.listed)
    ] = []

    @property
    def models(self) -> Models:
        """Each side's."""
        return self.model if isinstance(self.model, Models) else Models(self.model, self.model)

    @property
    def one_model(self) -> bool:
        """Whether both sides have the same."""
        return isinstance(self.model, str)

    @model_validator(mode="after")
    def _folded(self) -> Scenario:
        """Say of each TCP what `connection` and `congestion` say of all that do not say it themselves."""
        given = {"connection": self.connection == "reuse", "congestion": bool(self.congestion)}
        kinds = [_fold(kind, self.connection, self.congestion) for kind in self.transport]
        if any(given.values()) and not any(isinstance(kind, Tcp) for kind in kinds):
            words = " and ".join(word for word, said in given.items() if said)
            raise SpecError(f"{words}: of TCP, and the transport is {', '.join(map(str, kinds))}")
        self.transport, self.connection, self.congestion = kinds, "per-request", None
        return self

    @model_validator(mode="after")
    def _asks_something(self) -> Scenario:
        if self.programs is None and not self.tasks:
            raise SpecError("tasks is missing")
        if self.programs is None and self.parameters:
            raise SpecError("parameters: are of `programs`, and there are none")
        if self.programs is not None:
            others = [
                name
                for name, known in type(self).model_fields.items()
                if name in _OF_MODELS and getattr(self, name) != known.get_default(call_default_factory=True)
            ]
            if others:
                raise SpecError(f"{others[0]}: of language models, and a scenario of `programs` has none")
        return self

    def task(self, index: int) -> dict[str, Any]:
        """A task's name and parameters, however many of its examples are asked for."""
        return {key: value for key, value in self.tasks[index].items() if key != EXAMPLES}

    @property
    def loaded(self) -> bool:
        """Whether requests may meet each other."""
        return any(load.timed for load in self.load)

    def examples_of(self, index: int) -> int:
        """How many examples of a task are asked for."""
        return int(self.tasks[index].get(EXAMPLES, self.examples))


def _fold(kind: Transport, connection: str, congestion: str | None) -> Transport:
    if not isinstance(kind, Tcp):
        return kind
    kept: Literal["fresh", "reuse"] = "reuse" if connection == "reuse" else kind.connection
    return replace(kind, connection=kept, congestion=kind.congestion or congestion or "")


@dataclass(frozen=True)
class Cell:
    """One point of the sweep."""

    task: int  #: index into the scenario's tasks
    context_tokens: int | None
    placement: Placement
    codec: CodecSpec | None  #: None: nothing is chosen or encoded
    delivery: Delivery
    transport: Transport  #: of `edge`, which uses none, the scenario's first
    profile: Profile
    load: Load = field(default_factory=Sequential)
    serving: Serving = field(default_factory=Fifo)
    allocate: Scheduler | None = None  #: None: as the topology says

    @property
    def codec_text(self) -> str:
        """As rows name it: of `scout` its selector alone; empty where nothing is chosen or encoded."""
        if self.codec is None:
            return ""
        return self.codec.choice if self.placement == "scout" else str(self.codec)

    def identity(self, plan: Plan) -> str:
        """A hash of the settings: the same settings give the same cell in every run."""
        scenario = plan.scenario
        settings: dict[str, Any] = {
            "model": written(scenario.model),
            "dtype": [scenario.dtype.edge, scenario.dtype.cloud],
            "device": [scenario.device.edge, scenario.device.cloud],
            "task": scenario.task(self.task),
            "context_tokens": self.context_tokens,
            "max_new_tokens": scenario.max_new_tokens,
            "seed": scenario.seed,
            "placement": self.placement,
            "codec": self.codec_text,
            "profile": self.profile.text(),
            "topology": plan.topology.name,
            "link": plan.link,
            **_of_transport(self.transport),
        }
        if self.profile.changes:
            settings["at"] = scenario.at
        # Only where it is asked for, so that cells of runs from before these settings keep theirs.
        if scenario.compute != Compute():
            settings["compute"] = [plan.computes(side) for side in ("edge", "cloud")]
        if scenario.traffic:
            settings["traffic"] = scenario.traffic
        if plan.topology.cells:
            settings["cells"] = {cell.name: cell.scheduler for cell in plan.topology.cells}
        if self.delivery != Whole():
            settings["delivery"] = str(self.delivery)
        if self.load.timed:
            settings |= plan.load_settings(self)
        if self.allocate is not None:
            settings["allocate"] = str(self.allocate)
        if plan.prompt != DEFAULT:
            settings["prompt"] = str(plan.prompt)
        text = json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _of_transport(transport: Transport) -> dict[str, str | None]:
    """A transport's part of a cell's identity; TCP's is as it was when there was no other."""
    if not isinstance(transport, Tcp):
        return {"transport": str(transport), "congestion": None}
    kept = "+reuse" if transport.connection == "reuse" else ""
    return {"transport": f"tcp{kept}", "congestion": transport.congestion or None}


@dataclass(frozen=True)
class Plan:
    """A scenario with everything it names looked up, and its cells. `asked`: codecs that referred to a file, such as
    ``mixed(protect=auto)``, by what that file said: the codec as the scenario has it now. `devices`: whose times
    are waited for, by side.
    """

    scenario: Scenario
    topology: Topology
    link: str
    profiles: tuple[Profile, ...]
    tasks: tuple[Task, ...]
    asked: dict[str, str] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()  #: who asks, under a load
    own_links: bool = False  #: the swept link is each edge's own
    handovers: tuple[Handover, ...] = ()  #: under a load
    left_out: tuple[str, ...] = ()  #: sentences on what placement-free leaves out of what was asked

    def load_settings(self, cell: Cell) -> dict[str, Any]:
        """A load's part of a cell's identity."""
        edges = [edge.said for edge in self.edges]
        times = [self.scenario.warmup, self.scenario.duration]
        settings = {"load": cell.load.identity, "serving": str(cell.serving), "edges": edges, "lasts": times}
        over = [list(astuple(each)) for each in self.handovers]
        return settings | ({"handovers": over} if over else {})

    def at_edge(self, cell: Cell, edge: Edge) -> Cell:
        """The cell as that edge has it."""
        profile = edge.profile or cell.profile
        if cell.placement not in SENDING:
            return replace(cell, profile=profile)
        delivery, codec = edge.delivery or cell.delivery, edge.codec or cell.codec
        named = delivery.codec_of(codec) if codec else None
        return replace(cell, codec=named, profile=profile, delivery=delivery)

    def of_edge(self, edge: Edge) -> Plan:
        """The plan as that edge's requests are computed."""
        own = {"model": edge.model, "compute": edge.compute}
        said = {key: value for key, value in own.items() if value is not None}
        devices = edge.devices if said else self.devices
        return replace(self, scenario=self.scenario.model_copy(update=said), devices=devices)

    def flows(self) -> list[Flow]:
        """The background traffic."""
        return [Flow.model_validate(value) for value in self.scenario.traffic]

    def computes(self, side: str) -> Any:
        """How a side computes, as a cell's identity has it: a device by its times, wherever its file lies."""
        speed: Speed = getattr(self.scenario.compute, side)
        device = self.devices.get(side)
        return (replace(speed, device=f"{device.name}/{device.digest}") if device else speed).written()

    @property
    def models(self) -> list[str]:
        """All of them: the sides', and what edges have of their own."""
        own = (edge.model for edge in self.edges if edge.model)
        return list(dict.fromkeys((*astuple(self.scenario.models), *own)))

    @property
    def swept(self) -> Link:
        """The link whose profile is swept."""
        return next(link for link in self.topology.links if link.name == self.link)

    def under(self, profile: Profile) -> Topology:
        """The topology with the swept link under `profile`."""
        links = tuple(replace(k, profile=profile) if k.name == self.link else k for k in self.topology.links)
        return replace(self.topology, links=links).with_profiles(self.conditions(profile))

    def conditions(self, profile: Profile) -> dict[str, Profile]:
        """The profiles of edges' links, by link, where the swept one is under `profile`."""
        own = {edge.link: edge.profile or (profile if self.own_links else None) for edge in self.edges}
        return {link: found for link, found in own.items() if found is not None}

    @property
    def prompt(self) -> PromptFormat:
        """How the tasks' texts are laid out for the model."""
        return choose_prompt(self.scenario.prompt, self.scenario.models.cloud)

    def replays(self, cell: Cell) -> bool:
        """Whether a trial waits, in real time, for what it takes over of an earlier one.

        It must where link or clock would otherwise be elsewhere than computing leaves them: a trace, background traffic, a kept
        connection (TCP forgets while it idles), a capture, a pipeline. What an emulated machine took longer is billed.
        """
        scenario = self.scenario
        if scenario.placement_free:
            return False
        others = [link.profile for link in self.topology.links if link.name != self.link]
        return (
            cell.profile.changes
            or any(profile.changes for profile in others)
            or (scenario.at == "run" and any(profile.changes for profile in self.profiles))
            or bool(scenario.traffic)
            or cell.transport.connection == "reuse"
            or isinstance(cell.delivery, Pipelined)
            or cell.placement == "scout"
            or any(link.pcap for link in self.topology.links)
        )

    def rehearses(self, cell: Cell) -> bool:
        """Whether a trial's computing is done before its clock runs, and then waited for: where a device stands for a real
        model's. What stays at the edge is computed for the reference.
        """
        return bool(self.devices) and not is_shape(self.scenario.models.cloud) and cell.placement != "edge"

    def batches(self) -> Iterator[tuple[int, int | None]]:
        """Each task at each context length."""
        yield from itertools.product(range(len(self.scenario.tasks)), self.scenario.context_tokens)

    def cells(self, task: int, context_tokens: int | None) -> list[Cell]:
        """The cells of one task and context length, in the order in which an example visits them: links innermost, and
        transports next, so that what they share is made once, and a slow drift of the machine touches all links alike."""
        cells = []
        allocations: list[Scheduler | None] = [*self.scenario.allocate] or [None]
        for placement in self.scenario.placements:
            transports = self.scenario.transport[:1] if placement == "edge" else self.scenario.transport
            for codec, delivery in self._payloads(placement):
                cells += [
                    Cell(task, context_tokens, placement, codec, delivery, transport, *met)
                    for transport in transports
                    for met in itertools.product(
                        self.profiles, self.scenario.load, self.scenario.serving, allocations
                    )
                ]
        return cells

    def _payloads(self, placement: Placement) -> Iterable[tuple[CodecSpec | None, Delivery]]:
        """What crosses in a placement, and how; of the codecs a `scout` takes those that are a choice of tokens."""
        if placement in SENDING:
            both = itertools.product(self.scenario.codecs, self.scenario.delivery)
            return dict.fromkeys((delivery.codec_of(codec), delivery) for codec, delivery in both)
        if placement == "scout":
            return [(codec, Whole()) for codec in self.scenario.codecs if codec.choice]
        return [(None, Whole())]

    @property
    def codecs(self) -> list[CodecSpec]:
        """All that a cache may cross as, those among deliveries' levels included."""
        deliveries = [*self.scenario.delivery, *(edge.delivery for edge in self.edges if edge.delivery)]
        levels = (codec for delivery in deliveries for codec in delivery.codecs)
        own = (edge.codec for edge in self.edges if edge.codec)
        return list(dict.fromkeys((*self.scenario.codecs, *levels, *own)))

    @property
    def trials(self) -> int:
        """How many trials the whole sweep has, if every task has as many examples as asked; of a load, how often it is put on."""
        if self.scenario.programs is not None:
            return (
                self.scenario.repeats * len(self.profiles) * len(list(combinations(self.scenario.parameters)))
            )
        loaded = self.scenario.loaded
        return self.scenario.repeats * sum(
            len(self.cells(*batch)) * (1 if loaded else self.scenario.examples_of(batch[0]))
            for batch in self.batches()
        )
