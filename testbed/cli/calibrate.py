"""`testbed calibrate`."""

from __future__ import annotations

from typing import Any

import click

from testbed.cli.parts import EMULATORS, as_json, require_root, table
from testbed.errors import UsageError


@click.command()
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
