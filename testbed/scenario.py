"""A scenario: one YAML file that says what to run. Read, checked with the place of every mistake, and unfolded into cells.

This module knows no torch and asks nothing of the kernel: `testbed plan` runs it as anybody.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from testbed.codecs.spec import parse as parse_codec
from testbed.errors import SpecError, UsageError
from testbed.models.sources import find as find_model
from testbed.net import strict_yaml
from testbed.net.profile import Profile, parse_profile, profile_from
from testbed.net.topology import Topology, load_topology
from testbed.net.traffic import Flow, flow_from
from testbed.tasks.prompt import DEFAULT, PromptFormat, choose_prompt, parse_prompt
from testbed.tasks.task import Task, make_task
from testbed.units import parse_time

Placement = Literal["split", "cloud", "edge"]
_MAX_TRIALS = 10_000_000


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _codec(value: Any) -> str:
    return str(parse_codec(str(value)))


def _seconds(value: Any) -> float:
    return parse_time(value)


def _task(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"task": value}
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        raise ValueError("write a task's name, or a mapping with `task: NAME` and its parameters")
    return value


def _flow(value: Any) -> dict[str, Any]:
    flow_from(value)  # kept as it was written, for the manifest
    return dict(value)


def _prompt(value: Any) -> str:
    return str(parse_prompt(str(value)) or "auto")


def _parameters(task: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in task.items() if key != "task"}


class Sides(BaseModel):
    """A setting for each endpoint."""

    model_config = ConfigDict(extra="forbid")
    edge: str = "auto"
    cloud: str = "auto"


def _sides(value: Any) -> Any:
    return {"edge": value, "cloud": value} if isinstance(value, str) else value


class Compute(BaseModel):
    """How many times slower than this host each endpoint computes."""

    model_config = ConfigDict(extra="forbid")
    edge: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 1.0
    cloud: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 1.0


class Scenario(BaseModel):
    """The file, checked. Lists may be written as a single value."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    description: str = ""
    topology: str = "edge-cloud"
    edge: str = "edge"  #: node that holds the context
    cloud: str = "cloud"  #: node that answers
    link: str | None = (
        None  #: the link whose profile is swept; None: the topology's only one, or its "bottleneck"
    )
    profiles: Annotated[list[Any], BeforeValidator(_listed), Field(min_length=1)]
    model: str = "smollm2-135m"
    device: Annotated[Sides, BeforeValidator(_sides)] = Sides()
    dtype: Annotated[Sides, BeforeValidator(_sides)] = Sides()
    compute: Compute = Compute()  #: emulates slower machines: stretches their compute stages in real time
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    placements: Annotated[list[Placement], BeforeValidator(_listed), Field(min_length=1)] = ["split"]
    codecs: Annotated[
        list[Annotated[str, BeforeValidator(_codec)]], BeforeValidator(_listed), Field(min_length=1)
    ] = ["fp16"]
    tasks: Annotated[
        list[Annotated[dict[str, Any], BeforeValidator(_task)]], BeforeValidator(_listed), Field(min_length=1)
    ]
    prompt: Annotated[str, BeforeValidator(_prompt)] = (
        "auto"  #: how the task's texts are laid out for the model
    )
    context_tokens: Annotated[
        list[Annotated[int, Field(ge=8, le=1_000_000)] | None], BeforeValidator(_listed), Field(min_length=1)
    ] = [256]
    examples: Annotated[int, Field(ge=1, le=100_000)] = 10
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    at: Literal["trial", "run"] = "trial"  #: when traces begin: with each trial, or once with the first
    seed: int = 0
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = (
        None  #: None: what the task says its answers need
    )
    connection: Literal["per-request", "reuse"] = "per-request"
    congestion: str | None = None  #: None: the link's, or else the namespace's default
    emulator: Literal["auto", "netem", "userspace"] = "auto"
    reuse: Literal["all", "prefill", "none"] = "all"
    timeout: Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=86400)] = 120.0
    links: dict[str, Any] = {}  #: profiles of links that are not swept
    traffic: Annotated[list[Annotated[dict[str, Any], BeforeValidator(_flow)]], BeforeValidator(_listed)] = []

    @property
    def transport(self) -> str:
        """As rows name it."""
        return "tcp+reuse" if self.connection == "reuse" else "tcp"


