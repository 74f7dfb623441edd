"""Networks for programs of one's own: `testbed up`, `ls`, `exec`, `show`, `set`, `link`, `down`; and `clean`."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import click

from testbed.cli import completion
from testbed.cli.parts import (
    EMULATORS,
    as_json,
    link_option,
    require_root,
    rootless_option,
    sentences,
    table,
)
from testbed.errors import UsageError


@click.command()
@click.argument("topology", shell_complete=completion.topologies)
@link_option
@click.option("--emulator", type=EMULATORS, default="auto", show_default=True)
@click.option(
    "--captures",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where packets of links with `pcap: true` go.",
)
@click.option("--name", default="", help="What to call it beside its id; --id takes either.")
@rootless_option
@as_json
def up(topology: str, links: dict[str, str], emulator: str, captures: Path | None, name: str) -> Any:
    """Build TOPOLOGY and leave it standing, for `testbed exec` and your own programs.

    With --rootless it stands for as long as the shell that opens then, in which `testbed exec`, show and down work; for a
    script, write the commands to its standard input.
    """
    from testbed.experiment.environment import beyond_capacity
    from testbed.hosts import rootless
    from testbed.hosts.processes import interruptible
    from testbed.net.fabric import fabric, removal
    from testbed.net.fabric.description import describe
    from testbed.net.profile.profile import parse_profile
    from testbed.net.topology.files import load_topology

    loaded = load_topology(topology)
    given = {name: parse_profile(profile) for name, profile in links.items()}
    require_root()
    for remark in beyond_capacity(loaded.with_profiles(given), emulator):
        click.echo(f"testbed: {remark}", err=True)
    with interruptible():
        try:
            network = fabric.up(loaded, given, emulator, captures, name)
            described = describe(network)
        except BaseException:  # whoever interrupts it has not seen its name
            removal.remove_own()
            raise
    if rootless.inside():
        click.echo(_network_text(described), err=True)
        click.echo("testbed exec NODE -- COMMAND runs a program in it; it ends with this shell", err=True)
        subprocess.run([os.environ.get("SHELL") or "/bin/sh"], check=False)
        return described, f"network {described['id']} is gone", 0
    hint = "testbed exec NODE -- COMMAND runs a program in it; testbed down removes it"
    return described, f"{_network_text(described)}\n\n{hint}", 0


def _network_text(described: dict[str, Any]) -> str:
    called = f"{described['name']}  {described['id']}" if described["name"] else described["id"]
    lines = [f"{called}  {described['topology']}  ({described['emulator']})"]
    for node in described["nodes"]:
        addresses = ", ".join(
            " ".join(filter(None, (end["interface"], end["address"], end.get("address6"))))
            for end in node["addresses"]
        )
        lines.append(f"  node {node['name']:<12} {addresses:<28} namespace {node['namespace']}")
    for link in described["links"]:
        lines.append(
            f"  link {link['name']:<12} {link['a']} - {link['b']}: {link['profile']}"
            + (f", in cell {link['cell']}" if link["cell"] else "")
        )
        for way, counted in (link["counters"] or {}).items():
            lines.append(f"       {way:<5} {_counted(counted)}")
    lines += [f"  cell {name:<12} {scheduler}" for name, scheduler in described["cells"].items()]
    if described["problems"]:
        lines += [f"  broken: {problem}" for problem in described["problems"]]
        lines.append("  remove the rest with `sudo testbed down`")
    return sentences("\n".join(lines))


def _counted(counters: dict[str, float]) -> str:
    """What passed, and whatever else is not nothing."""
    parts = [f"{counters.get('packets', 0)} packets", f"{counters.get('bytes', 0)} bytes"]
    parts += [f"{counters['rate_bps'] / 1e6:.3g} Mbit/s"] if "rate_bps" in counters else []
    parts += [
        f"{key.removesuffix('_s').replace('_', ' ')} "
        + (f"{value * 1e3:.2f} ms" if key.endswith("_s") else f"{value}")
        for key, value in counters.items()
        if value and key not in ("packets", "bytes", "recent_lateness_s", "rate_bps")
    ]
    return ", ".join(parts)


@click.command(
    name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--id", "identifier", help="Which network, where several stand: its id or name.")
@click.argument("node", shell_complete=completion.nodes)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(identifier: str | None, node: str, command: tuple[str, ...]) -> int:
    """Run COMMAND inside NODE of the network that `testbed up` built; node names resolve."""
    from testbed.net.fabric import state
    from testbed.net.fabric.execute import execute

    require_root()
    argv = command[1:] if command[0] == "--" else command  # which click keeps, behind an argument
    return execute(state.find(identifier), node, list(argv))


@click.command()
@click.option("--id", "identifier", help="Which network, where several stand: its id or name.")
@click.option(
    "--watch",
    type=click.FloatRange(0.1, 3600),
    is_flag=False,
    flag_value=1.0,
    metavar="[SECONDS]",
    help="Show it anew every so many seconds [1], with what crossed each link since, until Ctrl-C.",
)
@as_json
def show(identifier: str | None, watch: float | None) -> Any:
    """Show the network that stands: nodes, addresses, profiles, live counters. Exit status 1 where a part of it is gone."""
    from testbed.net.fabric import state
    from testbed.net.fabric.description import describe

    described = describe(state.find(identifier))
    if watch is not None:
        _watch(described, watch)
    return described, _network_text(described), 1 if described["problems"] else 0


def _watch(described: dict[str, Any], seconds: float) -> None:
    """Shows the network again and again, with each link's rates; returns where it is gone. Raises KeyboardInterrupt."""
    from testbed.net.fabric import state
    from testbed.net.fabric.description import describe

    identifier, before, then = described["id"], _crossed(described), time.monotonic()
    while True:
        click.clear()  # a terminal alone
        click.echo(_network_text(described))
        time.sleep(seconds)
        try:
            described = describe(state.find(identifier))
        except UsageError:
            return
        now, at = _crossed(described), time.monotonic()
        for link in described["links"]:
            for way, counted in (link["counters"] or {}).items():
                key = (link["name"], way)
                counted["rate_bps"] = 8 * (now[key] - before.get(key, now[key])) / (at - then)
        before, then = now, at


