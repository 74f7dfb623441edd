"""What a run was to make: its tasks' examples, by name, and how many trials each of them has.

examples.json    of each task and context length, in the plan's order: `task` as rows name it, `first`, its first example's place
                 in the plan, `trials` of each example, `examples`

The plan knows how many examples are asked for; which they are, and whether there are so many, only who has read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from testbed.errors import UsageError
from testbed.experiment.deployment import Batch
from testbed.experiment.readers import MOST_EXAMPLES
from testbed.experiment.results import FORMAT, RunDirectory
from testbed.experiment.scenario import Plan
from testbed.experiment.shard import first_places
from testbed.experiment.trial import task_label

NAME = "examples.json"
_Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class Expected(Struct, frozen=True):
    """A task's examples at one context length."""

    task: str
    first: _Count
    trials: _Count
    examples: Annotated[tuple[str, ...], Meta(max_length=MOST_EXAMPLES)]


def write(directory: RunDirectory, plan: Plan, batches: Sequence[Batch]) -> None:
    """Say what these batches are to become. Raises StorageError."""
    places = first_places(plan)
    value: list[dict[str, Any]] = [
        {
            "task": task_label(plan, batch.task, batch.context_tokens),
            "first": places[batch.task, batch.context_tokens],
            "trials": len(plan.cells(batch.task, batch.context_tokens)) * plan.scenario.repeats,
            "examples": [prepared.example.id for prepared in batch.examples],
        }
        for batch in batches
    ]
    directory.write(NAME, {"format": FORMAT, "batches": value})


def read(directory: RunDirectory) -> tuple[Expected, ...]:
    """What is to be made; empty where nobody has read the examples yet. Raises UsageError where the file is damaged."""
    if not (directory.path / NAME).exists():
        return ()
    try:
        return msgspec.convert(directory.read(NAME).get("batches"), tuple[Expected, ...])
    except msgspec.ValidationError as error:
        raise UsageError(f"{directory.path / NAME}: not what a run writes there: {error}") from error
