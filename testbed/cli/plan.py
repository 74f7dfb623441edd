"""`testbed plan`."""

from __future__ import annotations

from typing import Any

import click

from testbed.cli.parts import as_json, sweep_options, table


@click.command()
@click.argument("scenario")
@sweep_options
@as_json
def plan(scenario: str, **changes: Any) -> Any:
    """Show what SCENARIO would run: cells, bytes, expected time. Needs no root and builds nothing."""
    from testbed.experiment.estimate import Estimator
    from testbed.experiment.plan import load_plan
    from testbed.units import format_duration, format_size, format_time

    planned = load_plan(scenario, **changes)
    estimator = Estimator(planned)
    per_cell = planned.scenario.examples * planned.scenario.repeats
    cells = estimator.summary()
    seconds = sum(cell["trial_s"] for cell in cells) * per_cell
    sent = sum(cell["payload_bytes"] for cell in cells) * per_cell
    rows = [
        [
            f"{c['task']}@{c['context_tokens'] or 'own'}",
            c["placement"],
            c["codec"] or "-",
            c["delivery"],
            c["transport"],
            c["profile"],
            format_size(c["payload_bytes"]),
            format_time(c["transmit_s"]),
        ]
        for c in cells
    ]
    text = table(
        rows, ["task", "placement", "codec", "delivery", "transport", "profile", "payload", "transmit"]
    )
    text += f"\n\n{len(cells)} cells x {per_cell} = {planned.trials} trials, "
    text += f"{format_size(sent)} across the link, about {format_duration(seconds)}"
    if estimator.model is None:
        text += f"\nmodel {planned.scenario.model}: no configuration at hand, so cache sizes are unknown"
    remarks = [remark for profile in planned.profiles for remark in profile.remarks()]
    text += "".join(f"\n{remark}" for remark in remarks)
    value = {"cells": cells, "trials": planned.trials, "bytes": sent, "seconds": seconds, "remarks": remarks}
    return value, text, 0