def _crossed(described: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Bytes by link and way."""
    return {
        (link["name"], way): counted["bytes"]
        for link in described["links"]
        for way, counted in (link["counters"] or {}).items()
    }


@click.command()
@as_json
def ls() -> Any:
    """List the networks of this machine: those that stand, those of runs at work, and what dead runs left."""
    from testbed.net.fabric import state

    networks = []
    for each in state.list_states():
        alive = state.is_alive(each)
        what = (
            "up"
            if each.persistent and alive
            else f"run (process {each.pid})"
            if alive
            else "dead: testbed clean"
        )
        topology = each.topology
        about = {"id": each.id, "name": each.name, "topology": topology.name, "emulator": each.emulator}
        size = {"nodes": len(topology.nodes), "links": len(topology.links)}
        networks.append({**about, **size, "state": what, "created_at": each.created_at})
    rows = [[str(value) for value in network.values()] for network in networks]
    header = ["id", "name", "topology", "emulator", "nodes", "links", "state", "since"]
    return (
        {"networks": networks},
        table(rows, header) if rows else "no network; testbed up TOPOLOGY makes one",
        0,
    )


@click.command(name="set")
@click.option("--id", "identifier", help="Which network, where several stand: its id or name.")
@click.argument(
    "changes", metavar="LINK=PROFILE...", nargs=-1, required=True, shell_complete=completion.changes
)
@as_json
def set_(identifier: str | None, changes: tuple[str, ...]) -> Any:
    """Put links of the network that stands under other profiles. Connections go on; traces begin now."""
    from testbed.net.fabric import standing, state
    from testbed.net.profile.profile import parse_profile

    wanted = {}
    for text in changes:
        name, equals, profile = text.partition("=")
        if not equals:
            raise UsageError(
                f"{text!r}: write LINK=PROFILE, such as access=lte or access=rate=20mbit,delay=30ms"
            )
        wanted[name] = parse_profile(profile)
    network = state.find(identifier)
    for name in wanted:
        network.topology.link_number(name)
    require_root()
    for name, chosen in wanted.items():
        network = standing.set_profile(network, name, chosen)
    set_now = {name: chosen.text() for name, chosen in wanted.items()}
    return {"id": network.id, "links": set_now}, "\n".join(f"{k}: {v}" for k, v in set_now.items()), 0


@click.command()
@click.option("--id", "identifier", help="Which network, where several stand: its id or name.")
@click.argument("state", type=click.Choice(["up", "down"]))
@click.argument("name", metavar="LINK|NODE", shell_complete=completion.links_and_nodes)
def link(identifier: str | None, state: str, name: str) -> None:
    """Take a link down, or all links of a node, or bring them up again, with addresses, neighbours and routes.

    Also brings up what `ip link set … down` took down inside a node: the kernel then forgets all of that.
    """
    from testbed.net.fabric import state as states
    from testbed.net.fabric import wiring

    require_root()
    network = states.find(identifier)
    for number in network.topology.links_named(name):
        wiring.set_link(network, number, state == "up")


@click.command()
@click.option("--id", "identifier", help="Which network, where several stand: its id or name.")
@click.argument("node", shell_complete=completion.nodes)
@click.argument("link", shell_complete=completion.links)
@click.option(
    "--outage", default="0s", show_default=True, help="How long the node is on no link, such as 200ms."
)
@click.option("--new-address", is_flag=True, help="Take the addresses that it had from the node.")
@as_json
def handover(identifier: str | None, node: str, link: str, outage: str, new_address: bool) -> Any:
    """Have NODE go over to its LINK, away from all others that it has, while connections are on.

    It keeps its addresses, as behind a mobile core, unless --new-address.
    """
    from testbed.net.fabric import state
    from testbed.net.fabric.handover import LONGEST_S, hand_over
    from testbed.units import parse_time

    seconds = parse_time(outage)
    if not 0 <= seconds <= LONGEST_S:
        raise UsageError(f"--outage {outage}: from 0s to {LONGEST_S:g}s")
    require_root()
    lasted_s = hand_over(state.find(identifier), node, link, seconds, keep_address=not new_address)
    return {"node": node, "link": link, "outage_s": lasted_s}, f"{node}: on {link} after {lasted_s:.3f} s", 0


@click.command()
@click.option("--id", "identifier", help="Which network, where several stand: its id or name.")
def down(identifier: str | None) -> None:
    """Remove the network that `testbed up` built."""
    from testbed.net.fabric import removal

    click.echo("\n".join(f"removed {what}" for what in removal.down(identifier)))


@click.command()
@click.argument("topology", required=False)
@as_json
def clean(topology: str | None) -> Any:
    """Remove whatever dead runs left: namespaces, processes, state files. Touches nothing that was not ours.

    With a TOPOLOGY whose nodes are hosts: what runs whose connection was lost left there. That needs no root.
    """
    from testbed.cli import hosts
    from testbed.net.fabric import removal

    if topology is not None:
        removed, failed = hosts.clean(topology)
        return (
            {"removed": removed, "failed": failed},
            "\n".join(removed) or "nothing to remove",
            min(failed, 1),
        )
    require_root()
    removed = removal.clean()
    return {"removed": removed}, "\n".join(f"removed {what}" for what in removed) or "nothing to remove", 0
