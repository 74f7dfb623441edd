"""What chance has in store for a packet before it travels: a short chain, one impairment a file.

    duplication ─ loss (or a mark) ─ corruption ─ reordering ─ delay (with jitter) ▶ the bottleneck

A new one is a file with an `Impairment` in it (`contract`), and a line in `IMPAIRMENTS`.
"""

from __future__ import annotations

from testbed.net.emulators.relay.impairments.contract import Context, Impairment, Onward
from testbed.net.emulators.relay.impairments.corruption import corruption
from testbed.net.emulators.relay.impairments.delay import delay
from testbed.net.emulators.relay.impairments.duplication import duplication
from testbed.net.emulators.relay.impairments.loss import loss
from testbed.net.emulators.relay.impairments.reordering import reordering

IMPAIRMENTS: tuple[Impairment, ...] = (duplication, loss, corruption, reordering)
"""In the order in which a packet meets them, which is tc-netem(8)'s."""


def chain(context: Context) -> Onward | None:
    """What takes a packet; None where all travel equally long and nothing else happens to any."""
    onward = travelling = delay(context)
    for impairment in reversed(IMPAIRMENTS):
        onward = impairment(context, onward)
    conditions = context.conditions
    steady = conditions.jitter_table is None and conditions.schedule is None
    return None if steady and onward is travelling else onward
