"""Loss: for each packet in turn, is it lost? See `testbed.net.profile.loss` for the chains' definitions."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from testbed.net.emulators.relay import packet
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.impairments.contract import Context, Onward

Lost = Callable[[], bool]
"""Whether the next packet is lost."""


def independent(probability: float, chance: Random) -> Lost:
    """Each packet on its own."""
    random = chance.random
    return lambda: random() < probability


def gilbert_elliott(p: float, r: float, bad_loss: float, good_loss: float, chance: Random) -> Lost:
    """A good and a bad state, each with its loss."""
    leaving, losses, state, random = (p, r), (good_loss, bad_loss), 0, chance.random

    def lost() -> bool:
        nonlocal state
        loss = losses[state]
        if random() < leaving[state]:
            state ^= 1
        return loss == 1 or (loss > 0 and random() < loss)

    return lost


def four_state(p13: float, p31: float, p32: float, p23: float, p14: float, chance: Random) -> Lost:
    """1: received in a gap, 2: received in a burst, 3: lost in a burst, 4: lost alone."""
    # From each state: the probabilities of the first and of the second of two ways out.
    ways = {1: (p14, 4, p13, 3), 2: (p23, 3, 0.0, 2), 3: (p32, 2, p31, 1), 4: (1.0, 1, 0.0, 1)}
    state, random = 1, chance.random

    def lost() -> bool:
        nonlocal state
        first, there, second, elsewhere = ways[state]
        draw = random()
        if draw < first:
            state = there
        elif draw < first + second:
            state = elsewhere
        return state >= 3

    return lost


_MODELS: dict[str, Callable[..., Lost]] = {"gilbert": gilbert_elliott, "states": four_state}


def loss_of(conditions: Conditions, chance: Random) -> Lost | None:
    """What a direction's conditions ask for; None: nothing is lost."""
    if conditions.loss_model is not None:
        model = dict(conditions.loss_model)
        return _MODELS[model.pop("kind")](**model, chance=chance)
    return independent(conditions.loss, chance) if conditions.loss else None


def surviving(lost: Lost, count: int) -> list[tuple[int, int]]:
    """Of *count* packets, asked about in turn, those that are left, in rows: the first one's number and how many."""
    rows, begin = [], 0
    for number in range(count):
        if lost():
            if number > begin:
                rows.append((begin, number - begin))
            begin = number + 1
    if count > begin:
        rows.append((begin, count - begin))
    return rows


def loss(context: Context, onward: Onward) -> Onward:
    """Loses packets, or marks those that allow it, as a trace says or the conditions do.

    Of two copies one is left then. Where both are, one goes through loss again, and on, before the other does.
    """
    conditions, counted, random = context.conditions, context.counted, context.chance.random
    ecn, schedule = conditions.ecn, conditions.schedule
    traced = schedule if schedule is not None and schedule.losses is not None else None
    model = loss_of(conditions, context.chance)
    if traced is None and model is None and not conditions.duplicate:
        return onward

    def lost(now: float) -> bool:
        if traced is not None:
            return random() < (traced.loss_at(now) or 0.0)
        return model is not None and model()

    def take(frame: bytes, now: float, copies: int = 1) -> None:
        if lost(now):
            marked = packet.mark_congestion(frame) if ecn else None
            if marked is None:
                copies -= 1
                counted.dropped_loss += 1
            else:
                frame = marked
                counted.marked += 1
        if copies == 2:
            take(frame, now)
        if copies:
            onward(frame, now)

    return take
