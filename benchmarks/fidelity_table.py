"""The tables of `link_fidelity`: a line for each measurement, and the worst of each beside what is to be reached."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from testbed.net.calibration.checks import clopper_pearson
from testbed.net.profile.loss import GilbertElliott

WAYS = ("up", "down")
PARTS = ("cells", "bursts", "traces", "tcp")


def merge(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What several runs said, one for each emulator, idle and busy. A profile measured twice counts as it was last. Raises
    ValueError for what no run said."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for part in parts:
        if not isinstance(part, dict) or not {"emulator", "busy"} <= set(part):
            raise ValueError("this is not what --json prints")
        key = (part["emulator"], part["busy"])
        one = found.setdefault(key, {"emulator": key[0], "busy": key[1]})
        for kind in PARTS:
            for row in part.get(kind, ()):
                one.setdefault(kind, {})[row["profile"]] = row
    return [
        {k: list(v.values()) if isinstance(v, dict) else v for k, v in one.items()} for one in found.values()
    ]


def burst_errors(model: GilbertElliott, n: int) -> dict[str, float]:
    """Standard errors of mean loss and mean burst of *n* packets, as fractions. Bursts are runs of the bad state.

    The bad state is as good as a coin with memory p + r: its count's variance is that of *n* tosses times (2 - p - r) / (p + r).
    A burst is geometric.
    """
    mean, change = model.mean, model.p + model.r
    losses = math.sqrt((1 - mean) / (mean * n) * (2 - change) / change)
    lengths = math.sqrt(1 - model.r) / math.sqrt(n * mean * model.r)
    return {"loss": losses, "burst": lengths}


def line(part: str, row: dict[str, Any]) -> str:
    """One measurement: the worse way of each figure, or both."""
    return {"cells": _cell, "bursts": _bursts, "traces": _trace, "tcp": _tcp}[part](row)


def report(found: dict[str, Any]) -> str:
    """What the measurements of one emulator come to."""
    lines = [f"emulator {found['emulator']}, {'every core busy' if found['busy'] else 'idle'}"]
    if cells := found.get("cells"):
        lines += ["  worst of a rate's cells, both ways:"]
        lines += [
            f"  {'rate asked':>12} {'measured':>14} {'rate error':>11} {'p50 over':>11} {'p99 over':>11}   loss outside of its "
            "99 % interval"
        ]
        rates = sorted({row["rate_bps"] or math.inf for row in cells})
        groups = [
            (f"{r / 1e6:g} Mbit/s", [c for c in cells if (c["rate_bps"] or math.inf) == r]) for r in rates
        ]
        lines += [_group(name, group) for name, group in [*groups, ("all", cells)]]
        lines += _pooled(cells)
    lines += [f"  {_bursts(row)}" for row in found.get("bursts", ())]
    lines += [f"  {_trace(row)}" for row in found.get("traces", ())]
    if flows := found.get("tcp"):
        lines += [f"  {_tcp(row)}" for row in flows]
        lines.append(
            f"  least share of rate x 1448/1500: {min(row['share'] for row in flows):.4f} of {len(flows)} flows"
        )
    return "\n".join(lines)


def worst(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    """The value furthest from 0 among all ways; None: there is none."""
    values = [row[way][key] for row in rows for way in WAYS if row[way][key] is not None]
    return max(values, key=abs) if values else None


def _shown(value: float | None, scale: float, unit: str) -> str:
    return "-" if value is None else f"{scale * value:+.3f}{unit}"


def _cell(row: dict[str, Any]) -> str:
    rate = _shown(worst([row], "rate_error"), 100, "%")
    p50, p99 = (_shown(worst([row], key), 1e3, "ms") for key in ("p50_over_s", "p99_over_s"))
    losses = " / ".join(
        ("-" if row[w]["loss"] is None else f"{100 * row[w]['loss']:.2f}%")
        + ("" if row[w]["loss_ok"] else " (out)")
        for w in WAYS
    )
    return f"{row['profile']:42} rate {rate:>8}  p50 {p50:>9}  p99 {p99:>9}  loss {losses}  {row['cause']}"


def _group(name: str, rows: list[dict[str, Any]]) -> str:
    ways = [row[way] for row in rows for way in WAYS]
    out = sum(way["loss_ok"] is False for way in ways)
    rate = _shown(worst(rows, "rate_error"), 100, "%")
    p50, p99 = (_shown(worst(rows, key), 1e3, "ms") for key in ("p50_over_s", "p99_over_s"))
    return f"  {name:>12} {_measured(ways):>14} {rate:>11} {p50:>11} {p99:>11}   {out} of {len(ways)}"


def _measured(ways: list[dict[str, Any]]) -> str:
    """From the least to the most, in Mbit/s; of several rates nothing, and of records without them."""
    rates = [way.get("rate_bps") for way in ways]
    known = [rate / 1e6 for rate in rates if rate is not None]
    if not known or max(known) > 2 * min(known):
        return ""
    return f"{min(known):.4g} - {max(known):.4g}"


def _pooled(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    ways = [row[way] for row in rows for way in WAYS if row[way]["loss"] is not None]
    for asked in sorted({way["loss_asked"] for way in ways}):
        those = [way for way in ways if way["loss_asked"] == asked]
        n = sum(way["n"][2] for way in those)
        lost = round(sum(way["loss"] * way["n"][2] for way in those))
        low, high = clopper_pearson(lost, n)
        lines.append(
            f"  asked to lose {100 * asked:g}%, all together: {100 * lost / n:.3f}% of {n} "
            f"(99 % interval {100 * low:.3f} to {100 * high:.3f})"
        )
    return lines


def _bursts(row: dict[str, Any]) -> str:
    errors, said = row["errors"], []
    for way in WAYS:
        one = row[way]
        loss, burst = (one[key] / row[f"{key}_asked"] - 1 for key in ("loss", "burst"))
        said.append(
            f"{way} loss {100 * one['loss']:.3f}% ({100 * loss:+.1f}%) burst {one['burst']:.3f} ({100 * burst:+.1f}%)"
        )
    n = min(row[way]["n"] for way in WAYS)
    return (
        f"{row['profile']}: {', '.join(said)}; n={n} each, standard errors {100 * errors['loss']:.1f}% "
        f"and {100 * errors['burst']:.1f}%"
    )


def _trace(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"{row['profile']}: {row['refused']}"
    said = [
        f"{way} correlation {row[way]['correlation']:.5f} total {100 * row[way]['total_error']:+.2f}%"
        for way in WAYS
        if way in row and row[way]["correlation"] is not None
    ]
    return f"{row['profile']}: {', '.join(said)}, {row['seconds']:g} s in parts of 0.1 s"


def _tcp(row: dict[str, Any]) -> str:
    ramp = "never" if row["ramp_s"] is None else f"{row['ramp_s']:.1f} s"
    return (
        f"{row['profile']:30} {row['share']:.4f} of rate x 1448/1500 after {row['start_up_s']:.1f} s, first full after {ramp}; "
        f"{row['congestion']}, {row['dropped']} dropped by the queue, lateness {1e3 * row['lateness_s']:.2f} ms"
    )
