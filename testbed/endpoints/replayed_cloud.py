"""A cloud without a model: what answering takes was measured beforehand, and is waited for, one request at a time or several, in
the order that a serving discipline says. What comes over the links is received for real, and thrown away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from testbed.deadline import Deadline
from testbed.delivery.delivery import SKIP
from testbed.endpoints.load_messages import Answers
from testbed.endpoints.protocol import Greeting, Hello, Replayed, Serve
from testbed.endpoints.side import Handlers, main, wait_until
from testbed.errors import TestbedError, UsageError, WireError
from testbed.serving.job import Job
from testbed.serving.server import Server
from testbed.serving.serving import parse as parse_serving
from testbed.speed.times import DeviceTimes, line
from testbed.transport import wire
from testbed.transport.transport import Listener, Stream
from testbed.transport.transport import parse as parse_transport

_MAX_CONNECTIONS = 4096
_IDLE_S = 3600.0


def step_s(times: Mapping[str, DeviceTimes]) -> Callable[[Sequence[Job]], float]:
    """Seconds of what makes the next token of each of several requests: a pass for all of one model, one behind the other.

    By a device's times of decoding alone (`times`, by jobs' `model`): a pass reads the weights once, and each request's cache.
    What a token takes behind the shortest context that was measured is taken as the former, what it takes more behind a longer
    one as the latter. It takes no less than a pass over as many tokens, which have to be multiplied. Without a device: as
    passes of as many requests like each of these were measured, and the mean of that; and where none were, each token by itself.
    """

    def each(jobs: Sequence[Job]) -> float:
        if all(job.passes for job in jobs):
            return sum(line(job.passes, len(jobs)) for job in jobs) / len(jobs)
        return sum(job.token_s[job.told] for job in jobs)

    def together(jobs: Sequence[Job], device: DeviceTimes) -> float:
        weights = device.token_s(0)
        caches = sum(max(0.0, job.token_s[job.told] - weights) for job in jobs)
        return max(weights + caches, device.pass_s(len(jobs)))

    def step(jobs: Sequence[Job]) -> float:
        alike = dict[str, list[Job]]()
        for job in jobs:
            alike.setdefault(job.model, []).append(job)
        known = {model: device for model in alike if (device := times.get(model)) and device.decode}
        return sum(
            together(own, known[model]) if model in known else each(own) for model, own in alike.items()
        )

    return step


@dataclass(eq=False)
class _Asked:
    """A request, and when its first token and its last one are known."""

    job: Job
    first: threading.Event = field(default_factory=threading.Event)
    last: threading.Event = field(default_factory=threading.Event)


class Queue:
    """A server in real time, in a thread of its own. What it does follows without a gap as long as there is something to do,
    however late its thread is woken.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._changed = threading.Condition()
        self._asked: dict[Job, _Asked] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def offer(self, job: Job, now: float) -> tuple[_Asked | None, str]:
        """A request has come, all of which was there at that moment; or why it is turned away."""
        with self._changed:
            if why := self._server.offer(job, now):
                return None, why
            self._asked[job] = asked = _Asked(job)
            self._changed.notify_all()
        return asked, ""

    def withdraw(self, asked: _Asked) -> bool:
        """Nobody waits for that any longer; whether its turn had not come yet."""
        with self._changed:
            withdrawn = self._server.withdraw(asked.job)
            if withdrawn:
                del self._asked[asked.job]
        return withdrawn

    def _run(self) -> None:
        now = 0.0
        while True:
            with self._changed:
                while (work := self._server.begin(at := self._from(now))) is None:
                    self._changed.wait()
                now = at + work.seconds
            wait_until(now)
            with self._changed:
                for job in self._server.end(work, now):
                    asked = self._asked[job]
                    asked.first.set()
                    if job.done:
                        asked.last.set()
                        del self._asked[job]

    def _from(self, now: float) -> float:
        """When what comes next begins: behind what was done last, or when somebody came."""
        if self._server.inside or not self._server.waiting:
            return now
        return max(now, min(job.arrived for job in self._server.waiting))


