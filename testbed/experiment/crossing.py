"""The swept link, as trials cross it one after the other: each under its profile, and none meets what another left on it."""

from __future__ import annotations

import time

from testbed.endpoints.protocol import TrialResult
from testbed.experiment.scenario import Plan
from testbed.experiment.session import Session
from testbed.experiment.trial import Trial
from testbed.net.profile.profile import Profile
from testbed.transport.tcp import Tcp


class Crossing:
    """A plan's link in a session."""

    def __init__(self, plan: Plan, session: Session) -> None:
        self._plan, self._session, self._link = plan, session, plan.link
        self._current: Profile | None = None
        self._emptied = False  #: nothing is under way on it: what was has been hurried
        self._origin = time.monotonic()  #: when traces begin

    def begin(self) -> None:
        """Traces that do not begin with a trial begin now."""
        self._origin, self._current = time.monotonic(), None

    def apply(self, profile: Profile, restart: bool = False, since_s: float = 0.0) -> None:
        """Puts the link under a profile; `restart`: its traces begin now, or are so many seconds old."""
        if restart or profile != self._current:
            network = self._session.network
            if not self._emptied:
                network.settle(self._link)
            self._emptied = False
            self._origin = time.monotonic() - since_s if restart else self._origin
            network.apply(self._link, profile, self._origin)
            self._current = profile

    def align(self, trial: Trial) -> float | None:
        """Puts the link under a trial's profile; how far its traces, which begin with the trial or the run, have come."""
        scenario, profile, since_s = self._plan.scenario, trial.cell.profile, 0.0
        if scenario.at == "example" and profile.changes:
            examples = scenario.examples_of(trial.cell.task)
            number = trial.number + trial.repeat * examples
            since_s = profile.length_s * number / (examples * scenario.repeats)
        self.apply(profile, restart=profile.changes and scenario.at != "run", since_s=since_s)
        return time.monotonic() - self._origin if profile.changes else None

    def trial(self, trial: Trial, following: Trial | None) -> TrialResult:
        """Makes a trial across the link, which is `align`ed. following: the one behind it, of its example. Raises as a `Pair`."""
        pair, hurries = self._session.pair, self._hurries(trial, following)
        result = pair.trial(trial, self._origin, lingers=hurries)
        if not hurries:
            return result
        if self._session.network.hurry(self._link):
            self._current, self._emptied = None, True
        return pair.hang_up(result)

    def _hurries(self, trial: Trial, following: Trial | None) -> bool:
        """Whether a trial's connection may be closed without the link's delays. Nothing of that is timed; but nobody may be left
        who goes by what was learned of the link, nor look at packets, and the link has to come under other conditions next.
        """
        transport, plan = trial.cell.transport, self._plan
        ends = isinstance(transport, Tcp) and transport.connection == "fresh"
        alone = not plan.flows() and not any(link.pcap for link in plan.topology.links)
        if following is None or plan.rehearses(following.cell):  # which crosses the link as it is
            return False
        return ends and alone and following.cell.profile != trial.cell.profile
