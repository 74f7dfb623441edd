"""`testbed guide`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@as_json
def guide(paths: tuple[Path, ...]) -> Any:
    """Walk the published deployment procedure by the rows of RUN...: INT8, INT4, mixed precision, Q2C."""
    from analysis import guide as guiding
    from analysis.run import load

    found, said = guiding.walk([load(path) for path in paths])
    value = {
        "models": {model: [asdict(step) for step in steps] for model, steps in found.items()},
        "left_out": said,
    }
    return value, guiding.text(found, said), 0
