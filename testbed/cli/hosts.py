"""Real hosts: `testbed hosts TOPOLOGY`, `testbed hosts install TOPOLOGY`."""

from __future__ import annotations

from typing import Any, cast

import click

from testbed.cli import completion
from testbed.cli.parts import as_json, table


class _Look(click.Group):
    """A group whose first argument may be a topology: then it is looked at."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["look", *args]
        return super().parse_args(context, args)


@click.group(cls=_Look, subcommand_metavar="TOPOLOGY | install TOPOLOGY")
def hosts() -> None:
    """Look at the hosts of TOPOLOGY, or put this very testbed there."""


@hosts.command(hidden=True)
@click.argument("topology", shell_complete=completion.topologies)
@as_json
def look(topology: str) -> Any:
    """Say what each host of TOPOLOGY can and cannot do, and what lies between them: `testbed hosts TOPOLOGY`."""
    from testbed.experiment import hosts as real
    from testbed.net.topology.files import load_topology

    looked, paths = real.examine(load_topology(topology))
    rows = [[one.node.name, f.what, _mark(f.ok, f.needed), f.detail] for one in looked for f in one.findings]
    rows += [
        [path.link, " to ".join(path.ends), _mark(p.ok, p.needed), p.detail]
        for path in paths
        for p in (path.finding,)
    ]
    findings = [f for one in looked for f in one.findings] + [path.finding for path in paths]
    missing = [f for f in findings if f.needed and not f.ok]
    value = {
        "nodes": {
            one.node.name: {
                "host": str(one.node.host),
                "findings": [vars(f) for f in one.findings],
                "survey": one.found,
            }
            for one in looked
        },
        "paths": [
            {
                "link": path.link,
                "from": path.ends[0],
                "to": path.ends[1],
                **vars(path.finding),
                **path.measured,
            }
            for path in paths
        ],
        "ok": not missing,
    }
    return value, table(rows, ["node or link", "what", "", "detail"]), 1 if missing else 0


def _mark(ok: bool, needed: bool) -> str:
    return "yes" if ok else ("MISSING" if needed else "no")


@hosts.command()
@click.argument("topology", shell_complete=completion.topologies)
@click.option(
    "--offline", is_flag=True, help="For hosts that reach no package index: wheels are downloaded here."
)
def install(topology: str, offline: bool) -> int:
    """Put this very testbed, with the versions of constraints.txt, into the environment of each node's `python:`."""
    from testbed import __version__
    from testbed.errors import TestbedError
    from testbed.experiment import hosts as real
    from testbed.hosts.installing import Installation
    from testbed.net.topology.files import load_topology

    failed = 0
    places = {(node.host, node.python): node for node in real.real(load_topology(topology))}
    for (address, python), node in places.items():
        if address is None or address.local:
            click.echo(f"{node.name}: is this machine, whose testbed this is")
            continue
        try:
            with real.reached(node) as host:
                done = Installation(host, node.name, python, _tell).run(offline)
            click.echo(f"{node.name}: testbed {__version__}, this very one, in {done['testbed']['path']}")
        except TestbedError as error:
            failed += 1
            click.echo(f"testbed: {error!s}".replace("\n", " "), err=True)
    return 1 if failed else 0


def clean(topology: str) -> tuple[list[str], int]:
    """Remove what lost connections left on the hosts of a topology: what that was, and how many hosts could not be cleaned."""
    from testbed.errors import TestbedError
    from testbed.experiment import hosts as real
    from testbed.hosts.local import Local
    from testbed.hosts.ssh import Ssh
    from testbed.net.real import shaping
    from testbed.net.topology.files import load_topology

    removed, failed = [], 0
    loaded = load_topology(topology)
    places = {node.host: node for node in real.real(loaded)}
    shaping_hosts = {node.host for node in loaded.nodes if node.name in {link.shape for link in loaded.links}}
    for address, node in places.items():
        if address is None:
            continue
        try:
            if not address.local:  # what runs on this machine ends with who started it
                with real.reached(node) as host:
                    removed += cast(Ssh, host).clean(sent=True)
                    if address in shaping_hosts:
                        removed += _unshaped(node.name, shaping.clean(host))
            elif address in shaping_hosts:
                removed += _unshaped(node.name, shaping.clean(Local()))
        except TestbedError as error:
            failed += 1
            _tell(f"testbed: {node.name}: {error}".replace("\n", " "))
    return removed, failed


def _unshaped(node: str, interfaces: list[str]) -> list[str]:
    return [f"{node}: {interface} was shaped by a run that is dead" for interface in interfaces]


def _tell(text: str) -> None:
    click.echo(text, err=True)
