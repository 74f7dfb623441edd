"""`testbed calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.cli import completion
from testbed.cli.parts import EMULATORS, as_json, require_root, rootless_option, table
from testbed.errors import UsageError

if TYPE_CHECKING:
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.topology.topology import Topology


@click.command()
@click.argument("profiles", nargs=-1, metavar="PROFILE...|TOPOLOGY", shell_complete=completion.presets)
@click.option("--all", "every", is_flag=True, help="Every preset.")
@click.option(
    "--trace", "traces", multiple=True, metavar="FILE", help="A recorded link; options as in a profile."
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 600),
    default=8.0,
    show_default=True,
    help="How much of a trace is measured.",
)
@click.option("--busy", is_flag=True, help="Keep every core busy meanwhile.")
@click.option("--emulator", type=EMULATORS, default="auto", show_default=True)
@rootless_option
@as_json
def calibrate(
    profiles: tuple[str, ...], every: bool, traces: tuple[str, ...], seconds: float, busy: bool, emulator: str
) -> Any:
    """Build a link under each PROFILE, measure it, and print what was asked beside what was measured.

    With a TOPOLOGY file whose nodes are hosts: measure what lies between them, as it is. That needs no root.
    """
    from testbed.net.calibration import calibrate as calibration
    from testbed.net.calibration.calibrate import busy_cores
    from testbed.net.fabric.fabric import Fabric
    from testbed.net.profile.profile import PRESETS, parse_profile
    from testbed.net.profile.trace import is_trace
    from testbed.net.topology.files import load_topology

    if len(profiles) == 1 and Path(profiles[0]).suffix in (".yaml", ".yml"):
        return _told(_between_hosts(load_topology(profiles[0])), False)
    chosen = [parse_profile(text) for text in profiles] + (list(PRESETS.values()) if every else [])
    chosen += [parse_profile(text if is_trace(text) else f"trace:{text}") for text in traces]
    for profile in chosen:  # what cannot be read or measured is known before anything is built
        took = calibration.foretell(profile)
        for remark in [*profile.remarks(), *([f"{profile.name}: takes{took[1:]}"] if took else [])]:
            click.echo(f"testbed: {remark}", err=True)
    if not chosen:
        raise UsageError(
            "name at least one profile, a --trace, or --all; `testbed profiles` lists the presets"
        )
    require_root()
    measured = []
    with Fabric.build(load_topology("edge-cloud"), emulator) as fabric:
        link = fabric.topology.links[0].name
        for profile in chosen:
            fabric.settle(link)
            fabric.apply(link, profile)
            with busy_cores(busy):
                measured.append(calibration.calibrate(fabric, link, profile, stretch_s=seconds))
    return _told(measured, busy)


def _between_hosts(topology: Topology) -> list[Calibration]:
    """Every link between hosts, as it is."""
    from testbed.net.real.real import Real

    if topology.kind != "hosts":
        raise UsageError(
            f"topology {topology.name} is of namespaces, whose links are what a profile says: name the profile"
        )
    with Real.open(topology) as real:
        for link in topology.links:
            real.apply(link.name, link.profile)
        return [real.calibrate(link.name, link.profile) for link in topology.links]


def _told(measured: list[Calibration], busy: bool) -> tuple[dict[str, Any], str, int]:
    rows = []
    for result in measured:
        for check, line in zip(result.checks, result.lines(), strict=True):
            verdict = "-" if check.ok is None else "ok" if check.ok else "OUT"
            cells = [line["way"], line["what"], line["asked"], line["measured"], line["error"], verdict]
            rows.append([result.profile, *map(str, cells)])
    text = table(rows, ["profile", "way", "what", "asked", "measured", "off by", ""])
    text += "".join(f"\n{result.profile}: {result.cause}" for result in measured if not result.ok)
    noted = [cause for result in measured if result.ok for cause in result.attempts[-1].causes]
    text += "".join(f"\n{cause}" for cause in noted)
    value = {
        "emulator": measured[0].emulator,
        "busy": busy,
        "calibrations": [result.to_dict() for result in measured],
    }
    return value, text, 0 if all(result.ok for result in measured) else 1
