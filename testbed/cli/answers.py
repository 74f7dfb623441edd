"""What runs' rows say: `testbed summary`, `plot`, `report`, `compare`, `recommend`, `claims`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.cli import completion
from testbed.cli.parts import as_json, open_run

if TYPE_CHECKING:
    from testbed.analysis.run import Run


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--where", help="Only rows for which this holds, such as 'profile==\"5g-mid\"'.")
@click.option(
    "--width",
    type=click.Choice(["screen", "page", "column"]),
    default="screen",
    show_default=True,
    help="For a paper: 7 inches, a page's text; or 3.4, a column. Into figures-page or figures-column.",
)
@click.option(
    "--no-titles", is_flag=True, help="Without title and footnotes; their texts lie beside, for a caption."
)
def plot(path: Path, figures: tuple[str, ...], where: str | None, width: str, no_titles: bool) -> None:
    """Draw a run's figures anew, from its directory alone; or a diagnosis, from its file or a directory of such files."""
    from testbed.analysis import loads, naive, programs, summary
    from testbed.analysis.figures import draw_all
    from testbed.analysis.figures.layer_sensitivity import draw_file, is_diagnosis
    from testbed.analysis.run import load

    if is_diagnosis(path) and set(figures) <= {"layer_sensitivity"}:
        for figure in draw_file(path):
            click.echo(f"plot      {figure}")
        return
    run = open_run(path, where)
    whole = run if where is None else load(path)
    if programs.is_one(whole):
        click.echo(f"programs  {programs.write(whole)}")
    elif len(whole.rows):  # a run that its links stopped has figures of these, and nothing to sum up
        click.echo(f"summary   {summary.write(whole)}")
        if formula := naive.write(whole):
            click.echo(f"formula   {formula}")
        if table := loads.write(whole):
            click.echo(f"loads     {table}")
    for figure in draw_all(run, list(figures) or None, width, not no_titles):
        click.echo(f"plot      {figure}")


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option("--where", help="Only rows for which this holds, such as 'profile==\"5g-mid\"'.")
@as_json
def summary(path: Path, where: str | None) -> Any:
    """Print what a run printed at its end: each link's settings, and last the fastest that keeps the quality."""
    from dataclasses import asdict

    from testbed.analysis import layout, programs
    from testbed.analysis import summary as summing
    from testbed.analysis.describe import caveats, plain

    run = open_run(path, where)
    if programs.is_one(run):
        came_to = [asdict(each) for each in programs.figures(run.require())]
        text = programs.text(run, layout.terminal_width())
        return {"run": str(path), "figures": plain(came_to), "caveats": caveats(run)}, text, 0
    text = summing.table(run, layout.terminal_width())
    cells = plain(summing.summarise(run).to_dict("records"))
    return {"run": str(path), "cells": cells, "caveats": caveats(run)}, text, 0


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path), shell_complete=completion.runs)
def report(path: Path) -> None:
    """Write RUN's report: one page with figures, table, claims and caveats, to be read without a network."""
    from testbed.analysis import programs, report
    from testbed.errors import UsageError

    if programs.is_one(open_run(path)):
        raise UsageError(
            f"{path} is of programs, which `testbed summary` and `testbed plot` show; a page is of language models"
        )
    click.echo(f"report    {report.write(open_run(path))}")


