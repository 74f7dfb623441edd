"""The command line: parse arguments, call, print. What it can do is elsewhere; how it looks is here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed import __version__
from testbed.errors import TestbedError, UsageError

if TYPE_CHECKING:
    from testbed.runner import Progress, Run

_INTERRUPTED = 130
EMULATORS = click.Choice(["auto", "netem", "userspace"])


def main(argv: list[str] | None = None) -> None:
    """The entry point: every failure that people can cause ends as one line and an exit status."""
    try:
        status = cli.main(args=argv, prog_name="testbed", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message().replace("\n", " "), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", _INTERRUPTED)
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


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``: the object that it returns goes to standard output instead of its table."""

    @click.option("--json", "want_json", is_flag=True, help="Print one JSON object.")
    @wraps(command)
    def wrapped(*args: Any, want_json: bool, **kwargs: Any) -> Any:
        value, text, status = command(*args, **kwargs)
        click.echo(json.dumps(value, indent=2, default=str) if want_json else text)
        return status

    return wrapped


def table(rows: list[list[str]], header: list[str]) -> str:
    """Columns of text, left-aligned; the last column may be of any length."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="testbed")
def cli() -> None:
    """Measure split LLM inference across emulated links: real models, real compressed KV caches, real bytes."""


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
        click.option(
            "--link", "links", multiple=True, metavar="NAME=PROFILE", help="Put a link under this profile."
        ),
        click.option("--examples", type=click.IntRange(1), help="Examples per task."),
        click.option("--emulator", type=EMULATORS, help="What imposes the links' conditions."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("scenario", required=False)
@click.option(
    "--resume",
    "resumed",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Continue a run where it ended.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run's directory [default: results/NAME-TIME].",
)
@click.option(
    "--accept-uncalibrated",
    is_flag=True,
    help="Go on where a link is not what was asked for; every row says so.",
)
@sweep_options
def run(
    scenario: str | None, resumed: Path | None, out: Path | None, accept_uncalibrated: bool, **changes: Any
) -> int:
    """Run SCENARIO (a file, or the name of a shipped one): network, model, trials, plots."""
    from testbed import runner
    from testbed.net import state
    from testbed.scenario import load_plan

    if (scenario is None) == (resumed is None):
        raise UsageError("name a scenario to run, or a directory with --resume, and not both")
    show = Console()
    if resumed is not None:
        if any(value for value in (*changes.values(), out)):
            raise UsageError("--resume continues a run as it was; leave the other options away")
        require_root()
        state.clean()
        started = runner.resume(resumed, show, accept_uncalibrated)
    else:
        assert scenario is not None
        plan = load_plan(scenario, **changes)
        require_root()
        state.clean()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        started = runner.start(
            plan, out or Path("results") / f"{plan.scenario.name}-{stamp}", show, accept_uncalibrated
        )
    return _execute(started, show)


def require_root() -> None:
    """Networks are the kernel's: building one takes root, and nothing else here does. Raises UsageError."""
    if os.geteuid() != 0:
        raise UsageError(
            f"building a network needs root: run it as  sudo {sys.argv[0]} {' '.join(sys.argv[1:])}"
        )


def _execute(started: Run, show: Console) -> int:
    path = started.directory.path
    try:
        started.execute()
    except KeyboardInterrupt:
        show.close()
        click.echo(f"testbed: interrupted; continue with  testbed run --resume {path}", err=True)
        return _INTERRUPTED
    except TestbedError:
        show.close()
        if any(started.directory.rows()):
            click.echo(f"rows so far are in {path}; continue with  testbed run --resume {path}", err=True)
        raise
    show.close()
    show_results(path)
    if started.failures:
        click.echo(f"testbed: {started.failures} trials failed; their rows say why", err=True)
        return 1
    return 0


def show_results(path: Path) -> None:
    """Draw a finished run; where there is too little to draw, say so: the rows are there all the same."""
    import analysis

    try:
        click.echo(analysis.headline(path) + "\n")
        click.echo(f"summary   {analysis.write_summary(path)}")
        for figure in analysis.draw(path):
            click.echo(f"plot      {figure}")
    except UsageError as error:
        click.echo(f"testbed: nothing to draw: {error}", err=True)
    click.echo(f"rows      {path / 'trials.jsonl'}")


class Console:
    """Progress for people: a live line on a terminal, an occasional line elsewhere."""

    def __init__(self) -> None:
        self._live: Any = None
        self._last = ""
        self._tenth = -1
        if sys.stderr.isatty():
            from rich.console import Console as Terminal

            self._live = Terminal(stderr=True).status("starting")
            self._live.start()

    def __call__(self, progress: Progress) -> None:
        text = self._text(progress)
        if self._live is not None:
            self._live.update(text)
            return
        tenth = 10 * progress.done // max(1, progress.total)
        counting = progress.done > 0 and progress.text.count("  ") == 1
        if (not counting or tenth != self._tenth) and text != self._last:
            click.echo(text, err=True)
            self._last, self._tenth = text, tenth if counting else self._tenth

    @staticmethod
    def _text(progress: Progress) -> str:
        from testbed.units import format_duration

        if not progress.done:
            return progress.text
        left = (
            f", about {format_duration(progress.remaining_s)} left"
            if progress.remaining_s is not None
            else ""
        )
        return f"{progress.done} of {progress.total} trials{left}: {progress.text}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


