"""Networks that repeat themselves, from a few words: a line, a star, and edges that share a bottleneck.

    kind: line                       n1 ═ n2 ═ n3 ═ …            links n1-n2, n2-n3, …; up: towards the higher number
    nodes: 10
    profile: wan

    kind: star                       n1 ═╗                       links n1-hub, n2-hub, …; up: towards the hub
    nodes: 100                       n2 ═╬═ hub                  `nodes` counts the hub, too
    profile: 5g-mid                  n3 ═╝

    kind: shared-bottleneck          edge1 ═╗                    links access-1, access-2, … and bottleneck;
    nodes: 12                        edge2 ═╬═ router ═ cloud    up: towards the cloud; `nodes` counts router and cloud, too
    profile: 5g-good                 edge3 ═╝
    bottleneck: "rate=60mbit,delay=5ms"

`profile` is every link's; ``profiles: {n3-hub: lte}`` puts some under others. ``congestion`` is every link's congestion
control; ``pcap: [n3-hub]`` names links whose packets are captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from testbed import strict_yaml
from testbed.errors import SpecError
from testbed.strict_yaml import did_you_mean

MAX_NODES = 1000

Listed = tuple[list[str], list[tuple[str, str, str]]]
"""Names of nodes, and links as (name, a, b)."""


def line(nodes: int) -> Listed:
    """n1 - n2 - n3 - …"""
    names = [f"n{number}" for number in range(1, nodes + 1)]
    return names, [(f"{a}-{b}", a, b) for a, b in itertools.pairwise(names)]


def star(nodes: int) -> Listed:
    """A hub, and everybody else on a link of its own to it."""
    leaves = [f"n{number}" for number in range(1, nodes)]
    return ["hub", *leaves], [(f"{leaf}-hub", leaf, "hub") for leaf in leaves]


def shared_bottleneck(nodes: int) -> Listed:
    """Edges on access links of their own to a router, from which one link leads to the cloud."""
    edges = [f"edge{number}" for number in range(1, nodes - 1)]
    access = [(f"access-{number}", edge, "router") for number, edge in enumerate(edges, 1)]
    return [*edges, "router", "cloud"], [*access, ("bottleneck", "router", "cloud")]


KINDS: dict[str, tuple[Callable[[int], Listed], int]] = {
    "line": (line, 2),
    "star": (star, 2),
    "shared-bottleneck": (shared_bottleneck, 3),
}
"""Name -> the shape, and the fewest nodes it has."""

KEYS = {"name", "kind", "nodes", "profile", "bottleneck", "profiles", "congestion", "pcap", "ipv6"}


def unfold(value: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with every node and link listed, as `topology_from` takes it. Raises SpecError."""
    strict_yaml.mapping(value, "", KEYS, {"kind", "nodes", "profile"})
    kind = strict_yaml.text(value["kind"], "kind")
    if kind not in KINDS:
        raise SpecError(f"kind: unknown kind {kind[:40]!r}{did_you_mean(kind, list(KINDS))}")
    shape, least = KINDS[kind]
    names, links = shape(strict_yaml.whole(value["nodes"], "nodes", least, MAX_NODES))
    profiles = _profiles(value, kind, [name for name, _, _ in links])
    common = {key: value[key] for key in ("congestion",) if key in value}
    captured = _captured(value, [name for name, _, _ in links])
    listed = [
        {"name": name, "a": a, "b": b, "profile": profiles.get(name, value["profile"]), **common}
        | ({"pcap": True} if name in captured else {})
        for name, a, b in links
    ]
    rest = {key: value[key] for key in ("name", "ipv6") if key in value}
    return {"nodes": names, "links": listed, **rest}


def _captured(value: Mapping[str, Any], known: list[str]) -> set[str]:
    names = {strict_yaml.text(name, "pcap") for name in strict_yaml.items(value.get("pcap", []), "pcap")}
    for name in sorted(names.difference(known)):
        raise SpecError(f"pcap: no link {name[:40]!r}{did_you_mean(name, known)}")
    return names


def _profiles(value: Mapping[str, Any], kind: str, known: list[str]) -> dict[str, Any]:
    given = value.get("profiles", {})
    if not isinstance(given, Mapping):
        raise SpecError("profiles: expected a mapping of links' names to profiles")
    for name in given:
        if name not in known:
            raise SpecError(f"profiles: no link {str(name)[:40]!r}{did_you_mean(str(name), known)}")
    if "bottleneck" in value:
        if kind != "shared-bottleneck":
            raise SpecError(f"bottleneck: a {kind} has none")
        if "bottleneck" in given:
            raise SpecError("profiles.bottleneck: given as bottleneck, too")
        return {"bottleneck": value["bottleneck"], **given}
    return dict(given)
