"""`testbed plot`."""

from __future__ import annotations

from pathlib import Path

import click

from testbed.cli.parts import open_run


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--where", help="Only rows for which this holds, such as 'profile==\"5g-mid\"'.")
def plot(path: Path, figures: tuple[str, ...], where: str | None) -> None:
    """Draw a run's figures anew, from its directory alone; or a diagnosis, from its file or a directory of such files."""
    from testbed.analysis import summary
    from testbed.analysis.figures import draw_all
    from testbed.analysis.figures.layer_sensitivity import draw_file, is_diagnosis
    from testbed.analysis.run import load

    if is_diagnosis(path) and set(figures) <= {"layer_sensitivity"}:
        for figure in draw_file(path):
            click.echo(f"plot      {figure}")
        return
    run = open_run(path, where)
    whole = run if where is None else load(path)
    if len(whole.rows):  # a run that its links stopped has figures of these, and nothing to sum up
        click.echo(f"summary   {summary.write(whole)}")
    for figure in draw_all(run, list(figures) or None):
        click.echo(f"plot      {figure}")
