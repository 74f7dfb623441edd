"""What several commands share: options, tables, JSON, and the demand for root."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import UsageError
from testbed.net import emulators

if TYPE_CHECKING:
    from testbed.analysis.run import Run

EMULATORS = click.Choice(emulators.NAMES)


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``: the object that it returns goes to standard output instead of its table."""

    @click.option("--json", "want_json", is_flag=True, help="Print one JSON object.")
    @wraps(command)
    def wrapped(*args: Any, want_json: bool, **kwargs: Any) -> Any:
        value, text, status = command(*args, **kwargs)
        click.echo(json.dumps(value, indent=2, default=str) if want_json else text)
        return status

    return wrapped


def open_run(path: Path, where: str | None = None) -> Run:
    """The run in `path`, as `testbed.analysis.run.load` reads it; what is missing of it is told on standard error."""
    from testbed.analysis.run import load

    run = load(path, where)
    for gap in run.gaps() if len(run.rows) else ():  # without rows, whoever asks for some says it
        click.echo(f"testbed: {path}: {gap}", err=True)
    return run


def table(rows: list[list[str]], header: list[str]) -> str:
    """Columns of text, left-aligned, in lines of the terminal's width at most."""
    from testbed.analysis import layout

    return layout.table(rows, header, layout.terminal_width())


def sentences(text: str) -> str:
    """Lines of text, wrapped to the terminal's width."""
    from testbed.analysis import layout

    return layout.sentences(text, layout.terminal_width(), "  ")


def _profiles(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (_, equals, _) in zip(texts, pairs, strict=True):
        if not equals:
            raise UsageError(f"--link {text!r}: write NAME=PROFILE, such as access=5g-mid")
    return {name: profile for name, _, profile in pairs}


#: ``--link``: a profile by the name of a link.
link_option = click.option(
    "--link",
    "links",
    multiple=True,
    metavar="NAME=PROFILE",
    callback=_profiles,
    help="Put a link under this profile.",
)


def sweep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that change a scenario from the command line."""
    options = [
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a setting of the scenario.",
        ),
        click.option(
            "--codec",
            "codecs",
            multiple=True,
            metavar="CODEC",
            help="Use this codec instead of the scenario's (repeatable).",
        ),
        link_option,
        click.option("--examples", type=click.IntRange(1), help="Examples per task."),
        click.option("--emulator", type=EMULATORS, help="What imposes the links' conditions."),
        click.option(
            "--placement-free",
            is_flag=True,
            help="Answers and bytes alone, in one process: without root, network and times.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def require_root() -> None:
    """Networks are the kernel's: building one takes root, and nothing else here does. Raises UsageError."""
    if os.geteuid() != 0:
        raise UsageError(
            f"building a network needs root: run it as  sudo {sys.argv[0]} {' '.join(sys.argv[1:])}"
        )


rootless_flag = click.option(
    "--rootless", is_flag=True, help="Without root: inside a user namespace, which leaves nothing."
)


def rootless_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--rootless``: the command goes on in namespaces of its own, where everybody may build networks."""

    @rootless_flag
    @wraps(command)
    def wrapped(*args: Any, rootless: bool, **kwargs: Any) -> Any:
        if rootless:
            enter_rootless()
        return command(*args, **kwargs)

    return wrapped


def enter_rootless() -> None:
    """Go on in namespaces of one's own. Raises UsageError with the remedy where the kernel does not allow it."""
    from testbed.hosts import rootless

    rootless.enter()