@cli.command()
@click.argument("scenario")
@sweep_options
@as_json
def plan(scenario: str, **changes: Any) -> Any:
    """Show what SCENARIO would run: cells, bytes, expected time. Needs no root and builds nothing."""
    from testbed.estimate import Estimator
    from testbed.scenario import load_plan
    from testbed.units import format_duration, format_size, format_time

    made = load_plan(scenario, **changes)
    estimator = Estimator(made)
    per_cell = made.scenario.examples * made.scenario.repeats
    cells = estimator.summary()
    seconds = sum(cell["trial_s"] for cell in cells) * per_cell
    sent = sum(cell["payload_bytes"] for cell in cells) * per_cell
    rows = [
        [
            f"{c['task']}@{c['context_tokens'] or 'own'}",
            c["placement"],
            c["codec"] or "-",
            c["profile"],
            format_size(c["payload_bytes"]),
            format_time(c["transmit_s"]),
        ]
        for c in cells
    ]
    text = table(rows, ["task", "placement", "codec", "profile", "payload", "transmit"])
    text += f"\n\n{len(cells)} cells x {per_cell} = {made.trials} trials, "
    text += f"{format_size(sent)} across the link, about {format_duration(seconds)}"
    if estimator.model is None:
        text += f"\nmodel {made.scenario.model}: no configuration at hand, so cache sizes are unknown"
    value = {"cells": cells, "trials": made.trials, "bytes": sent, "seconds": seconds}
    return value, text, 0


@cli.command()
@click.argument("topology")
@click.option("--link", "links", multiple=True, metavar="NAME=PROFILE", help="Put a link under this profile.")
@click.option("--emulator", type=EMULATORS, default="auto", show_default=True)
@as_json
def up(topology: str, links: tuple[str, ...], emulator: str) -> Any:
    """Build TOPOLOGY and leave it standing, for `testbed exec` and your own programs."""
    from testbed.net import fabric
    from testbed.net.profile import parse_profile
    from testbed.net.topology import load_topology

    made = load_topology(topology)
    given = {}
    for text in links:
        name, equals, profile = text.partition("=")
        if not equals:
            raise UsageError(f"--link {text!r}: write NAME=PROFILE, such as access=5g-mid")
        given[name] = parse_profile(profile)
    require_root()
    described = fabric.describe(fabric.up(made, given, emulator))
    hint = "testbed exec NODE -- COMMAND runs a program in it; testbed down removes it"
    return described, f"{_network_text(described)}\n\n{hint}", 0


def _network_text(described: dict[str, Any]) -> str:
    lines = [f"{described['id']}  {described['topology']}  ({described['emulator']})"]
    for node in described["nodes"]:
        addresses = ", ".join(f"{end['interface']} {end['address']}" for end in node["addresses"])
        lines.append(f"  node {node['name']:<12} {addresses:<28} namespace {node['namespace']}")
    for link in described["links"]:
        lines.append(f"  link {link['name']:<12} {link['a']} - {link['b']}: {link['profile']}")
        for way, counted in (link["counters"] or {}).items():
            figures = ", ".join(f"{key} {value}" for key, value in counted.items())
            lines.append(f"       {way:<5} {figures}")
    return "\n".join(lines)


@cli.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--id", "identifier", help="Which network, where several stand.")
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(identifier: str | None, node: str, command: tuple[str, ...]) -> int:
    """Run COMMAND inside NODE of the network that `testbed up` built; node names resolve."""
    from testbed.net import state
    from testbed.net.execute import execute

    require_root()
    return execute(state.find(identifier), node, list(command))


@cli.command()
@click.option("--id", "identifier", help="Which network, where several stand.")
@as_json
def show(identifier: str | None) -> Any:
    """Show the network that stands: nodes, addresses, profiles, live counters."""
    from testbed.net import fabric, state

    described = fabric.describe(state.find(identifier))
    return described, _network_text(described), 0


@cli.command()
@click.option("--id", "identifier", help="Which network, where several stand.")
def down(identifier: str | None) -> None:
    """Remove the network that `testbed up` built."""
    from testbed.net import state

    click.echo("\n".join(f"removed {what}" for what in state.down(identifier)))


