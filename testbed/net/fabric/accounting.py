"""What the emulator counted while trials crossed a link: a row's warnings where it could not keep up, and totals per profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from testbed.errors import NetworkError
from testbed.net.emulators.emulator import Counters

#: A packet that left this much later than it should have, seconds: of ten milliseconds of delay, half as much again.
LATE_S = 5e-3


class Counted(Protocol):
    """What is needed of a `Network`."""

    def counters(self, link: str) -> Mapping[str, Counters]: ...


class Account:
    """One link's. Only what is counted between a trial's begin and its end goes in: not calibration, nor what background
    traffic does between trials; but for what was dropped when the next profile took a trial's place."""

    def __init__(self, fabric: Counted, link: str, late_s: float = LATE_S) -> None:
        self._fabric, self._link, self._late_s = fabric, link, late_s
        self._totals: dict[str, dict[str, Counters]] = {}
        self._trials: dict[str, int] = {}
        self._late: dict[str, int] = {}
        self._last: tuple[str, Mapping[str, Counters]] | None = None  # the last trial's profile, and its end

    @contextlib.contextmanager
    def trial(self, profile: str) -> Iterator[list[str]]:
        """Counts what crosses the link inside the ``with``, also where it fails; at its end the list has what the row has to warn
        of. Raises NetworkError where the emulator does not answer."""
        warnings: list[str] = []
        before = self._fabric.counters(self._link)
        self._add_cleared(before)
        try:
            yield warnings
        except Exception:
            with contextlib.suppress(NetworkError):  # what went wrong first is what is worth telling
                self._close(profile, before, warnings)
            raise
        self._close(profile, before, warnings)

    def _close(self, profile: str, before: Mapping[str, Counters], warnings: list[str]) -> None:
        after = self._fabric.counters(self._link)
        if not after:  # nobody counts
            return
        self._last = (profile, after)
        totals = self._totals.get(profile, {})
        for way, counted in after.items():
            here = counted.since(before[way])
            totals[way] = totals[way].plus(here) if way in totals else here
            warnings += here.complaints(way, self._late_s)
        self._totals[profile] = totals
        self._trials[profile] = self._trials.get(profile, 0) + 1
        self._late[profile] = self._late.get(profile, 0) + bool(warnings)

    def _add_cleared(self, now: Mapping[str, Counters]) -> None:
        if self._last is None:
            return
        profile, then = self._last
        for way, totals in self._totals[profile].items():
            cleared = totals.cleared + now[way].cleared - then[way].cleared
            self._totals[profile][way] = replace(totals, cleared=cleared)

    def record(self) -> dict[str, Any]:
        """For JSON, by profile: ``trials``, ``not_kept_up`` (trials with a warning), and the sums of ``up`` and ``down``."""
        return {
            profile: {"trials": self._trials[profile], "not_kept_up": self._late[profile]}
            | {way: counted.record() for way, counted in totals.items()}
            for profile, totals in self._totals.items()
        }
