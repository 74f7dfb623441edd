"""How a load's cells are shared out, where its scenario says that: `allocate`, one load after the other under each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from testbed import kinds
from testbed.errors import SpecError
from testbed.experiment.edges import Edge
from testbed.net.sharing import SCHEDULERS
from testbed.net.sharing.contract import Scheduler
from testbed.net.sharing.model_aware import ModelAware
from testbed.net.topology.topology import Topology


def parse(text: str) -> Scheduler:
    """The scheduler that is written so; `model-aware` without sizes goes by what edges announce. Raises SpecError."""
    scheduler: Scheduler = kinds.parse(text, SCHEDULERS, "allocate")
    return scheduler


#: As a scenario has it.
Allocation = Annotated[
    InstanceOf[Scheduler],
    BeforeValidator(lambda value: parse(str(value))),
    PlainSerializer(str, when_used="json"),
]


def check(allocations: Sequence[Scheduler], edges: Sequence[Edge], topology: Topology) -> None:
    """Raises SpecError where there is nothing to share out, or a scheduler does not suit what there is."""
    if not topology.cells:
        raise SpecError(
            f"{allocations[0]}: topology {topology.name} has no cell to share out; take one that has, such as cell"
        )
    for scheduler in allocations:
        shares(scheduler, topology, dict.fromkeys((edge.link for edge in edges), 1.0))


def shares(scheduler: Scheduler, topology: Topology, sizes: Mapping[str, float]) -> dict[str, str]:
    """By cell, how it is shared out where its links have so many bytes to send. Raises SpecError."""
    found = {}
    for cell in topology.cells:
        links = [link.name for link in topology.links if link.cell == cell.name]
        told = scheduler
        if isinstance(scheduler, ModelAware) and not scheduler.bytes:
            silent = [link for link in links if link not in sizes]
            if silent:
                raise SpecError(
                    f"{scheduler}: nobody announces what link {silent[0]} of cell {cell.name} has to send: no edge is behind it; "
                    "make its node an edge, or write the sizes"
                )
            told = scheduler.announced([sizes[link] for link in links])
        told.check(len(links))
        found[cell.name] = str(told)
    return found
