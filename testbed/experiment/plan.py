"""From a scenario's file and the command line to a plan: every mistake is told with its place.

Nothing here knows torch or asks anything of the kernel: `testbed plan` runs it as anybody.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from testbed import kinds, lookup, strict_yaml
from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.delivery import Pipelined
from testbed.errors import SpecError, UsageError
from testbed.experiment import programs
from testbed.experiment.devices import look_up
from testbed.experiment.edges import Edge, Own
from testbed.experiment.loads import bound_load, edges_of, handovers_of
from testbed.experiment.on_hosts import on_hosts
from testbed.experiment.placement_free import NOWHERE, freed, off_link
from testbed.experiment.readers import EXAMPLES
from testbed.experiment.row import COLUMNS, SENDING
from testbed.experiment.scenario import OF_TWO_MODELS, Plan, Scenario
from testbed.experiment.sides import Models
from testbed.models.shapes import find_shape, is_shape
from testbed.models.sources import find as find_model
from testbed.models.sources import has_a_name
from testbed.net.profile.profile import Profile, parse_profile, profile_from
from testbed.net.topology.files import load_topology
from testbed.net.topology.topology import Topology
from testbed.tasks.task import Task, make_task
from testbed.transport.tcp import Tcp
from testbed.transport.transport import Transport
from testbed.transport.wire import MAX_PARTS
from testbed.units import format_rate

_MAX_TRIALS = 10_000_000
_IN_QUOTES = re.compile(r""""(?:[^"\\]|\\.)*"|'[^']*'""")


def scenario_path(name: str) -> Path:
    """The file of a scenario given by path, or by the name of one that is shipped. Raises UsageError."""
    shipped = Path(__file__).parents[1] / "scenarios"
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    if Path(name).exists():
        raise UsageError(f"{name}: not a regular file, so no scenario")
    known = sorted(
        str(p.relative_to(shipped).with_suffix(""))
        for p in shipped.rglob("*.yaml")
        if p.parent.name != "expected"
    )
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped ones: {', '.join(known) or 'none'}"
    raise UsageError(f"no scenario file {name}; {hint}")


def override(settings: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``--set KEY=VALUE`` (KEY may be dotted, VALUE is YAML). Raises SpecError."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {assignment!r}: write KEY=VALUE")
        quoted = _at(f"--set {key}", partial(_quoted, text))
        value = strict_yaml.parse(quoted, f"--set {key}")
        target = settings
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SpecError(f"--set {assignment!r}: {parent!r} is not a mapping")
        target[last] = value


def _quoted(text: str) -> str:
    """A list in brackets as YAML has to see it: what has commas or brackets in parentheses, such as
    ``q2c@0.25(pool=1, scope=global)`` or ``adaptive(levels=[int8, text])``, is one item. Raises SpecError where parentheses do
    not match."""
    plain = _IN_QUOTES.sub(
        lambda quoted: "_" * len(quoted[0]), text
    )  # whose commas and parentheses are YAML's affair
    if not (plain.startswith("[") and plain.endswith("]") and "(" in plain) or "{" in plain:
        return text
    items, at = [], 1
    for piece in kinds.split(plain[1:-1]):
        item = text[at : at + len(piece)]
        items.append(
            json.dumps(item.strip()) if "(" in piece and not piece.lstrip().startswith("[") else item
        )
        at += len(piece) + 1
    return f"[{','.join(items)}]"


