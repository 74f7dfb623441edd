"""Loss: for each packet in turn, is it lost? See `testbed.net.profile.loss` for the chains' definitions."""

from __future__ import annotations

from random import Random
from typing import Protocol

from testbed.net.emulators.relay import packet
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.impairments.contract import Context, Onward


class Loss(Protocol):
    """Which packets are lost."""

    def lost(self) -> bool:
        """Whether the next packet is."""


class Independent:
    """Each packet on its own."""

    def __init__(self, probability: float, chance: Random) -> None:
        self.probability = probability
        self._random = chance.random

    def lost(self) -> bool:
        return self._random() < self.probability


class GilbertElliott:
    """A good and a bad state, each with its loss."""

    def __init__(self, p: float, r: float, bad_loss: float, good_loss: float, chance: Random) -> None:
        self._leave = (p, r)
        self._loss = (good_loss, bad_loss)
        self._state = 0
        self._random = chance.random

    def lost(self) -> bool:
        loss = self._loss[self._state]
        if self._random() < self._leave[self._state]:
            self._state ^= 1
        return loss == 1 or (loss > 0 and self._random() < loss)


class FourState:
    """1: received in a gap, 2: received in a burst, 3: lost in a burst, 4: lost alone."""

    def __init__(self, p13: float, p31: float, p32: float, p23: float, p14: float, chance: Random) -> None:
        # From each state: the probabilities of the first and of the second of two ways out.
        self._ways = {1: (p14, 4, p13, 3), 2: (p23, 3, 0.0, 2), 3: (p32, 2, p31, 1), 4: (1.0, 1, 0.0, 1)}
        self._state = 1
        self._random = chance.random

    def lost(self) -> bool:
        first, there, second, elsewhere = self._ways[self._state]
        draw = self._random()
        if draw < first:
            self._state = there
        elif draw < first + second:
            self._state = elsewhere
        return self._state >= 3


def loss_of(conditions: Conditions, chance: Random) -> Loss | None:
    """What a direction's conditions ask for; None: nothing is lost."""
    model = dict(conditions.loss_model or {})
    kind = model.pop("kind", None)
    if kind == "gilbert":
        return GilbertElliott(**model, chance=chance)
    if kind == "states":
        return FourState(**model, chance=chance)
    return Independent(conditions.loss, chance) if conditions.loss else None


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
        return model is not None and model.lost()

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
