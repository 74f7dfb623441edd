"""Whole runs of tests: a scenario that is over soon, `testbed run` in this process, and what it left."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from testbed.cli import main
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile
from tests.command import Ended, command

SCENARIO = """\
name: tiny
profiles: ["rate=20mbit,delay=5ms", "rate=50mbit,delay=1ms"]
placements: [split, cloud, edge]
codecs: [fp16, int8, q2c@0.25+int4, h2o@0.5+int8, random@0.5+int8+zstd]
tasks: [needle]
context_tokens: 300
examples: 2
threads: 1
max_new_tokens: 6
"""
TRIALS = 2 * 2 * (5 + 1 + 1)  # profiles, examples; codecs where the cache crosses, and the other placements


def run(*arguments: str, **settings: Any) -> Ended:
    """`testbed run`, whatever the link and the machine are measured to be; `settings`: as `--set` takes them."""
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return command("run", *arguments, *changes, "--accept-uncalibrated")


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """A run draws nothing."""
    with patch("testbed.cli.run.show_results"), patch("testbed.cli.merge.show_results"):
        yield


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Nor does it measure its links, which passes as a measurement without a complaint."""

    def passed(fabric: Fabric, link: str, profile: Profile) -> Calibration:
        return Calibration(link, profile.name, fabric.emulator.name, (Attempt((), {}),))

    with undrawn(), patch.object(Fabric, "calibrate", passed):
        yield


def rows(directory: Path) -> list[dict[str, Any]]:
    """A run's rows, in the order in which they were written."""
    return [json.loads(line) for line in (directory / "trials.jsonl").read_text().split("\n") if line]


if __name__ == "__main__":  # for tests that send signals
    with unmeasured():
        main(sys.argv[1:])
