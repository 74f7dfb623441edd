"""The command line: parse arguments, call, print. What it can do is elsewhere; how it looks is here.

One file a command, or a few that belong together. They import what they need when they run, so that `testbed --help` is instant.
"""

from __future__ import annotations

import os
import sys

import click

from testbed import __version__, identity
from testbed.cli import (
    calibrate,
    claims,
    diagnose,
    guide,
    listings,
    network,
    plan,
    plot,
    recommend,
    report,
    run,
)
from testbed.errors import TestbedError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="testbed")
def cli() -> None:
    """Measure split LLM inference across emulated links: real models, real compressed KV caches, real bytes."""


for _command in (
    run.run,
    plan.plan,
    network.up,
    network.exec_,
    network.show,
    network.down,
    network.clean,
    calibrate.calibrate,
    listings.doctor,
    listings.profiles,
    listings.codecs,
    listings.tasks,
    listings.models,
    plot.plot,
    diagnose.diagnose,
    report.report,
    report.compare,
    recommend.recommend,
    claims.claims,
    guide.guide,
):
    cli.add_command(_command)


def main(argv: list[str] | None = None) -> None:
    """The entry point: every failure that people can cause ends as one line and an exit status."""
    try:
        with identity.assumed():
            status = cli.main(args=argv, prog_name="testbed", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message().replace("\n", " "), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", run.INTERRUPTED)
    except TestbedError as error:
        _fail(str(error).replace("\n", " "), error.exit_status)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    click.echo(f"testbed: {message}", err=True)
    sys.exit(status)