@click.command()
@click.argument(
    "paths", metavar="RUN [RUN]", nargs=-1, type=click.Path(path_type=Path), shell_complete=completion.runs
)
@click.option(
    "--expected",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="In place of a second run: what the scenario is expected to come to, such as scenarios/expected/quick.yaml.",
)
@click.option(
    "--across-hosts", is_flag=True, help="Also where the machines differ, and with them what is measured."
)
@as_json
def compare(paths: tuple[Path, ...], expected: Path | None, across_hosts: bool) -> Any:
    """Put two runs side by side, paired where their examples match. With --expected: hold a run against what its scenario is
    expected to come to; exit status 1 where something is not.
    """
    from testbed.analysis import compare as comparing
    from testbed.analysis import layout

    if expected is not None and len(paths) == 1:
        from testbed.analysis import expected as expecting

        asked = expecting.read(expected)
        met = expecting.judge(open_run(paths[0]), asked)
        text = expecting.text(paths[0], asked, met, layout.terminal_width())
        return expecting.to_dict(paths[0], met), text, 0 if all(each.ok for each in met) else 1
    if expected is not None or len(paths) != 2:
        raise click.UsageError("write two runs, or one and --expected FILE")
    a, b = map(open_run, paths)
    lines = comparing.compare(a, b, across_hosts)
    return comparing.to_dict(a, b, lines), comparing.text(a, b, lines, layout.terminal_width()), 0


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option("--rate", help="The link's rate from edge to cloud, such as 40mbit.")
@click.option("--delay", help="Its one-way delay, such as 20ms.")
@click.option("--loss", default="0%", show_default=True, help="Its packet loss.")
@click.option(
    "--quality", default="0.95", show_default=True, help="Share of the full cache's quality to keep."
)
@click.option(
    "--deadline",
    help="The longest median latency to accept, such as 500ms; of a load, the longest time to a first token.",
)
@click.option(
    "--clients", type=click.IntRange(1), help="In place of a link: so many clients of a closed loop."
)
@click.option("--requests", help="In place of a link: so many requests, such as 4/s.")
@click.option(
    "--p", "share", help="Of a load, the share of requests that the deadline is for.  [default: 0.95]"
)
@click.option("--where", help="Only rows for which this holds.")
@click.option(
    "--held-out",
    is_flag=True,
    help="Print the latency model's error in every cell that it was not fitted to.",
)
@as_json
def recommend(
    path: Path,
    rate: str | None,
    delay: str | None,
    loss: str,
    quality: str,
    deadline: str | None,
    clients: int | None,
    requests: str | None,
    share: str | None,
    where: str | None,
    held_out: bool,
) -> Any:
    """Name the setting of RUN to deploy on a link: the fastest whose quality is shown to hold. With --clients or --requests: the
    one that carries such a load, of those that RUN put on.

    Exit status 1 where there is none.
    """
    if clients is not None or requests is not None:
        if rate or delay or held_out or (clients is not None and requests is not None) or not deadline:
            raise click.UsageError(
                "of a load it takes --clients or --requests, with --deadline, and no link: --clients 16 --deadline 1s"
            )
        return _of_load(open_run(path, where), clients, requests, deadline, share or "0.95", quality)
    if not rate or not delay or share:
        raise click.UsageError(
            "write the link, --rate 40mbit --delay 20ms, or a load, --clients 16 --deadline 1s [--p 0.95]"
        )
    from testbed.analysis import layout
    from testbed.analysis import recommend as recommending
    from testbed.analysis.latency_model import Link
    from testbed.errors import UsageError
    from testbed.units import parse_fraction, parse_percentage, parse_rate, parse_time

    one_way, bits = parse_time(delay), parse_rate(rate)
    if bits <= 0:
        raise UsageError(f"--rate {rate}: a link needs a rate above 0")
    link = Link(bits, one_way, one_way, parse_percentage(loss))
    limit = None if deadline is None else parse_time(deadline)
    advice = recommending.recommend(open_run(path, where), link, parse_fraction(quality), limit)
    text = recommending.text(advice, layout.terminal_width())
    if held_out and advice.held_out:
        text = f"{recommending.held_out_table(advice.held_out)}\n\n{text}"
    return advice.to_dict(), text, 0 if advice.choice else 1


def _of_load(
    run: Run, clients: int | None, requests: str | None, deadline: str, share: str, quality: str
) -> Any:
    """What `recommend` answers where a load is asked for."""
    from testbed.analysis import layout
    from testbed.analysis import recommend_load as recommending
    from testbed.errors import UsageError
    from testbed.units import parse_fraction, parse_per_second, parse_time

    at = float(clients) if clients is not None else parse_per_second(str(requests))
    limit, p = parse_time(deadline), parse_fraction(share)
    if at <= 0 or limit <= 0 or not 0 < p < 1:
        raise UsageError("a load has more than 0 requests, a deadline above 0 s, and a share between 0 and 1")
    asked = recommending.Asked(at, clients is not None, limit, p)
    advice = recommending.recommend(run, asked, parse_fraction(quality))
    return advice.to_dict(), recommending.text(advice, layout.terminal_width()), 0 if advice.complete else 1


@click.command()
@click.argument(
    "paths",
    metavar="RUN...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=completion.runs,
)
@click.option("--markdown", is_flag=True, help="Print the verdicts as a Markdown table.")
@as_json
def claims(paths: tuple[Path, ...], markdown: bool) -> Any:
    """Judge the published claims by the rows of RUN...: holds, fails or undecided, with the figures."""
    from testbed.analysis import claims as judging
    from testbed.analysis import layout

    judged, left_out = judging.judge([open_run(path) for path in paths])
    width = layout.terminal_width()
    printed = judging.table(judged, left_out) if markdown else judging.text(judged, left_out, width)
    return judging.to_dict(judged, left_out), printed, 0