class ReplayedCloud:
    """Serves links in threads of its own; calls from the orchestrator come in on the main thread."""

    def __init__(self) -> None:
        self._max_payload, self._request_s = 0, 0.0
        self._wares: dict[int, Replayed] = {}
        self._queue: Queue | None = None
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def handlers(self) -> Handlers:
        """What it does for the orchestrator, by message."""
        return {Hello: lambda message: Greeting(), Serve: self.serve, Answers: self.answers}

    def serve(self, message: Serve) -> int:
        """Listen by one more transport; returns the port."""
        self._max_payload, self._request_s = message.max_payload, message.request_s
        transport = parse_transport(message.transport).closed(message.secret)
        try:
            listener = transport.listen(message.address, message.congestion)
        except OSError as error:
            raise UsageError(f"the cloud cannot listen at {message.address} ({error.strerror})") from error
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener.port

    def answers(self, message: Answers) -> None:
        """Answer so from now on."""
        self._wares = message.wares
        self._queue = Queue(Server(parse_serving(message.serving), step_s(message.times)))

    def _accept(self, listener: Listener) -> None:
        while True:
            connection = listener.accept()
            self._connections.acquire()
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: Stream) -> None:
        """Answer requests until the peer closes."""
        patience = self._request_s
        try:
            while (received := connection.receive_request(Deadline(patience), self._request_s)) is not None:
                self._answer(connection, *received)
                patience = _IDLE_S
        except TestbedError as error:
            self._complain(connection, wire.Failure(0, str(error)[:2000]))
        finally:
            connection.finish()
            self._connections.release()

    @staticmethod
    def _complain(connection: Stream, failure: wire.Failure) -> None:
        try:
            connection.send(failure)
        except TestbedError:
            pass

    def _answer(self, connection: Stream, request: wire.Request, deadline: Deadline) -> None:
        ware, served_by = self._wares.get(request.same_as), self._queue
        at, arrived, parts, last_s, left_out = 0.0, list[float](), list[Job](), 0.0, 0
        for frame in connection.receive_context(request, self._max_payload, deadline):
            at = frame.at
            if ware is None or served_by is None or not isinstance(frame.header, wire.Chunk):
                continue
            if request.receipts:
                connection.send(wire.Receipt(request.id, frame.header.index, at))
            if request.levels[frame.header.level : frame.header.level + 1] == (SKIP,):
                left_out += frame.header.stop - frame.header.start
            if len(arrived) < len(ware.parts_s) - 1:  # the last one is rebuilt as the answer begins
                parts.append(part_of(ware, parts, frame.header.level))
                served_by.offer(parts[-1], at)
            else:
                last_s = _rebuilt_s(ware, len(arrived), frame.header.level)
            arrived.append(at)
        if ware is None or served_by is None:
            raise WireError(f"the request is for ware {request.same_as}, which is not known here")
        rebuild_s = last_s + ware.rebuild_s
        job = Job(
            rebuild_s, ware.first_s, ware.token_s, ware.held, ware.memory, ware.passes, model=ware.model
        )
        job.behind = tuple(parts)
        asked, why = served_by.offer(job, at)
        if asked is None:
            self._complain(connection, wire.Failure(request.id, f"refused: {why}", refused=True))
            return
        # Who asked has given up by then, and what still waits would hold up those who have not.
        if not asked.first.wait(self._request_s) and served_by.withdraw(asked):
            self._complain(connection, wire.Failure(request.id, f"its turn did not come within {deadline}"))
            return
        asked.first.wait()
        first_at = time.monotonic()
        connection.send(wire.FirstToken(request.id, ware.first_token, first_at))
        asked.last.wait()
        last_at = time.monotonic()
        connection.send(
            wire.Answer(
                id=request.id,
                text=ware.text,
                tokens=ware.tokens,
                received_at=at,
                arrived=tuple(arrived) if ware.parts_s else (),
                worked=(
                    *_worked(zip(arrived, parts, strict=False), ware),
                    *_worked([(at, job)], ware, len(parts)),
                ),
                generate_s=max(0.0, min(job.done - job.first, last_at - first_at)),
                token_s=(job.done - job.first) / len(job.token_s) if job.token_s else None,
                skipped_s=0.0,
                left_out=left_out,
                sent_at=last_at,
                reused=True,
                retransmits=connection.stats().sent_again,
            )
        )


def part_of(ware: Replayed, before: Sequence[Job], level: int = 0) -> Job:
    """What is done with the next part of a context behind these; where the question is read through it, in their order. Raises
    WireError for a level that the ware has not.
    """
    place = len(before)
    if not ware.reads_s:
        return Job(_rebuilt_s(ware, place, level), 0.0, part=True)
    return Job(ware.parts_s[place], ware.reads_s[place], part=True, behind=tuple(before[-1:]))


def _rebuilt_s(ware: Replayed, place: int, level: int) -> float:
    """Seconds of rebuilding a part that came at that level; none of what comes behind the last."""
    if ware.levels_s and level >= len(ware.levels_s):
        raise WireError(f"a chunk of level {level}, of {len(ware.levels_s)}")
    times = ware.levels_s[level] if ware.levels_s else ware.parts_s
    return times[place] if place < len(times) else 0.0


def _worked(jobs: Iterable[tuple[float, Job]], ware: Replayed, first: int = 0) -> Iterator[wire.Worked]:
    """What was done for jobs since they were there, chunk by chunk; the last thing of all is the first token."""
    for chunk, (at, job) in enumerate(jobs, first):
        yield wire.Worked("queue", at, job.began, chunk)
        yield wire.Worked(ware.stage, job.began, job.rebuilt, chunk)
        if not job.part or job.first_s > 0:
            yield wire.Worked("first_token", job.rebuilt, job.first, chunk)


if __name__ == "__main__":
    main(lambda: ReplayedCloud().handlers())