@dataclass(frozen=True)
class Cell:
    """One point of the sweep."""

    task: int  #: index into the scenario's tasks
    context_tokens: int | None
    placement: str
    codec: str
    profile: Profile

    def identity(self, plan: Plan) -> str:
        """A hash of the settings: the same settings give the same cell in every run."""
        scenario = plan.scenario
        settings: dict[str, Any] = {
            "model": scenario.model,
            "dtype": [scenario.dtype.edge, scenario.dtype.cloud],
            "device": [scenario.device.edge, scenario.device.cloud],
            "task": scenario.tasks[self.task],
            "context_tokens": self.context_tokens,
            "max_new_tokens": scenario.max_new_tokens,
            "seed": scenario.seed,
            "placement": self.placement,
            "codec": self.codec,
            "profile": self.profile.text(),
            "topology": plan.topology.name,
            "link": plan.link,
            "transport": scenario.transport,
            "congestion": scenario.congestion,
        }
        if self.profile.changes:
            settings["at"] = scenario.at
        # Only where it is asked for, so that cells of runs from before these settings keep theirs.
        if scenario.compute != Compute():
            settings["compute"] = [scenario.compute.edge, scenario.compute.cloud]
        if scenario.traffic:
            settings["traffic"] = scenario.traffic
        if plan.prompt != DEFAULT:
            settings["prompt"] = str(plan.prompt)
        text = json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A scenario with everything it names looked up, and its cells."""

    scenario: Scenario
    topology: Topology
    link: str
    profiles: tuple[Profile, ...]
    tasks: tuple[Task, ...]

    def flows(self) -> list[Flow]:
        """The background traffic."""
        return [flow_from(value) for value in self.scenario.traffic]

    @property
    def prompt(self) -> PromptFormat:
        """How the tasks' texts are laid out for the model."""
        return choose_prompt(self.scenario.prompt, self.scenario.model)

    def batches(self) -> Iterator[tuple[int, int | None]]:
        """Each task at each context length."""
        yield from itertools.product(range(len(self.scenario.tasks)), self.scenario.context_tokens)

    def cells(self, task: int, context_tokens: int | None) -> list[Cell]:
        """The cells of one task and context length, in the order in which an example visits them: links innermost,
        so that what two links share is made once, and a slow drift of the machine touches all links alike."""
        cells = []
        for placement in self.scenario.placements:
            for codec in self.scenario.codecs if placement == "split" else [""]:
                cells += [Cell(task, context_tokens, placement, codec, profile) for profile in self.profiles]
        return cells

    @property
    def trials(self) -> int:
        """How many trials the whole sweep has, if every task has as many examples as asked."""
        per_example = sum(len(self.cells(*batch)) for batch in self.batches())
        return per_example * self.scenario.examples * self.scenario.repeats


