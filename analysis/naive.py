"""How wrong bytes ÷ bandwidth is: what a payload takes against what the formula says, and whether it changes which setting wins.

The formula stands for opening the connection and sending the payload: `naive_s`, the payload's bits over the link's (mean) rate.
Sent over the emulated link, the same took `connect_s` and the time at work on the transmission, with a handshake, slow start,
headers, loss and the way itself in it. Links without a rate have no formula and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from testbed import stats
from testbed.analysis import settings
from testbed.analysis.describe import counted, megabytes
from testbed.analysis.names import short
from testbed.analysis.paired_latency import compared
from testbed.analysis.run import Run
from testbed.experiment.row import SENDING


@dataclass(frozen=True)
class Error:
    """One setting on one link: seconds that its payload took and that the formula says (medians), and the median of the
    examples' ratios.
    """

    panel: str
    setting: str
    placement: str
    codec: str
    payload_bytes: float
    real_s: float
    naive_s: float
    ratio: stats.Estimate


@dataclass(frozen=True)
class Choice:
    """On one link the fastest setting as it was measured, and as the formula has it; how much longer (median of the examples'
    ratios) the formula's takes; medians (s) of what the fastest takes, what the formula promises and what its choice takes.
    `apart`: in so many of `n` examples, each alone, the two differ. `held`: the settings are those that hold the quality;
    False: the rows have none.
    """

    panel: str
    measured: str
    named: str
    slower: stats.Estimate
    fastest_s: float
    promised_s: float
    takes_s: float
    apart: int
    n: int
    held: bool


def real_s(rows: pd.DataFrame) -> pd.Series[float]:
    """What the formula stands for, as it was measured: the handshake and the whole time at work on the transmission."""
    return rows["connect_s"] + rows["busy_transmit_s"]


def naive_latencies(rows: pd.DataFrame) -> pd.Series[float]:
    """The rows' latency if the link were as the formula says. What the formula leaves away shortens a request by as much as no
    other stage hid of it, and never by more.
    """
    exposed = rows["connect_s"] + rows["transmit_s"]
    return settings.latencies(rows) - np.minimum(exposed, real_s(rows) - rows["naive_s"])


def errors(run: Run) -> list[Error]:
    """Every setting that crosses, link by link."""
    found = []
    for panel, rows in _known(run):
        for setting, own in rows[rows["payload_bytes"] > 0].groupby("setting", sort=False):
            ratio = stats.median(real_s(own) / own["naive_s"], settings.clusters(own))
            found.append(
                Error(
                    panel,
                    str(setting),
                    str(own["placement"].iloc[0]),
                    str(own["codec"].iloc[0]),
                    float(own["payload_bytes"].median()),
                    float(real_s(own).median()),
                    float(own["naive_s"].median()),
                    ratio,
                )
            )
    return found


def choices(run: Run) -> list[Choice]:
    """Which setting wins on each link where at least two hold the quality, by measurement and by the formula."""
    return [choice for panel, rows in _known(run) if (choice := _choice(panel, rows)) is not None]


def left_out(run: Run) -> list[str]:
    """The links without a rate, for which there is no formula."""
    known = {panel for panel, _ in _known(run)}
    crossing = ((p, rows) for p, rows in settings.panels(run.rows) if (rows["payload_bytes"] > 0).any())
    return [panel for panel, _ in crossing if panel not in known]


def _known(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    """The finished rows of each link that has a rate."""
    for panel, rows in settings.panels(run.rows):
        own = rows[rows["naive_s"].notna()]
        if (own["payload_bytes"] > 0).any():
            yield panel, own


def _choice(panel: str, rows: pd.DataFrame) -> Choice | None:
    measured = settings.measured(rows)
    full = settings.full_cache_quality(rows)
    held = full == full
    able = [m.label for m in (settings.holding(measured, full) if held else measured)]
    rows = rows[rows["setting"].isin(able)]
    table = rows.assign(
        _real=settings.latencies(rows), _formula=naive_latencies(rows), _of=settings.clusters(rows)
    )
    # Both by the examples that all of these settings have, repeats by their median.
    alike = table.groupby(["_of", "setting"], sort=False)
    real = alike["_real"].median().unstack("setting").dropna()
    formula = alike["_formula"].median().unstack("setting").reindex(index=real.index, columns=real.columns)
    if real.empty or real.shape[1] < 2:
        return None
    names = [str(name) for name in real.columns]
    first, named = (int(np.argmin(side.median().to_numpy())) for side in (real, formula))
    taken, said = real.to_numpy(), formula.to_numpy()
    return Choice(
        panel,
        names[first],
        names[named],
        compared(taken[:, named], taken[:, first])[0],
        fastest_s=float(np.median(taken[:, first])),
        promised_s=float(np.median(said[:, named])),
        takes_s=float(np.median(taken[:, named])),
        apart=int(np.sum(taken.argmin(axis=1) != said.argmin(axis=1))),
        n=len(taken),
        held=held,
    )


def sentence(run: Run) -> str:
    """What the run shows of the formula, in one sentence with n; empty where it shows nothing."""
    caches = [e for e in errors(run) if e.placement in SENDING and e.ratio.n]
    made = choices(run)
    if not caches:
        return ""
    low, high = min(caches, key=lambda e: e.ratio.value), max(caches, key=lambda e: e.ratio.value)
    names = short(e.setting for e in caches)
    links = counted(len({e.panel for e in caches}), "link")
    text = (
        f"A cache took {low.ratio.value:.2f} ({names[low.setting]} on {low.panel}) to {high.ratio.value:.2f} times "
        f"({names[high.setting]} on {high.panel}) what bytes ÷ bandwidth says ({len(caches)} medians over {links}, "
        f"n = {min(e.ratio.n for e in caches)} examples each)"
    )
    if not made:
        return f"{text}."
    wrong = [choice for choice in made if choice.named != choice.measured]
    apart, n = sum(c.apart for c in made), sum(c.n for c in made)
    text += f"; the formula names another fastest setting on {len(wrong)} of {counted(len(made), 'link')}"
    if wrong:
        worst = max(wrong, key=lambda c: c.slower.value)
        text += f", one that takes up to {worst.slower.text()} times as long ({worst.panel})"
    return f"{text}, and in {apart} of {n} examples on these links."


def text(run: Run) -> str:
    """The table for people: a block a link, then which setting wins; empty where no link has a rate."""
    found, blocks = errors(run), []
    names = short((e.setting for e in found), 60)
    wide = max([len(name) for name in names.values()] + [7])
    won = {choice.panel: choice for choice in choices(run)}
    for panel in dict.fromkeys(e.panel for e in found):
        head = (
            f"  {'setting':<{wide}}  {'payload':>9}  {'formula':>9}  {'measured':>9}  {'ratio':>24}  {'n':>4}"
        )
        lines = [
            f"  {names[e.setting]:<{wide}}  {megabytes(e.payload_bytes):>9}  {e.naive_s:>7.3f} s  {e.real_s:>7.3f} s"
            f"  {e.ratio.text():>24}  {e.ratio.n:>4}"
            for e in found
            if e.panel == panel
        ]
        blocks.append("\n".join([panel, head, *lines, *([_won(won[panel])] if panel in won else [])]))
    without = left_out(run)
    notes = [f"no rate, so no formula: {', '.join(without)}"] if without else []
    said = sentence(run)
    return "\n\n".join([*blocks, "\n".join([*([said] if said else []), *notes])]).strip()


def _won(choice: Choice) -> str:
    if choice.named == choice.measured:
        who = f"  both name {choice.named}"
    else:
        who = (
            f"  fastest: {choice.measured}; the formula names {choice.named}: {choice.promised_s:.3f} s, and it takes "
            f"{choice.takes_s:.3f} s, {choice.slower.text()} times the fastest"
        )
    alone = f"; apart in {choice.apart} of {choice.n} examples"
    return who + alone + ("" if choice.held else "; of all settings, since no quality is known")


def frame(run: Run) -> pd.DataFrame:
    """A line for each link and setting that crosses."""
    won = {choice.panel: choice for choice in choices(run)}
    lines: list[dict[str, Any]] = []
    for e in errors(run):
        choice = won.get(e.panel)
        lines.append(
            {
                "link": e.panel,
                "setting": e.setting,
                "n": e.ratio.n,
                "payload_bytes": e.payload_bytes,
                "naive_s": e.naive_s,
                "real_s": e.real_s,
                "ratio": e.ratio.value,
                "ratio_lo": e.ratio.low,
                "ratio_hi": e.ratio.high,
                "fastest": choice.measured if choice else "",
                "formula_names": choice.named if choice else "",
            }
        )
    return pd.DataFrame(lines)


def write(run: Run) -> Path | None:
    """Write ``naive_error.csv``, of requests made one behind the other; None where there are none, or no link has a rate."""
    run = run.alone
    lines = frame(run) if len(run.rows) else pd.DataFrame()
    if lines.empty:
        return None
    return run.write("naive_error.csv", lambda to: lines.to_csv(to, index=False, float_format="%.6g"))
