"""Rows of a scenario that a benchmark asks for: a whole run, in a directory that goes away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed.cli.progress import Console
from testbed.experiment.plan import make_plan
from testbed.experiment.runner import start
from testbed.experiment.scenario import Cell, Plan


def rows(wanted: Callable[[Plan, Cell], bool] | None = None, **settings: Any) -> list[dict[str, Any]]:
    """The rows of a run of these settings, or of those of its cells that are wanted; links out of tolerance are said in them.
    Raises SystemExit where trials failed.
    """
    with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as directory:
        plan = make_plan({"name": "benchmark", **settings}, "the benchmark's scenario")
        runner = start(plan, Path(directory) / "run", Console(), accept_uncalibrated=True)
        if wanted is not None:
            every = runner._trials
            runner._trials = lambda *about: (t for t in every(*about) if wanted(plan, t.cell))  # type: ignore[method-assign]
        runner.execute()
        rows = list(runner.directory.rows())
    if failed := [row for row in rows if row["error"]]:
        raise SystemExit(f"{len(failed)} of {len(rows)} trials failed, such as: {failed[0]['error']}")
    return rows