def load_plan(
    name: str,
    *,
    assignments: Sequence[str] | None = None,
    codecs: Sequence[str] | None = None,
    links: dict[str, str] | None = None,
    examples: int | None = None,
    emulator: str | None = None,
    placement_free: bool = False,
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
    if placement_free:
        settings["placement_free"] = True
    if examples is not None and isinstance(settings.get("tasks"), list):  # of every task
        settings["tasks"] = [_without_number(task) for task in settings["tasks"]]
    with lookup.beside(path):
        return make_plan(settings, str(path), links)


def make_plan(settings: dict[str, Any], place: str, links: dict[str, str] | None = None) -> Plan:
    """Check settings and look up what they name. `place` names their source in messages; `links`: NAME -> PROFILE from the
    command line, which replace what the file says of those links."""
    given = links or {}
    scenario = strict_yaml.checked(Scenario, settings, place)
    if scenario.placement_free:
        if given:
            raise SpecError(
                f"--link {next(iter(given))}: placement-free has no links; leave one of the two away"
            )
        scenario, left_out = freed(scenario, place)
    scenario = _with_files(scenario)
    many = scenario.edges if isinstance(scenario.edges, int) else None
    topology = _at(f"{place}: topology", lambda: load_topology(scenario.topology, many))
    edges = edges_of(scenario, topology, place)
    _check_nodes(scenario, topology, place, edges)
    own_links = bool(edges) and scenario.link is None and "bottleneck" not in [k.name for k in topology.links]
    link = edges[0].link if own_links else _swept_link(scenario, topology, place)
    _check_links([*given, *scenario.links], topology, place)
    if topology.kind == "hosts":
        scenario = on_hosts(scenario, topology, link, place)
    elif not scenario.profiles and link not in given:
        raise SpecError(f"{place}: profiles is missing")
    if link in given:
        profiles: tuple[Profile, ...] = (_looked_up(f"--link {link}", lambda: parse_profile(given[link])),)
        scenario = scenario.model_copy(update={"profiles": [given[link]]})
    else:
        profiles = _profiles(scenario, place)
    others = {**scenario.links, **{k: v for k, v in given.items() if k != link}}
    # The manifest keeps these settings, so that --resume runs what the command line asked for.
    scenario = scenario.model_copy(update={"links": others})
    for model in filter(is_shape, dict.fromkeys((scenario.models.edge, scenario.models.cloud))):
        _at(f"{place}: model", partial(find_shape, model))
    scenario, asked = _bound(scenario, place)
    _check_placements(scenario, place)
    scenario, devices = look_up(scenario, place)
    _check_decoding(scenario, place)
    conditions = _under(topology, scenario, place)
    scenario, edges = bound_load(scenario, edges, devices, conditions, asked, place)
    handovers = handovers_of(scenario, edges, conditions, place)
    plan = Plan(
        scenario,
        conditions,
        link,
        profiles,
        _tasks(scenario, place),
        asked,
        devices,
        edges,
        own_links,
        handovers,
    )
    if scenario.placement_free:
        plan = replace(off_link(plan, NOWHERE), left_out=left_out)
    for profile in plan.profiles:
        _at(f"{place}: profiles", partial(plan.under, profile))
    _check_extent(plan, place)
    return plan


def _with_files(scenario: Scenario) -> Scenario:
    """The scenario with the files that it names where they are, and so they are found again when the run is resumed."""
    found: dict[str, Any] = {
        "topology": lookup.find(scenario.topology) or scenario.topology,
        "tasks": [_beside(task) for task in scenario.tasks],
        "model": _models_beside(scenario.model),
    }
    if isinstance(scenario.edges, dict):
        found["edges"] = {name: _model_of_edge(own) for name, own in scenario.edges.items()}
    return scenario.model_copy(update=found)


def _beside(task: dict[str, Any]) -> dict[str, Any]:
    """The task with its file where it is: beside the scenario, or else as it is written."""
    beside = lookup.find(path) if isinstance(path := task.get("path"), str) and path else ""
    return {**task, "path": beside} if beside else task


def _models_beside(model: str | Models) -> str | Models:
    if isinstance(model, str):
        return _model_beside(model)
    return Models(_model_beside(model.edge), _model_beside(model.cloud))


def _model_of_edge(own: Own) -> Own:
    return own.model_copy(update={"model": _model_beside(own.model)}) if own.model else own


def _model_beside(name: str) -> str:
    """The model where it is, if that is a directory or a GGUF file beside the scenario; a name of ours is no path."""
    found = Path(lookup.find(name) or name)
    is_model = found.is_dir() or found.suffix.lower() == ".gguf"
    return str(found) if lookup.find(name) and is_model and not has_a_name(name) else name


def _check_nodes(scenario: Scenario, topology: Topology, place: str, edges: Sequence[Edge] = ()) -> None:
    nodes = {node.name for node in topology.nodes}
    if scenario.programs is not None:
        _check_programs(scenario, topology, place)
    sides = (
        []
        if scenario.programs is not None
        else [*([] if edges else [("edge", scenario.edge)]), ("cloud", scenario.cloud)]
    )
    named = list(sides)
    for number, value in enumerate(scenario.traffic):
        named += [(f"traffic[{number}].{key}", value[key]) for key in ("from", "to")]
    for key, node in named:
        if node not in nodes:
            raise SpecError(
                f"{place}: {key}: topology {topology.name} has no node {node!r}; it has {', '.join(sorted(nodes))}"
            )
    if sides and scenario.edge == scenario.cloud:
        raise SpecError(f"{place}: edge and cloud are the same node {scenario.edge!r}")


def _check_programs(scenario: Scenario, topology: Topology, place: str) -> None:
    if topology.kind == "hosts":
        raise SpecError(f"{place}: programs: run in a network of namespaces, and {topology.name} is of hosts")
    names = [node.name for node in topology.nodes]
    _at(place, lambda: programs.check(scenario.programs or {}, scenario.parameters, names, COLUMNS))


def _check_links(given: list[str], topology: Topology, place: str) -> None:
    names = {item.name for item in topology.links}
    for name in given:
        if name not in names:
            raise SpecError(
                f"{place}: links: topology {topology.name} has no link {name!r}; it has {', '.join(sorted(names))}"
            )


def _profiles(scenario: Scenario, place: str) -> tuple[Profile, ...]:
    """The profiles of the swept link."""
    profiles = []
    for number, value in enumerate(scenario.profiles):
        here = f"{place}: profiles[{number}]"
        profiles.append(_looked_up(here, partial(profile_from, value, here)))
    return tuple(profiles)


def _looked_up(place: str, read: Callable[[], Profile]) -> Profile:
    """A profile with its trace's file read, so that what is wrong with it is known before anything is built."""
    profile: Profile = _at(place, read)
    _at(place, lambda: [direction.schedule(way, 0.0) for way, direction in profile.ways.items()])
    return profile


def _under(topology: Topology, scenario: Scenario, place: str) -> Topology:
    """The topology with the scenario's conditions on the links that are not swept, and its congestion control."""
    fixed = {
        name: _at(f"{place}: links.{name}", lambda n=name, v=value: profile_from(v, f"{place}: links.{n}"))
        for name, value in scenario.links.items()
    }
    # What the kernel keeps for the privileged is set on routes: there it can be one alone.
    named = {kind.congestion for kind in scenario.transport if isinstance(kind, Tcp)}
    congestion = named.pop() if len(named) == 1 else ""
    links = tuple(
        replace(item, profile=fixed.get(item.name, item.profile), congestion=congestion or item.congestion)
        for item in topology.links
    )
    return replace(topology, links=links)


def _tasks(scenario: Scenario, place: str) -> tuple[Task, ...]:
    return tuple(
        _at(f"{place}: tasks[{i}]", lambda s=settings: make_task(s["task"], **_parameters(s)))
        for i, settings in enumerate(map(scenario.task, range(len(scenario.tasks))))
    )


def _bound(scenario: Scenario, place: str) -> tuple[Scenario, dict[str, str]]:
    """The scenario with what its codecs refer to written out, since a file may say another thing tomorrow, and those codecs as
    they were written, by what they are now.
    """
    codecs, asked = [], {}
    model = _at(f"{place}: model", lambda: find_model(scenario.models.edge).name)
    for spec in scenario.codecs:
        bound = spec
        if spec.unfit:
            raise SpecError(f"{place}: codecs: {spec.unfit}")
        if spec.refers:
            bound = _at(f"{place}: codecs", lambda s=spec: s.bound(model))
        if bound in codecs:
            same = f" (it is {str(bound)!r})" if bound != spec or str(bound) in asked else ""
            raise SpecError(f"{place}: codecs: {str(spec)!r} is listed twice{same}")
        codecs.append(bound)
        if spec.refers:
            asked[str(bound)] = str(spec)
    deliveries = []
    for delivery in scenario.delivery:
        bound = _at(f"{place}: delivery", lambda d=delivery: d.bound(model))
        deliveries.append(bound)
        for here, there in zip(delivery.codecs, bound.codecs, strict=True):
            asked |= {str(there): str(here)} if here.refers else {}
    return scenario.model_copy(update={"codecs": codecs, "delivery": deliveries}), asked


def _check_placements(scenario: Scenario, place: str) -> None:
    """A cache is of one model; and a scout sends no cache, but a choice of tokens."""
    models = scenario.models
    caches = [placement for placement in scenario.placements if placement not in OF_TWO_MODELS]
    if caches and not scenario.one_model:
        raise SpecError(
            f"{place}: placements: {caches[0]!r} needs one model on both sides, and the edge's is {models.edge}, the cloud's "
            f"{models.cloud}: what is there for two models is {', '.join(OF_TWO_MODELS)}"
        )
    if "scout" not in scenario.placements:
        return
    rule = "placement 'scout' takes a selector alone that keeps the same tokens in all layers, such as q2c@0.25(scope=global)"
    unfit = [str(codec) for codec in scenario.codecs if not codec.choice]
    if unfit and not caches:
        raise SpecError(f"{place}: codecs: {unfit[0]!r} is for no placement here: {rule}")
    if len(unfit) == len(scenario.codecs):
        raise SpecError(f"{place}: codecs: {rule}, and there is none")


def _check_decoding(scenario: Scenario, place: str) -> None:
    """A side that cannot decode makes no answer."""
    for side in ("edge", "cloud"):
        answers = [p for p in scenario.placements if (p == "edge") == (side == "edge")]
        if getattr(scenario.compute, side).decode is None and answers:
            raise SpecError(
                f"{place}: placements: compute.{side} has `decode: no`, and the {side} is who answers in placement "
                f"{answers[0]!r}; leave that placement out, or give decode a factor"
            )


def moved(asked: object, model: str) -> list[str]:
    """A sentence for each codec of an earlier plan (its `asked`) whose file is gone or says another thing by now."""
    sentences = []
    for bound, text in asked.items() if isinstance(asked, dict) else ():
        try:
            now = str(parse_codec(str(text)).bound(find_model(model).name))
        except UsageError as error:
            now, why = "", str(error)
        if now != bound:
            today = f"is {now} by now" if now else f"cannot be looked up by now ({why})"
            sentences.append(f"codec {text} was {bound} when this run began, and goes on so; it {today}")
    return sentences


def _check_extent(plan: Plan, place: str) -> None:
    if len({p.text() for p in plan.profiles}) < len(plan.profiles):
        raise SpecError(f"{place}: profiles: the same conditions are listed twice")
    for key in (
        "tasks",
        "placements",
        "context_tokens",
        "delivery",
        "transport",
        "load",
        "serving",
        "allocate",
    ):
        listed = getattr(plan.scenario, key)
        if key == "tasks":
            listed = [plan.scenario.task(index) for index in range(len(listed))]
        for value in listed:
            if listed.count(value) > 1:  # whose trials would be one another's
                raise SpecError(f"{place}: {key}: {str(value)!r} is listed twice")
    if set(plan.scenario.placements) & set(SENDING):
        for spec, delivery in itertools.product(plan.scenario.codecs, plan.scenario.delivery):
            if why := delivery.unfit(str(spec)):
                raise SpecError(f"{place}: delivery: {why}")
    for delivery, tokens in itertools.product(plan.scenario.delivery, plan.scenario.context_tokens):
        if isinstance(delivery, Pipelined) and tokens and (why := delivery.too_many(tokens, 1, MAX_PARTS)):
            raise SpecError(f"{place}: delivery: {why}")
    sent = plan.scenario.transport if plan.scenario.programs is None else []
    for kind, profile in itertools.product(sent, plan.profiles):
        _check_rate(kind, profile, place)
    for kind, delivery in itertools.product(plan.scenario.transport, plan.scenario.delivery):
        if kind.lossy and "scout" in plan.scenario.placements:
            raise SpecError(
                f"{place}: transport: {kind} may lose parts, and placement 'scout' needs text and choice both"
            )
        if kind.lossy and isinstance(delivery, Pipelined) and delivery.needs_every_part:
            raise SpecError(
                f"{place}: transport: {kind} may lose parts, and {delivery} needs each of them; take stream or adaptive"
            )
    if plan.trials > _MAX_TRIALS:
        raise SpecError(f"{place}: {plan.trials} trials; at most {_MAX_TRIALS} make a run")


def _check_rate(kind: Transport, profile: Profile, place: str) -> None:
    """Raises SpecError where the link is faster than the transport: not the link would be measured. Nobody knows beforehand what
    a measured one has."""
    if profile.measured:
        return
    peak = profile.steady(peak=True)
    rate = max(math.inf if way.rate_bps is None else way.rate_bps for way in (peak.up, peak.down))
    if rate > kind.keeps_up_bps:
        has = "no rate" if rate == math.inf else f"up to {format_rate(rate)}"
        raise SpecError(
            f"{place}: transport: {kind} keeps up with {format_rate(kind.keeps_up_bps)}, and profile {profile.name} has {has}"
        )


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


def _without_number(task: Any) -> Any:
    return {k: v for k, v in task.items() if k != EXAMPLES} if isinstance(task, dict) else task


def _parameters(task: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in task.items() if key != "task"}


def _at(place: str, look_up: Any) -> Any:
    """`look_up()`, with the place put before what it complains of."""
    try:
        return look_up()
    except UsageError as error:
        text = str(error)
        raise SpecError(text if text.startswith(place) else f"{place}: {text}") from error
