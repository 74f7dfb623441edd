"""`testbed plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from testbed.cli import completion
from testbed.cli.parts import as_json, sentences, sweep_options, table

if TYPE_CHECKING:
    from testbed.experiment.borders import Border
    from testbed.experiment.scenario import Plan


@click.command()
@click.argument("scenario", shell_complete=completion.scenarios)
@sweep_options
@as_json
def plan(scenario: str, **changes: Any) -> Any:
    """Show what SCENARIO would run: cells, bytes, expected time. Needs no root and builds nothing."""
    from testbed.experiment.borders import borders
    from testbed.experiment.environment import too_much
    from testbed.experiment.estimate import Estimator
    from testbed.experiment.plan import load_plan
    from testbed.units import format_duration, format_size, format_time

    planned = load_plan(scenario, **changes)
    if planned.scenario.programs is not None:
        return _of_programs(planned)
    estimator = Estimator(planned)
    cells = estimator.summary()
    loaded = planned.scenario.loaded
    linked = not planned.scenario.placement_free
    seconds = sum(cell["trial_s"] * cell["trials"] for cell in cells)
    sent = sum(cell["payload_bytes"] * cell["trials"] for cell in cells)
    rows = [
        [
            f"{c['task']}@{c['context_tokens'] or 'own'}",
            c["placement"],
            c["codec"] or "-",
            c["delivery"],
            *([c["transport"], c["profile"]] if linked else []),
            format_size(c["payload_bytes"]),
            *(["unknown" if c["transmit_s"] is None else format_time(c["transmit_s"])] if linked else []),
            *([c["load"], c["serving"]] if loaded else []),
            *([c["allocate"]] if planned.scenario.allocate else []),
        ]
        for c in cells
    ]
    across = (["transport", "profile"], ["transmit"]) if linked else ([], [])
    header = ["task", "placement", "codec", "delivery", *across[0], "payload", *across[1]]
    header += ["load", "serving"] if loaded else []
    text = table(rows, header + (["allocate"] if planned.scenario.allocate else []))
    if loaded:
        names = ", ".join(map(str, planned.edges))
        text += f"\n\n{planned.trials} loads, about {format_duration(seconds)}; edges: {names}"
    else:
        text += f"\n\n{planned.trials} trials of {len(cells)} cells, "
        where = f"{format_size(sent)} across the link" if linked else "in one process, without a link"
        text += f"{where}, about {format_duration(seconds)}"
    if estimator.model is None:
        model = planned.scenario.models.cloud
        text += f"\nmodel {model}: no configuration at hand, so cache sizes are unknown"
    measured = any(profile.measured for profile in planned.profiles)  # of which nothing is known beforehand
    found = borders(estimator) if linked and not measured else []
    text += _borders(found)
    remarks = [remark for profile in planned.profiles for remark in profile.remarks()]
    remarks += [*planned.left_out, *too_much(planned)]
    text = sentences(text + "".join(f"\n{remark}" for remark in remarks))
    value = {
        "cells": cells,
        "borders": [asdict(border) for border in found],
        "trials": planned.trials,
        "bytes": sent,
        "seconds": seconds,
        "remarks": remarks,
    }
    return value, text, 0


def _of_programs(planned: Plan) -> Any:
    """Settings and links; how long a program takes nobody knows beforehand."""
    from testbed.experiment.environment import too_much
    from testbed.experiment.program_run import settings

    cells = [
        {"setting": each.label, "parameters": each.values, "profile": each.profile.name, "cell": each.cell}
        for each in settings(planned)
    ]
    rows = [
        [str(cell["setting"]) or "client", str(cell["profile"]), str(planned.scenario.repeats)]
        for cell in cells
    ]
    remarks = [remark for profile in planned.profiles for remark in profile.remarks()] + too_much(planned)
    text = (
        table(rows, ["setting", "profile", "trials"]) + f"\n\n{planned.trials} trials of {len(cells)} cells"
    )
    text = sentences(text + "".join(f"\n{remark}" for remark in remarks))
    return {"cells": cells, "trials": planned.trials, "remarks": remarks}, text, 0


def _borders(found: list[Border]) -> str:
    """From which rate on a cache is there before the text, and before the edge's own answer."""
    rows: dict[tuple[str, ...], list[Border]] = {}
    for each in found:
        about = (str(each.context_tokens), each.placement, each.codec, each.delivery)
        rows.setdefault(about, []).append(each)
    if not rows:
        return ""
    lines = [
        [*about, _rates([b.beats_text_bps for b in those]), _rates([b.beats_edge_bps for b in those])]
        for about, those in rows.items()
    ]
    said = (
        "\n\nfrom which rate of the link on a cache has the last token sooner (two rates: over the plan's shortest and longest "
        "round trip); a forecast, which a run measures\n"
    )
    header = ["context", "placement", "codec", "delivery", "than the text", "than the edge"]
    return said + table(lines, header)


def _rates(bps: list[float | None]) -> str:
    from testbed.units import format_rate

    said = [
        "never" if rate is None else f"{format_rate(float(f'{rate:.2g}'))}" if rate else "any" for rate in bps
    ]
    return " – ".join(dict.fromkeys(said))
