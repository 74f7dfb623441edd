"""When a request's first token will be there, by what is known of the link, and the levels that make the best of it.

The link sends one chunk after the other, and the cloud computes one after the other, each once it is there:

    sent = link.finish(max(sent, ready_s), bytes)
    cloud = max(cloud, sent + delay_s) + cloud_s (+ pass_s, where no text is before a text)
    first token = cloud + rest_s, behind the last one
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from testbed.delivery.delivery import SKIP, TEXT
from testbed.delivery.policies.policy import Rung, Situation

#: What fits into TCP's first window (RFC 6928) says how long the way is, and nothing of its rate.
LEAST_BYTES = 14_600
_PACKET_BYTES = 1_448  # and less than one says nothing of it together with others either
#: Seconds: what rounding may make of a time.
_ROUNDING_S = 1e-9
#: Chunks that are followed from one moment on, all states and levels together: 10 to 25 ms of a core's work. As many are followed
#: again where no plan meets the deadline. It is enough for 16 chunks at five levels.
_MOST_FOLLOWED = 10_000


class Link:
    """A rate over time: *steps* are (seconds, bits per second), ascending, each until the next and the last one for ever."""

    def __init__(self, steps: Sequence[tuple[float, float]]) -> None:
        self._times, self._rates = [time for time, _ in steps], [rate / 8 for _, rate in steps]
        self._unlimited = [i for i, rate in enumerate(self._rates) if rate == inf]
        self._sent = [0.0]  # bytes that could have been sent by each time, without those of no limit
        for i, (began, ended) in enumerate(pairwise(self._times)):
            self._sent.append(
                self._sent[-1] + (0.0 if self._rates[i] == inf else self._rates[i] * (ended - began))
            )

    def finish(self, begin_s: float, size: float) -> float:
        """When so many bytes have been sent, the first no earlier than *begin_s*; inf: never."""
        if size <= 0 or begin_s == inf:
            return begin_s
        at = max(0, bisect_right(self._times, begin_s) - 1)
        if self._rates[at] == inf:
            return begin_s
        target = self._sent[at] + self._rates[at] * (begin_s - self._times[at]) + size
        last = max(at, bisect_left(self._sent, target) - 1)
        if free := [i for i in self._unlimited if at <= i <= last]:
            return self._times[free[0]]
        if self._rates[last] == 0:
            return inf  # the last step, or it would have been passed over
        return max(begin_s, self._times[last] + (target - self._sent[last]) / self._rates[last])


def observed_rates(situation: Situation) -> list[float]:
    """Of each chunk that arrived and was large enough to tell: bits per second while the link sent it and no earlier one. Where
    none was, of as many of the others together as are large enough.
    """
    alone, together = list[float](), list[float]()
    before, small, small_s = -inf, 0, 0.0
    for size, sent_s, arrived_s in situation.arrivals:
        seconds = arrived_s - max(sent_s + situation.delay_s, before)
        before = max(before, arrived_s)
        if size < _PACKET_BYTES or not 0 < seconds < inf:
            continue
        if size >= LEAST_BYTES:
            alone.append(size * 8 / seconds)
            continue
        small, small_s = small + size, small_s + seconds
        if small >= LEAST_BYTES:
            together.append(small * 8 / small_s)
            small, small_s = 0, 0.0
    return alone or together


def telling_levels(situation: Situation) -> list[int]:
    """Of the next chunk: levels whose arrival will tell the link's rate, by their size, the largest first; else the best."""
    telling = [(-rung.bytes, i) for i, rung in enumerate(situation.chunks[0]) if rung.bytes >= LEAST_BYTES]
    return [level for _, level in sorted(telling)] or [0]


def until_told(situation: Situation, level: int) -> int:
    """*level*, which will tell the link's rate. What is under way, and has not all arrived, says how great that can be by now.
    Where the level is too late for the deadline even so (or, without one, later than another), a smaller one that is not.
    """
    size = sum(sent.bytes for sent in situation.under_way)
    begun = min((sent.sent_s for sent in situation.under_way), default=inf)
    seconds = situation.now_s - begun - 2 * situation.delay_s  # that it arrived is known a way back later
    if size < LEAST_BYTES or seconds <= 0:
        return level
    link = Link([(0.0, size * 8 / seconds)])
    if situation.deadline_s is not None:
        limit = situation.deadline_s - situation.rest_s + _ROUNDING_S
        if _ends(0, present(situation, link), link, situation, {level: 0}, limit):
            return level
    other, rungs = best_level(situation, link, 0), situation.chunks[0]
    return other if rungs[other].bytes < rungs[level].bytes else level


class State(NamedTuple):
    """After some chunks: what their levels lose, when the cloud has done and the link sent them, and the first one's level.
    joins: a text behind them is computed in one pass with the last one.
    """

    loss: int
    cloud_s: float
    sent_s: float
    first: int = -1
    joins: bool = False


