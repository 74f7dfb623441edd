"""A share of a plan: which examples one process makes, so that all settings of an example meet one host.

A plan's examples are counted through, task by task and context length by context length, and dealt out one by one. So shards of
a plan are a partition of it, their sizes differ by one example at most, and so do those of each task and length. It follows from
the numbers that the plan asks for alone: wherever a shard is made, it is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from testbed.errors import UsageError
from testbed.experiment.scenario import Plan

#: More than any array of jobs has.
MOST = 100_000
#: From Slurm's array, whatever the environment has besides.
_SLURM = "SLURM_ARRAY_TASK_"
_HOW = "write --shard 3/16 (the third of sixteen), or --shard auto within a Slurm array"
_NUMBERS, _FOLDER = re.compile(r"([0-9]{1,6})/([0-9]{1,6})"), re.compile(r"([0-9]{1,6})-of-([0-9]{1,6})")


@dataclass(frozen=True, order=True)
class Shard:
    """The `number`th of `count`, from 1 on."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MOST:
            raise UsageError(f"shard {self}: number from 1 to the count, and that to {MOST:,}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder(self) -> str:
        """Its directory's name."""
        return f"{self.number}-of-{self.count}"

    def has(self, place: int) -> bool:
        """Whether it makes the example at that place of the plan (see `first_places`)."""
        return place % self.count == self.number - 1

    def numbers(self, plan: Plan, task: int, context_tokens: int | None, examples: int) -> list[int]:
        """Which of a task's so many examples are its own."""
        first = first_places(plan)[task, context_tokens]
        return [number for number in range(examples) if self.has(first + number)]

    def trials(self, plan: Plan) -> int:
        """How many trials it has, if every task has as many examples as asked."""
        return plan.scenario.repeats * sum(
            len(plan.cells(*batch)) * len(self.numbers(plan, *batch, plan.scenario.examples_of(batch[0])))
            for batch in plan.batches()
        )


WHOLE = Shard(1, 1)


def first_places(plan: Plan) -> dict[tuple[int, int | None], int]:
    """The place of the first example of each task and context length."""
    places, place = {}, 0
    for task, context_tokens in plan.batches():
        places[task, context_tokens] = place
        place += plan.scenario.examples_of(task)
    return places


def parse(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard that is written so: ``3/16``, or by an array's variables with ``auto`` or ``slurm``. Raises UsageError."""
    if text in ("auto", "slurm"):
        return _of_array(environment)
    if written := _NUMBERS.fullmatch(text):
        return Shard(int(written[1]), int(written[2]))
    raise UsageError(f"--shard {text!r}: {_HOW}")


def of_folder(name: str) -> Shard | None:
    """The shard whose directory is called so; None: none is."""
    written = _FOLDER.fullmatch(name)
    if not written:
        return None
    try:
        shard = Shard(int(written[1]), int(written[2]))
    except UsageError:
        return None
    return shard if shard.folder == name else None


def _of_array(environment: Mapping[str, str]) -> Shard:
    """The shard of this task of a Slurm array (sbatch(1), OUTPUT ENVIRONMENT VARIABLES)."""
    values = {}
    for key in ("ID", "COUNT", "MIN", "MAX", "STEP"):
        text = environment.get(_SLURM + key, "1" if key == "STEP" else "")
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UsageError(
                f"--shard auto: {_SLURM}{key} is {text[:40]!r}, no number of a Slurm array; {_HOW}"
            )
        values[key] = int(text)
    step = max(1, values["STEP"])
    number, rest = divmod(values["ID"] - values["MIN"], step)
    if rest or values["MAX"] - values["MIN"] != (values["COUNT"] - 1) * step:
        raise UsageError(
            "--shard auto: this array has gaps, so its tasks do not say which of the whole they are; "
            'write --shard "$SLURM_ARRAY_TASK_ID/16"'
        )
    return Shard(number + 1, values["COUNT"])
