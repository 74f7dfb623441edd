"""Rows of a scenario that a benchmark asks for: a whole run, in a directory that goes away."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from testbed.cli.progress import Console
from testbed.experiment.plan import make_plan
from testbed.experiment.runner import start


def rows(**settings: Any) -> list[dict[str, Any]]:
    """The rows of a run of these settings; links out of tolerance are said in them. Raises SystemExit where trials failed."""
    with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as directory:
        plan = make_plan({"name": "benchmark", **settings}, "the benchmark's scenario")
        runner = start(plan, Path(directory) / "run", Console(), accept_uncalibrated=True)
        runner.execute()
        rows = list(runner.directory.rows())
    if failed := [row for row in rows if row["error"]]:
        raise SystemExit(f"{len(failed)} of {len(rows)} trials failed, such as: {failed[0]['error']}")
    return rows