def scenario_path(name: str) -> Path:
    """The file of a scenario given by path, or by the name of one that is shipped. Raises UsageError."""
    shipped = Path(__file__).parents[1] / "scenarios"
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(p.stem for p in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped ones: {', '.join(known) or 'none'}"
    raise UsageError(f"no scenario file {name}; {hint}")


def override(settings: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``--set KEY=VALUE`` (KEY may be dotted, VALUE is YAML). Raises SpecError."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {assignment!r}: write KEY=VALUE")
        value = strict_yaml.parse(text, f"--set {key}")
        target = settings
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SpecError(f"--set {assignment!r}: {parent!r} is not a mapping")
        target[last] = value


def load_plan(
    name: str,
    *,
    assignments: Sequence[str] | None = None,
    codecs: Sequence[str] | None = None,
    links: Sequence[str] | None = None,
    examples: int | None = None,
    emulator: str | None = None,
) -> Plan:
    """Read a scenario file, apply what the command line changes, and look everything up. Raises UsageError, naming the place."""
    path = scenario_path(name)
    settings = strict_yaml.read(path)
    if not isinstance(settings, dict):
        raise SpecError(f"{path}: must hold a mapping of settings")
    settings.setdefault("name", path.stem)
    override(settings, assignments or [])
    for key, value in (("codecs", codecs or None), ("examples", examples), ("emulator", emulator)):
        if value is not None:
            settings[key] = list(value) if isinstance(value, tuple) else value
    return make_plan(settings, str(path), _link_options(links or []))


def _link_options(options: Sequence[str]) -> dict[str, str]:
    given = {}
    for option in options:
        link, equals, profile = option.partition("=")
        if not equals:
            raise SpecError(f"--link {option!r}: write NAME=PROFILE, such as access=5g-mid")
        given[link] = profile
    return given


def make_plan(settings: dict[str, Any], place: str, links: dict[str, str] | None = None) -> Plan:
    """Check settings and look up what they name. `place` names their source in messages; `links`: NAME -> PROFILE from the
    command line, which replace what the file says of those links."""
    scenario = _check(settings, place)
    topology = _at(f"{place}: topology", lambda: load_topology(scenario.topology))
    nodes = {node.name for node in topology.nodes}
    for role, node in (("edge", scenario.edge), ("cloud", scenario.cloud)):
        if node not in nodes:
            raise SpecError(
                f"{place}: {role}: topology {topology.name} has no node {node!r}; it has {', '.join(sorted(nodes))}"
            )
    for number, value in enumerate(scenario.traffic):
        for key in ("from", "to"):
            if value[key] not in nodes:
                raise SpecError(
                    f"{place}: traffic[{number}].{key}: topology {topology.name} has no node {value[key]!r}; "
                    f"it has {', '.join(sorted(nodes))}"
                )
    if scenario.edge == scenario.cloud:
        raise SpecError(f"{place}: edge and cloud are the same node {scenario.edge!r}")
    link = _swept_link(scenario, topology, place)
    names = {item.name for item in topology.links}
    for given in [*(links or {}), *scenario.links]:
        if given not in names:
            raise SpecError(
                f"{place}: links: topology {topology.name} has no link {given!r}; it has {', '.join(sorted(names))}"
            )
    profiles = tuple(
        _at(f"{place}: profiles[{i}]", lambda i=i, text=text: profile_from(text, f"{place}: profiles[{i}]"))
        for i, text in enumerate(scenario.profiles)
    )
    if link in (links or {}):
        profiles = (_at(f"--link {link}", lambda: parse_profile((links or {})[link])),)
        scenario = scenario.model_copy(update={"profiles": [(links or {})[link]]})
    others = {**scenario.links, **{k: v for k, v in (links or {}).items() if k != link}}
    fixed = {
        k: _at(f"{place}: links.{k}", lambda k=k, v=v: profile_from(v, f"{place}: links.{k}"))
        for k, v in others.items()
    }
    for number, profile in enumerate(profiles):
        # A trace's file is read here, so that what is wrong with it is known before anything is built.
        _at(f"{place}: profiles[{number}]", profile.schedules)
    topology = replace(
        topology,
        links=tuple(
            replace(
                item,
                profile=fixed.get(item.name, item.profile),
                congestion=scenario.congestion or item.congestion,
            )
            for item in topology.links
        ),
    )
    tasks = tuple(
        _at(f"{place}: tasks[{i}]", lambda s=settings: make_task(s["task"], **_parameters(s)))
        for i, settings in enumerate(scenario.tasks)
    )
    # The manifest keeps these settings, so that --resume runs what the command line asked for.
    scenario = scenario.model_copy(update={"links": others})
    plan = Plan(scenario, topology, link, profiles, tasks)
    duplicates = [text for text in scenario.codecs if scenario.codecs.count(text) > 1]
    if duplicates:
        raise SpecError(f"{place}: codecs: {duplicates[0]!r} is listed twice")
    for text in scenario.codecs:
        if (spec := parse_codec(text)).refers:
            _at(f"{place}: codecs", lambda s=spec: s.bound(find_model(scenario.model).name))
    if len({p.text() for p in profiles}) < len(profiles):
        raise SpecError(f"{place}: profiles: the same conditions are listed twice")
    if plan.trials > _MAX_TRIALS:
        raise SpecError(f"{place}: {plan.trials} trials; at most {_MAX_TRIALS} make a run")
    return plan


def _check(settings: dict[str, Any], place: str) -> Scenario:
    try:
        return Scenario.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(
            "."
        )
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), list(Scenario.model_fields), 1)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; known keys: {', '.join(Scenario.model_fields)}"
            )
            raise SpecError(f"{place}: {where}: unknown key{hint}") from error
        if first["type"] == "missing":
            raise SpecError(f"{place}: {where}: this key is required") from error
        cause = (first.get("ctx") or {}).get("error")
        message = str(cause) if cause else first["msg"]
        value = "" if cause else f" (got {str(first.get('input'))[:60]!r})"
        raise SpecError(f"{place}: {where}: {message}{value}") from error


def _swept_link(scenario: Scenario, topology: Topology, place: str) -> str:
    names = [link.name for link in topology.links]
    if scenario.link is None:
        if len(names) == 1:
            return names[0]
        if "bottleneck" in names:
            return "bottleneck"
        raise SpecError(
            f"{place}: link: topology {topology.name} has several links; name the one to sweep: {', '.join(names)}"
        )
    if scenario.link not in names:
        raise SpecError(
            f"{place}: link: topology {topology.name} has no link {scenario.link!r}; it has {', '.join(names)}"
        )
    return scenario.link


def _at(place: str, look_up: Any) -> Any:
    """`look_up()`, with the place put before what it complains of."""
    try:
        return look_up()
    except UsageError as error:
        text = str(error)
        raise SpecError(text if text.startswith(place) else f"{place}: {text}") from error
