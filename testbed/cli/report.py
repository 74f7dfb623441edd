"""`testbed report` and `testbed compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, open_run


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
def report(path: Path) -> None:
    """Write RUN's report: one page with figures, table, claims and caveats, to be read without a network."""
    from testbed.analysis import report

    click.echo(f"report    {report.write(open_run(path))}")


@click.command()
@click.argument("first", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("second", metavar="RUN", type=click.Path(path_type=Path))
@as_json
def compare(first: Path, second: Path) -> Any:
    """Put two runs side by side, paired where their examples match."""
    from testbed.analysis import compare as comparing

    a, b = open_run(first), open_run(second)
    lines = comparing.compare(a, b)
    return comparing.to_dict(a, b, lines), comparing.text(a, b, lines), 0
