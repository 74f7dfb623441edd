"""Delay: how long a packet travels to the bottleneck: always the same, as a trace says, or with jitter."""

from __future__ import annotations

from array import array
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from random import Random

from testbed.net.emulators.relay.impairments.contract import Context, Onward
from testbed.net.emulators.relay.packet import HEADERS

LIGHT_BYTES = 15_000
"""Under way, at least, for a packet to enter under load: ten full-sized packets. A link with less to do is as idle."""
SCALE = 8192  # the entry that stands for one jitter


class Jitter:
    """By how much the next packet's delay deviates: *spread_s* seconds times an entry of a table of quantiles."""

    def __init__(self, spread_s: float, table: Sequence[int], chance: Random) -> None:
        self._step = spread_s / SCALE
        self._table = table
        self._count = len(table)
        self._random = chance.random

    def deviation(self) -> float:
        """Seconds."""
        return self._table[int(self._random() * self._count)] * self._step


def pack(table: Sequence[int]) -> str:
    """A table as text, for JSON."""
    return b2a_base64(array("h", table).tobytes(), newline=False).decode()


def unpack(text: str) -> array[int]:
    """What `pack` packed."""
    table: array[int] = array("h")
    table.frombytes(a2b_base64(text))
    return table


def delay(context: Context) -> Onward:
    """Takes a packet to the bottleneck, which it reaches in order unless jitter may reorder."""
    conditions, travel, overtake = context.conditions, context.travel, context.overtake
    mean_s, reorders, schedule = conditions.delay_s, conditions.jitter_reorders, conditions.schedule
    loaded = schedule if schedule is not None and schedule.loaded_delays is not None else None
    under_way = context.under_way_bytes
    traced = schedule if schedule is not None and schedule.delays is not None else None
    table = conditions.jitter_table
    jitter = Jitter(conditions.jitter_s, unpack(table), context.chance) if table else None

    def take(frame: bytes, now: float, copies: int = 1) -> None:
        arrival = now + (mean_s if traced is None else traced.delay_at(now) or 0.0)
        if loaded is not None and under_way(now) >= LIGHT_BYTES:
            arrival = now + (loaded.loaded_delay_at(now) or 0.0)
        size = len(frame) - HEADERS
        if jitter is not None:
            arrival = max(now, arrival + jitter.deviation())
            if reorders:
                overtake((arrival, frame, size, 1))
                return
        travel(now, arrival, frame, size, 1)

    return take
