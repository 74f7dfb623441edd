"""What a shell offers behind a command: scenarios, runs, topologies, presets, and the nodes and links of networks that stand.

Whatever cannot be found out is not offered: a shell that completes says nothing of errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

_Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _offering(names: Callable[[], Iterator[str]], files: bool = False) -> _Offer:
    """Those of the names that begin as what is typed; files besides."""

    def offer(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        found: list[str] = []
        with contextlib.suppress(Exception):
            found = [name for name in dict.fromkeys(names()) if name.startswith(typed)]
        return [*map(CompletionItem, found), *([CompletionItem(typed, type="file")] if files else [])]

    return offer


def _scenarios() -> Iterator[str]:
    shipped = Path(__file__).parents[1] / "scenarios"
    for path in sorted(shipped.rglob("*.yaml")):
        if path.parent.name != "expected":
            yield str(path.relative_to(shipped).with_suffix(""))


def _runs() -> Iterator[str]:
    """Those in `results/`, the latest first."""
    found = [path.parent for path in Path("results").glob("*/manifest.json")]
    yield from map(str, sorted(found, key=lambda run: run.stat().st_mtime, reverse=True))


def _topologies() -> Iterator[str]:
    from testbed.net.topology.files import shipped_topologies

    yield from (path.stem for path in shipped_topologies())


def _presets() -> Iterator[str]:
    from testbed.net.profile.profile import PRESETS

    yield from PRESETS


def _nodes() -> Iterator[str]:
    from testbed.net.fabric.state import list_states

    yield from (node.name for network in list_states() for node in network.topology.nodes)


def _links() -> Iterator[str]:
    from testbed.net.fabric.state import list_states

    yield from (link.name for network in list_states() for link in network.topology.links)


def _changes() -> Iterator[str]:
    yield from (f"{link}={preset}" for link in _links() for preset in _presets())


def _links_and_nodes() -> Iterator[str]:
    yield from _links()
    yield from _nodes()


def _profiles_and_topologies() -> Iterator[str]:
    yield from _presets()
    yield from _topologies()


scenarios, runs = _offering(_scenarios, files=True), _offering(_runs, files=True)
topologies, presets = _offering(_topologies, files=True), _offering(_profiles_and_topologies, files=True)
nodes, links, links_and_nodes = _offering(_nodes), _offering(_links), _offering(_links_and_nodes)
changes = _offering(_changes)
