"""What there is: `testbed doctor`, `profiles`, `codecs`, `tasks`, `models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, require_root, sentences, table


@click.command()
@click.option(
    "--links",
    is_flag=True,
    help="Measure what rates this machine's links carry, and keep it. Takes about a minute; nothing else should run.",
)
@click.option(
    "--lanes",
    type=click.IntRange(1, 64),
    is_flag=False,
    flag_value=8,
    metavar="[N]",
    help="Measure how many lanes, up to N [8], this machine carries, and keep it. Takes minutes; nothing else should run.",
)
@as_json
def doctor(links: bool, lanes: int | None) -> Any:
    """Say what this machine can and cannot do."""
    from testbed.experiment.environment import examine, measure_capacity, measure_lanes

    if links:
        require_root()
        measure_capacity(lambda line: click.echo(line, err=True))
    steps: list[dict[str, Any]] = []
    if lanes is not None:
        require_root()
        measured = measure_lanes(lambda line: click.echo(line, err=True), lanes)
        from msgspec import structs

        steps = [{**structs.asdict(step), "ok": step.ok} for step in measured.steps]
    findings = examine()
    rows = [[f.what, "yes" if f.ok else ("MISSING" if f.needed else "no"), f.detail] for f in findings]
    missing = [f for f in findings if f.needed and not f.ok]
    value = {"findings": [vars(f) for f in findings], "ok": not missing}
    if steps:
        value["lanes"] = steps
    return value, table(rows, ["what", "", "detail"]), 1 if missing else 0


@click.command()
@click.argument("catalogue", type=click.Path(path_type=Path), required=False)
@as_json
def profiles(catalogue: Path | None) -> Any:
    """List the links' presets; or, as profiles to write, those of another testbed's CATALOGUE (6G-Testbed's profiles.yaml)."""
    from testbed.net.profile.catalogue import read_catalogue
    from testbed.net.profile.profile import PRESETS

    listed = PRESETS if catalogue is None else read_catalogue(catalogue)
    presets = [
        {"name": name, "up": str(preset.up), "down": str(preset.down), "source": preset.source}
        for name, preset in listed.items()
    ]
    rows = [list(preset.values()) for preset in presets]
    return {"profiles": presets}, table(rows, ["profile", "up", "down", "source"]), 0


@click.command()
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
        if method.unavailable:
            lines.append(f"           not available here: {method.unavailable}")
    return {"methods": [asdict(m) for m in methods]}, sentences("\n".join(lines)), 0


@click.command()
@as_json
def tasks() -> Any:
    """List the tasks."""
    from dataclasses import asdict

    from testbed.tasks.task import describe

    known = describe()
    lines = []
    for task in known:
        settings = ", ".join(f"{k}={v}" for k, v in task.parameters.items())
        lines.append(f"{task.name:<10} {task.summary}" + (f"\n           {settings}" if settings else ""))
    return {"tasks": [asdict(task) for task in known]}, sentences("\n".join(lines)), 0


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--json", "want_json", is_flag=True, help="Print one JSON object.")
def models(context: click.Context, want_json: bool) -> None:
    """List the named models (any hub id, directory or GGUF file works too)."""
    if context.invoked_subcommand is not None:
        return
    from testbed.models.sources import available

    known = available()
    rows = [
        [m.name, "ready" if m.fetched else f"testbed models fetch {m.name}", m.description] for m in known
    ]
    value = {"models": [{"name": m.name, "fetched": m.fetched, "description": m.description} for m in known]}
    click.echo(json.dumps(value, indent=2) if want_json else table(rows, ["model", "state", "what it is"]))


@models.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Download model NAME and convert it once into the cache."""
    from testbed.models.fetching import fetch as fetch_model

    source = fetch_model(name)
    click.echo(f"{source.name} is in {source.path or 'the hub cache'}")
