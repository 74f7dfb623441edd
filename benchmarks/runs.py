"""Rows of a scenario that a benchmark asks for: a whole run, in a directory that goes away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from testbed.cli.progress import Console
from testbed.experiment.plan import make_plan
from testbed.experiment.runner import start
from testbed.experiment.scenario import Cell, Plan


@dataclass(frozen=True)
class Chosen(Plan):
    """A plan of which only some cells are wanted."""

    wanted: Callable[[Plan, Cell], bool] = lambda plan, cell: True

    def cells(self, task: int, context_tokens: int | None) -> list[Cell]:
        """Those that are wanted."""
        return [cell for cell in super().cells(task, context_tokens) if self.wanted(self, cell)]


def rows(
    wanted: Callable[[Plan, Cell], bool] = lambda plan, cell: True, **settings: Any
) -> list[dict[str, Any]]:
    """The rows of a run of these settings, or of those of its cells that are wanted; links out of tolerance are said in them.
    Raises SystemExit where trials failed.
    """
    with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as directory:
        plan = make_plan({"name": "benchmark", **settings}, "the benchmark's scenario")
        chosen = Chosen(**{field.name: getattr(plan, field.name) for field in fields(plan)}, wanted=wanted)
        runner = start(chosen, Path(directory) / "run", Console(), accept_uncalibrated=True)
        runner.execute()
        rows = list(runner.directory.rows())
    if failed := [row for row in rows if row["error"]]:
        raise SystemExit(f"{len(failed)} of {len(rows)} trials failed, such as: {failed[0]['error']}")
    return rows
