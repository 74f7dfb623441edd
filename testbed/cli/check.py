"""Whether what lies there is what it says: `testbed check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from testbed.cli import completion
from testbed.cli.parts import as_json


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path), shell_complete=completion.runs)
@as_json
def check(path: Path) -> Any:
    """Look RUN through: answers scored again, stages summed and derived from spans again, tables and figures made from the rows
    again, and each held against what lies there.

    A line a deviation; exit status 1 where there is one.
    """
    from testbed.analysis import check as checking

    checked = checking.check(path)
    return asdict(checked), checking.text(checked), 1 if checked.deviations else 0
