"""A server that does one thing at a time, by whatever clock: what it begins next, and what came of that.

Nothing here waits. Who has a clock asks what is next, waits as long as that takes, and says so; a simulation has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from testbed.serving.job import Job
from testbed.serving.serving import Serving
from testbed.units import format_size


@dataclass(frozen=True)
class Work:
    """What the server does for so many seconds: for one request, or a token for each of several."""

    kind: Literal["rebuild", "first_token", "tokens", "step"]
    jobs: tuple[Job, ...]
    seconds: float


class Server:
    """Requests that wait, and those in hand.

    step_s: seconds of a pass that makes the next token of each of these.
    """

    def __init__(self, serving: Serving, step_s: Callable[[Sequence[Job]], float]) -> None:
        self.serving, self._step_s = serving, step_s
        self.waiting: list[Job] = []
        self.inside: list[Job] = []  #: whose first token is known, or is being made
        self.memory = 0  #: bytes of all that are here
        self.refused = 0

    def offer(self, job: Job, now: float) -> str:
        """A request has come; why it is turned away, or nothing."""
        why = self._no_room(job)
        if why:
            self.refused += 1
            return why
        job.arrived = now
        self.memory += job.memory
        self.waiting.append(job)
        return ""

    def withdraw(self, job: Job) -> bool:
        """Nobody waits for a request any longer; whether it is taken out, which it is while it waits itself."""
        if job not in self.waiting:
            return False
        self.waiting.remove(job)
        self.memory -= job.memory
        return True

    def _no_room(self, job: Job) -> str:
        if job.part:
            return ""
        serving, wait = self.serving, sum(not each.part for each in self.waiting)
        if serving.waiting and wait >= serving.waiting:
            return f"{wait} requests wait already, which are as many as may"
        if serving.memory and self.memory + job.memory > serving.memory:
            asked, there = format_size(job.memory), format_size(max(0, serving.memory - self.memory))
            return f"its cache takes {asked}, and {there} of {format_size(serving.memory)} are free"
        return ""

    def begin(self, now: float) -> Work | None:
        """What is done from now on; None: there is nothing to do."""
        for job in self.inside:
            if job.passed == 0:
                return Work("rebuild", (job,), job.rebuild_s)
            if job.passed == 1:
                return Work("first_token", (job,), job.first_s)
        room = len(self.inside) < self.serving.most
        there = [
            job
            for job in self.waiting
            if job.arrived <= now
            and (room or (job.part and self.serving.most > 1))
            and all(part.passed == 2 for part in job.behind)
        ]
        if there:
            job = self.serving.next(there)
            self.waiting.remove(job)
            self.inside.append(job)
            job.began = now
            return Work("rebuild", (job,), job.rebuild_s)
        if not self.inside:
            return None
        if self.serving.most == 1:
            (job,) = self.inside
            return Work("tokens", (job,), sum(job.token_s[job.told :]))
        for job in self.inside:
            job.together = max(job.together, len(self.inside))
        return Work("step", tuple(self.inside), self._step_s(self.inside))

    def end(self, work: Work, now: float) -> list[Job]:
        """That is done; returns whose first token, or last one, is known by it."""
        told = []
        for job in work.jobs:
            if work.kind == "rebuild":
                job.rebuilt, job.passed = now, 1
                continue
            if work.kind == "first_token":
                job.first, job.passed = now, 2
            else:
                job.told = len(job.token_s) if work.kind == "tokens" else job.told + 1
            finished = job.passed == 2 and job.told >= len(job.token_s)
            if finished:
                job.done = now
                self.inside.remove(job)
                self.memory -= job.memory
            if finished or work.kind == "first_token":
                told.append(job)
        return told


def simulate(server: Server, offered: Sequence[tuple[float, Job]]) -> list[Job]:
    """Requests that come at these ascending times, served by a clock that takes no time; those that were not turned away, in the
    order in which they came.
    """
    now, place, answered = 0.0, 0, list[Job]()
    while True:
        while place < len(offered) and offered[place][0] <= now:
            at, job = offered[place]
            if not server.offer(job, at):
                answered.append(job)
            place += 1
        work = server.begin(now)
        if work is None:
            if place == len(offered):
                return answered
            now = offered[place][0]
            continue
        ends = now + work.seconds
        while place < len(offered) and offered[place][0] <= ends:
            at, job = offered[place]
            if not server.offer(job, at):
                answered.append(job)
            place += 1
        now = ends
        server.end(work, now)
