"""The command line: parse arguments, call, print. What it can do is elsewhere; how it looks is here.

One file a command, or a few that belong together. They import what they need when they run, so that `testbed --help` is instant.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import NoReturn

import click

from testbed import __version__, identity
from testbed.cli import (
    answers,
    calibrate,
    check,
    coding,
    device,
    diagnose,
    guide,
    hosts,
    listings,
    merge,
    network,
    plan,
    run,
)
from testbed.errors import TestbedError

#: What the system says of a file that was asked for wrongly; anything else is its own trouble.
_WRONG_FILE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
_LONGEST = 1200  #: characters of a complaint


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="testbed")
def cli() -> None:
    """Measure split LLM inference across emulated links: real models, real compressed KV caches, real bytes."""


for _command in (
    run.run,
    merge.merge,
    plan.plan,
    network.up,
    network.exec_,
    network.ls,
    network.show,
    network.set_,
    network.link,
    network.handover,
    network.down,
    network.clean,
    hosts.hosts,
    calibrate.calibrate,
    listings.doctor,
    listings.profiles,
    listings.codecs,
    listings.tasks,
    listings.models,
    device.devices,
    device.device,
    coding.encode,
    coding.decode,
    answers.summary,
    answers.plot,
    diagnose.diagnose,
    answers.report,
    answers.compare,
    check.check,
    answers.recommend,
    answers.claims,
    guide.guide,
):
    cli.add_command(_command)


def main(argv: list[str] | None = None) -> None:
    """The entry point: every failure that people can cause ends as one line and an exit status."""
    _open_standard_files()
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
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else "cannot write what there is to say: "
        _fail(f"{where}{error.strerror or error}", 2 if error.errno in _WRONG_FILE else 1)
    except (UnicodeError, OverflowError, RecursionError) as error:
        _fail(f"what was given cannot be understood: {str(error).splitlines()[0][:200]}", 2)
    sys.exit(status if isinstance(status, int) else 0)


def _open_standard_files() -> None:
    """Where the shell has closed standard input, output or errors, they lead nowhere; or other files would be in their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _fail(message: str, status: int) -> NoReturn:
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 4 :]}"
    with contextlib.suppress(OSError):  # nobody listens
        click.echo(f"testbed: {message}".encode(errors="backslashreplace"), err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (
            OSError,
            ValueError,
            AttributeError,
        ):  # what it holds would be tried again at the end, with a traceback
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
