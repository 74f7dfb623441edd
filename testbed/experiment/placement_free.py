"""A scenario without its link: what a setting does to an answer needs neither network nor root, and no second process.

Both sides are what they are in any run (`endpoints/loopback.py`): the same selection, encoding, decoding and answering. What only
a link, a device or a load could show is left away, and so is a delivery that depends on when something arrives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from testbed.errors import SpecError
from testbed.experiment.scenario import Plan, Scenario
from testbed.experiment.sides import Compute
from testbed.models.shapes import is_shape
from testbed.net.profile.profile import Direction, Profile
from testbed.transport.tcp import Tcp

#: In the place of a link's conditions; its name is what rows say of their link.
NOWHERE = Profile("placement-free", Direction(), Direction(), "no link: one process, and no times")

#: Nobody waits for a link here, and a long context on a busy machine takes its time.
_TIMEOUT_S = 6 * 3600.0


def freed(scenario: Scenario, place: str) -> tuple[Scenario, tuple[str, ...]]:
    """The scenario with each setting that changes an answer or its bytes, once, and nothing else; and a sentence on what else it
    leaves out. Raises SpecError where nothing is left, or no answer means anything."""
    if scenario.loaded:
        loads = ", ".join(str(load) for load in scenario.load if load.timed)
        raise SpecError(
            f"{place}: load: {loads} is about who waits for whom, and placement-free has no times; leave it out"
        )
    if scenario.programs is not None:
        raise SpecError(
            f"{place}: programs: they talk over a link, and placement-free has none; leave one of the two out"
        )
    timed = [str(delivery) for delivery in scenario.delivery if delivery.depends_on_times]
    depends = "sends, or answers from, depends on the link, and placement-free has none"
    if len(timed) == len(scenario.delivery):
        raise SpecError(f"{place}: delivery: what {timed[0]} {depends}; take whole or stream")
    for model in (scenario.models.edge, scenario.models.cloud):
        if is_shape(model):
            raise SpecError(
                f"{place}: model: {model} answers nothing that means anything; its bytes are told by  testbed plan"
            )
    # A store's cache is what an edge that prefills first sends: of both one is enough.
    placements = [p for p in scenario.placements if p != "store" or "split" not in scenario.placements]
    fields = Scenario.model_fields
    usual = {
        name: fields[name].default
        for name in ("topology", "edge", "cloud", "link", "emulator", "at", "repeats", "reuse")
    }
    nothing: dict[str, Any] = {
        "links": {},
        "traffic": [],
        "allocate": [],
        "handovers": [],
        "edges": None,
        "compute": Compute(),
        "transport": [Tcp()],
    }
    left = scenario.model_copy(
        update={
            **usual,
            **nothing,
            "profiles": ["delay=0ms"],  # whose place `NOWHERE` takes
            "placements": placements,
            "delivery": [delivery for delivery in scenario.delivery if not delivery.depends_on_times],
            "timeout": max(scenario.timeout, _TIMEOUT_S),
        }
    )
    return left, tuple(f"left out: what {delivery} {depends}" for delivery in timed)


def off_link(plan: Plan, profile: Profile) -> Plan:
    """The plan with its swept link under that profile, which is none: loopback is the host's, and which congestion controls it
    permits is not for us to say."""
    links = tuple(replace(link, congestion=None) for link in plan.topology.links)
    return replace(plan, profiles=(profile,), topology=replace(plan.topology, links=links))
