"""`testbed claims`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, open_run


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the verdicts as a Markdown table.")
@as_json
def claims(paths: tuple[Path, ...], markdown: bool) -> Any:
    """Judge the published claims by the rows of RUN...: holds, fails or undecided, with the figures."""
    from testbed.analysis import claims as judging

    judged, left_out = judging.judge([open_run(path) for path in paths])
    printed = judging.table(judged, left_out) if markdown else judging.text(judged, left_out)
    return judging.to_dict(judged, left_out), printed, 0