@cli.command()
@click.argument("profiles", nargs=-1, metavar="PROFILE...")
@click.option("--all", "every", is_flag=True, help="Every preset.")
@click.option("--emulator", type=EMULATORS, default="auto", show_default=True)
@as_json
def calibrate(profiles: tuple[str, ...], every: bool, emulator: str) -> Any:
    """Build a link under each PROFILE, measure it, and print what was asked beside what was measured."""
    from testbed.net import calibrate as calibration
    from testbed.net.fabric import Fabric
    from testbed.net.profile import PRESETS, parse_profile
    from testbed.net.topology import load_topology

    chosen = [parse_profile(text) for text in profiles] + (list(PRESETS.values()) if every else [])
    if not chosen:
        raise UsageError("name at least one profile, or --all; `testbed profiles` lists the presets")
    require_root()
    measured = []
    with Fabric.build(load_topology("edge-cloud"), emulator) as fabric:
        link = fabric.topology.links[0].name
        for profile in chosen:
            fabric.apply(link, profile)
            measured.append(calibration.calibrate(fabric, link, profile))
    rows = []
    for result in measured:
        for line in result.lines():
            verdict = {True: "ok", False: "OUT", None: "-"}[line["ok"]]
            cells = [line["way"], line["what"], line["asked"], line["measured"], line["error"], verdict]
            rows.append([result.profile, *map(str, cells)])
    text = table(rows, ["profile", "way", "what", "asked", "measured", "off by", ""])
    text += "".join(f"\n{result.profile}: {result.cause}" for result in measured if not result.ok)
    value = {"emulator": measured[0].emulator, "calibrations": [result.to_dict() for result in measured]}
    return value, text, 0 if all(result.ok for result in measured) else 1


@cli.command()
@as_json
def clean() -> Any:
    """Remove whatever dead runs left: namespaces, processes, state files. Touches nothing that was not ours."""
    from testbed.net import state

    require_root()
    removed = state.clean()
    return {"removed": removed}, "\n".join(f"removed {what}" for what in removed) or "nothing to remove", 0


@cli.command()
@as_json
def doctor() -> Any:
    """Say what this machine can and cannot do."""
    from testbed.environment import examine

    findings = examine()
    rows = [[f.what, "yes" if f.ok else ("MISSING" if f.needed else "no"), f.detail] for f in findings]
    missing = [f for f in findings if f.needed and not f.ok]
    value = {"findings": [vars(f) for f in findings], "ok": not missing}
    return value, table(rows, ["what", "", "detail"]), 1 if missing else 0


@cli.command()
@as_json
def profiles() -> Any:
    """List the links' presets."""
    from testbed.net.profile import PRESETS

    rows, value = [], []
    for profile in PRESETS.values():
        rows.append([profile.name, str(profile.up), str(profile.down), profile.source])
        value.append(
            {"name": profile.name, "up": str(profile.up), "down": str(profile.down), "source": profile.source}
        )
    return {"profiles": value}, table(rows, ["profile", "up", "down", "source"]), 0


@cli.command()
@as_json
def codecs() -> Any:
    """List the codecs' methods, stage by stage."""
    from dataclasses import asdict

    from testbed.codecs.registry import describe

    methods = describe()
    lines = []
    for method in methods:
        settings = ", ".join(f"{p.name}={p.default}" for p in method.parameters if p.name != "ratio")
        written = (
            method.name + ("@RATIO" if method.takes_ratio else "") + (f"({settings})" if settings else "")
        )
        lines.append(f"{method.stage:<10} {written}\n           {method.summary}\n           {method.source}")
    return {"methods": [asdict(m) for m in methods]}, "\n".join(lines), 0


@cli.command()
@as_json
def tasks() -> Any:
    """List the tasks."""
    from dataclasses import asdict

    from testbed.tasks.task import describe

    found = describe()
    lines = []
    for task in found:
        settings = ", ".join(f"{k}={v}" for k, v in task.parameters.items())
        lines.append(f"{task.name:<10} {task.summary}" + (f"\n           {settings}" if settings else ""))
    return {"tasks": [asdict(task) for task in found]}, "\n".join(lines), 0


@cli.group(invoke_without_command=True)
@click.pass_context
@click.option("--json", "want_json", is_flag=True, help="Print one JSON object.")
def models(context: click.Context, want_json: bool) -> None:
    """List the named models (any hub id, directory or GGUF file works too)."""
    if context.invoked_subcommand is not None:
        return
    from testbed.models.sources import available

    found = available()
    rows = [
        [m.name, "ready" if m.fetched else f"testbed models fetch {m.name}", m.description] for m in found
    ]
    value = {"models": [{"name": m.name, "fetched": m.fetched, "description": m.description} for m in found]}
    click.echo(json.dumps(value, indent=2) if want_json else table(rows, ["model", "state", "what it is"]))


@models.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Download model NAME and convert it once into the cache."""
    from testbed.models.sources import fetch as fetch_model

    source = fetch_model(name)
    click.echo(f"{source.name} is in {source.path}")


@cli.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--where", help="Only rows for which this holds, such as 'profile==\"5g-mid\"'.")
def plot(path: Path, figures: tuple[str, ...], where: str | None) -> None:
    """Draw a run's figures anew, from its directory alone."""
    import analysis

    click.echo(f"summary   {analysis.write_summary(path)}")
    for figure in analysis.draw(path, list(figures) or None, where):
        click.echo(f"plot      {figure}")


if __name__ == "__main__":
    main()
