"""What chance has in store for a packet before it travels: a short chain, one impairment a file.

    duplication ─ loss (or a mark) ─ corruption ─ reordering ─ delay (with jitter) ▶ the bottleneck

A new one is a file with an `Impairment` in it (`contract`), and a line in `IMPAIRMENTS`.
"""

from __future__ import annotations

from testbed.net.emulators.relay.impairments.contract import Context, Impairment, Onward
from testbed.net.emulators.relay.impairments.corruption import corruption
from testbed.net.emulators.relay.impairments.delay import delay
from testbed.net.emulators.relay.impairments.duplication import duplication
from testbed.net.emulators.relay.impairments.loss import Lost, loss, loss_of
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


def lost_alone(context: Context) -> Lost | None:
    """What decides over each packet where its loss is all that chance decides, and no queue's management does: what is left of a
    super-packet may then stay together. None: anything else."""
    conditions = context.conditions
    onward = travelling = delay(context)
    for impairment in reversed([each for each in IMPAIRMENTS if each is not loss]):
        onward = impairment(context, onward)
    steady = conditions.jitter_table is None and conditions.schedule is None
    if not steady or onward is not travelling or conditions.ecn or conditions.codel is not None:
        return None
    return loss_of(conditions, context.chance)
