"""`testbed recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, open_run


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--rate", required=True, help="The link's rate from edge to cloud, such as 40mbit.")
@click.option("--delay", required=True, help="Its one-way delay, such as 20ms.")
@click.option("--loss", default="0%", show_default=True, help="Its packet loss.")
@click.option(
    "--quality", default="0.95", show_default=True, help="Share of the full cache's quality to keep."
)
@click.option("--deadline", help="The longest median latency to accept, such as 500ms.")
@click.option("--where", help="Only rows for which this holds.")
@click.option(
    "--held-out",
    is_flag=True,
    help="Print the latency model's error in every cell that it was not fitted to.",
)
@as_json
def recommend(
    path: Path,
    rate: str,
    delay: str,
    loss: str,
    quality: str,
    deadline: str | None,
    where: str | None,
    held_out: bool,
) -> Any:
    """Name the setting of RUN to deploy on a link: the fastest whose quality is shown to hold.

    Exit status 1 where there is none.
    """
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
    text = recommending.text(advice)
    if held_out and advice.held_out:
        text += f"\n\n{recommending.held_out_table(advice.held_out)}"
    return advice.to_dict(), text, 0 if advice.choice else 1