def present(situation: Situation, link: Link) -> State:
    """Once what is under way is done."""
    sent = max((arrival.arrived_s - situation.delay_s for arrival in situation.arrivals), default=-inf)
    cloud = situation.cloud_free_s
    for size, sent_s, cloud_s in situation.under_way:
        sent = link.finish(max(sent, sent_s), size)
        cloud = max(cloud, max(sent, situation.now_s - situation.delay_s) + situation.delay_s) + cloud_s
    return State(0, cloud, max(sent, situation.now_s), joins=situation.after_text)


def best_level(situation: Situation, link: Link, ahead: int) -> int:
    """The next chunk's level in the plan that loses least. A plan gives each of the next *ahead* chunks a level of its own, and
    all behind them one; all plans are compared. Where that would take too long, for many levels or chunks, fewer have one
    of their own: who plans does so within the request.

    - With a deadline: among those that meet it with the margin, the least sum of levels (0 is the best), then the least left out,
      then the earliest. Where none does, but some without the margin, the earliest of those.
    - Where none meets it, and without a deadline: among those that leave nothing out (no `SKIP`), the earliest, then the least
      sum of levels. Nothing is left out for a deadline that is lost anyway.
    """
    weight = len(situation.chunks) + 1  # so many left out weigh less than one level
    losses = {i: i * weight + (level == SKIP) for i, level in enumerate(situation.levels)}
    start = present(situation, link)
    if situation.deadline_s is not None:
        limit = situation.deadline_s - situation.rest_s + _ROUNDING_S
        met = _ends(ahead, start, link, situation, losses, limit)
        if kept := [state for state in met if state.cloud_s <= limit - situation.margin_s]:
            return min(kept).first
        if met:
            return min(met, key=_earliest).first
    whole = {i: loss for i, loss in losses.items() if situation.levels[i] != SKIP} or losses
    return min(_ends(ahead, start, link, situation, whole, inf), key=_earliest).first


def _ends(
    ahead: int,
    start: State,
    link: Link,
    situation: Situation,
    losses: Mapping[int, int],
    limit_s: float,
) -> list[State]:
    """Where one can be after all chunks, the next *ahead* each at one of the levels and those behind them at one, with the cloud
    done by *limit_s*; without what is in no way better than another: to begin later, at the link or the cloud, is never to end
    earlier. losses: a chunk's, by level. No more than `_MOST_FOLLOWED` are followed: a chunk has a level of its own only where
    that leaves enough for all behind it."""
    states, behind, left = [start], situation.chunks, _MOST_FOLLOWED
    while ahead and len(behind) > 1 and (step := len(states) * len(losses)) * (1 + len(behind)) <= left:
        reached = _followed(states, behind[:1], link, situation, losses, limit_s)
        left -= step
        if len(reached) * len(losses) * (len(behind) - 1) > left:
            break
        states, behind, ahead = reached, behind[1:], ahead - 1
    return _followed(states, behind, link, situation, losses, limit_s)


def _followed(
    states: Sequence[State],
    chunks: Sequence[tuple[Rung, ...]],
    link: Link,
    situation: Situation,
    losses: Mapping[int, int],
    limit_s: float,
) -> list[State]:
    """Where one can be from these states behind chunks of one level, whichever."""
    reached = []
    for state in states:
        for level, lost in losses.items():
            loss, cloud, sent, first, joins = state
            for chunk in chunks:
                size, cloud_s, ready_s, pass_s = chunk[level]
                sent = link.finish(max(sent, ready_s), size)
                cloud = max(cloud, sent + situation.delay_s) + cloud_s + (0.0 if joins else pass_s)
                joins = pass_s > 0 and situation.levels[level] == TEXT
            if cloud <= limit_s:
                first = level if first < 0 else first
                reached.append(State(loss + lost * len(chunks), cloud, sent, first, joins))
    return _undominated(reached)


def _undominated(states: list[State]) -> list[State]:
    """Those to which no other is as good in loss, cloud, link and in what a text behind it costs."""
    kept: list[State] = []
    every, joining = _Front(), _Front()
    for state in sorted(states):
        if (joining if state.joins else every).has_as_good(state):
            continue
        kept.append(state)
        every.add(state)
        if state.joins:
            joining.add(state)
    return kept


class _Front:
    """Of states, those with which neither the cloud nor the link is done later than with another."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []  # (cloud, -sent): ascending cloud, descending sent

    def has_as_good(self, state: State) -> bool:
        at = bisect_right(self._points, (state.cloud_s, inf))
        return at > 0 and -self._points[at - 1][1] <= state.sent_s

    def add(self, state: State) -> None:
        """One that none is as good as, or would make no difference."""
        if self.has_as_good(state):
            return
        point = (state.cloud_s, -state.sent_s)
        at = bisect_left(self._points, point)
        while at < len(self._points) and -self._points[at][1] >= state.sent_s:
            self._points.pop(at)
        self._points.insert(at, point)


def _earliest(state: State) -> tuple[float, int]:
    """The order in which the earliest is the first, and of equals the one that loses least."""
    return (state.cloud_s if state.cloud_s == inf else round(state.cloud_s, 9), state.loss)
