"""`testbed plot`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--where", help="Only rows for which this holds, such as 'profile==\"5g-mid\"'.")
def plot(path: Path, figures: tuple[str, ...], where: str | None) -> None:
    """Draw a run's figures anew, from its directory alone."""
    import analysis

    click.echo(f"summary   {analysis.write_summary(path)}")
    for figure in analysis.draw(path, list(figures) or None, where):
        click.echo(f"plot      {figure}")
