"""`testbed claims`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@as_json
def claims(paths: tuple[Path, ...]) -> Any:
    """Judge the published claims by the rows of RUN...: holds, fails or undecided, with the figures."""
    from analysis import claims as judging
    from analysis.run import load

    found, said = judging.judge([load(path) for path in paths])
    return judging.to_dict(found, said), judging.text(found, said), 0
