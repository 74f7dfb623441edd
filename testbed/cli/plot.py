"""`testbed plot`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--where", help="Only rows for which this holds, such as 'profile==\"5g-mid\"'.")
def plot(path: Path, figures: tuple[str, ...], where: str | None) -> None:
    """Draw a run's figures anew, from its directory alone; or a diagnosis, from its file or a directory of such files."""
    import analysis
    from analysis.figures.layer_sensitivity import draw_file, is_diagnosis

    if is_diagnosis(path) and set(figures) <= {"layer_sensitivity"}:
        for figure in draw_file(path):
            click.echo(f"plot      {figure}")
        return
    click.echo(f"summary   {analysis.write_summary(path)}")
    for figure in analysis.draw(path, list(figures) or None, where):
        click.echo(f"plot      {figure}")
