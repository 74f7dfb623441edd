"""One request at the cloud: what was done for it, and when; its question read, its answer decoded and sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from msgspec import structs

from testbed.delivery.delivery import Bytes
from testbed.endpoints.assembly import Rebuilt
from testbed.endpoints.sessions import Served, Session, Sessions
from testbed.endpoints.side import InferenceSide, Pass, digest, per_token
from testbed.errors import WireError
from testbed.speed.words import Work
from testbed.transport import wire
from testbed.transport.transport import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.trail import Trail

#: Bytes of a cache that is kept, as it was read, until an answer's outcome has been asked for.
_MOST_KEPT = 2**26
Stage = Literal["decode", "prefill", "first_token"]


class Answering:
    """`worked`: the stages so far, in order; `payload`: the context as it came; `arrived`: when each chunk of parts was there."""

    def __init__(
        self, side: InferenceSide, sessions: Sessions, connection: Stream, request: wire.Request
    ) -> None:
        self.side, self.connection, self.request = side, connection, request
        self.prefix = side.under(request.prefix)
        self.worked: list[wire.Worked] = []
        self.payload: list[Bytes] = []
        self.arrived: list[float] = []
        self._sessions = sessions
        self._since = 0.0
        self.asked = Pass()  #: the question's
        #: how much of a pass over the context can be made by now, of 1: all layers that are there have been read
        self.there: Callable[[], float] = lambda: 1.0
        self._read = 0.0
        self._repeated: list[wire.Worked] = []

    @property
    def session(self) -> Session:
        """The client's."""
        return self._sessions.of(self.request.client)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the client's turn, and compute."""
        with self._sessions.turn(self.request.client):
            self.side.under(self.request.prefix)  # another client's may be of another length
            yield

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Within a turn, and the question's pass: others may compute, since this one waits."""
        self.end()
        self._sessions.give()
        try:
            yield
        finally:
            self._sessions.take(self.request.client)
            self.side.under(self.request.prefix)

    @contextmanager
    def work(self, stage: Stage, chunk: int = 0, since: float | None = None) -> Iterator[Pass]:
        """A stage at work on a chunk, that has waited for it since then; told what pass that was, where it was one."""
        made = Pass(began=self.side.pace.begin())
        if since is not None:
            self.worked.append(wire.Worked("queue", since, max(since, made.began), chunk))
        yield made
        work: Work = "codec" if stage == "decode" else "prefill"
        took = self.side.pace.takes(work, made.tokens, made.past)
        ended = self.side.pace.hold(work, made.tokens, made.past)
        self._note(stage, made.began, ended, chunk, took)

    @contextmanager
    def amid(self, stage: Stage, made: Pass) -> Iterator[None]:
        """Something else is done within a stage, which goes on behind it."""
        self._note(stage, made.began, self.side.pace.hold("codec"), 0, None)
        yield
        made.began = self.side.pace.begin()

    def go_on(self) -> None:
        """The answer is given; what is done from now on is of what comes behind it."""
        self.worked.clear()
        self._read = 0.0

    def begin(self) -> None:
        """The question's pass begins, or goes on."""
        self._since = self.side.pace.begin()

    def end(self) -> float:
        """It has come to the first token, or to something that is not there yet; returns the time."""
        there = self.there()
        about = (self.asked.tokens, self.asked.past, there - self._read)
        took = self.side.pace.takes("prefill", *about)
        ended = self.side.pace.hold("prefill", *about)
        self._read = there
        self._note("first_token", self._since, ended, self.worked[-1].chunk if self.worked else 0, took)
        return ended

    def _note(self, stage: Stage, began: float, ended: float, chunk: int, took: float | None) -> None:
        """What was done; and as whoever repeats it has to: what a device takes, whatever computing took here."""
        self.worked.append(wire.Worked(stage, began, ended, chunk))
        self._repeated.append(wire.Worked(stage, began, ended if took is None else began + took, chunk))

    def answer(self, rebuilt: Rebuilt, received_at: float | None = None) -> Served:
        """Reads the question behind what is rebuilt, decodes, and sends each part of the answer as it is known. What is counted
        and hashed is so behind the answer, as part of no stage.
        """
        side, request, connection, trail = self.side, self.request, self.connection, self._trail(rebuilt)
        self.begin()
        question_ids = side.model.tokenize(request.question, closing=self.prefix.closing)
        if not question_ids or not all(map(side.model.tokenize, request.choices)):
            raise WireError("the request's question, or one of its choices, is empty")
        self.asked = Pass(len(question_ids), rebuilt.held)
        before = rebuilt.held + len(question_ids)
        firsts: list[wire.FirstToken] = []
        times: list[float] = []

        def on_token(index: int, token: int) -> None:
            times.append(side.pace.hold("decode", 1, before + index - 1) if index else self.end())
            if index == 0:
                firsts.append(wire.FirstToken(id=request.id, token=token, sent_at=times[0]))
                connection.send(firsts[0])
                side.pace.begin()

        ids = self._known(rebuilt, on_token)
        if ids is None:
            limits = (request.max_new_tokens, request.stop, request.choices)
            ids = side.answer(question_ids, rebuilt.past, *limits, on_token, trail=trail)
        if not firsts:  # nothing but the end of the text: the first token is the empty answer
            on_token(0, 0)
        most = 0 if request.choices else request.max_new_tokens
        done_at = side.end_of_answer(len(ids), most, before)
        answer = wire.Answer(
            id=request.id,
            text=side.model.text(ids, request.stop)[:8000],
            tokens=len(ids),
            received_at=max(self.arrived) if received_at is None else received_at,
            arrived=tuple(self.arrived),
            worked=tuple(self.worked),
            generate_s=max(0.0, done_at - firsts[0].sent_at),
            token_s=per_token(times),
            skipped_s=0.0,
            sent_at=time.monotonic(),
            reused=False,
            retransmits=connection.stats().sent_again,
            left_out=rebuilt.left_out,
            planes=rebuilt.planes,
        )
        connection.send(answer)
        details = {
            "payload_digest": digest(*self.payload),
            "tokens_kept": rebuilt.tokens_kept,
            "kept_digest": kept_digest(rebuilt.kept),
        }
        kept = answer if side.pace.times is None else self._to_repeat(answer, before)
        served = Served(
            request, kept, firsts[0], question_ids, details, rebuilt.whole(), trail, answer_ids=ids
        )
        self.session.hold(served)
        return served

    def _trail(self, rebuilt: Rebuilt) -> Trail | None:
        """Where the answer's passes are kept for its outcome; None where that would hold another large cache."""
        from testbed.models.trail import Trail

        model = self.side.model
        bytes_a_token = (
            sum(s.kv_heads * (s.head_dim + s.value_dim) for s in model.shapes) * model.dtype.itemsize
        )
        return Trail() if rebuilt.held * bytes_a_token <= _MOST_KEPT else None

    def _known(self, rebuilt: Rebuilt, on_token: Callable[[int, int], None]) -> list[int] | None:
        """The tokens that were computed off the clock for a device, each as late as there; None where none were."""
        known = self.session.known(self.request) if self.side.pace.times is not None else None
        if known is None:
            return None
        rebuilt.whole()  # a pass reads all of it
        for index, token in enumerate(known.answer_ids):
            on_token(index, token)
        return known.answer_ids

    def _to_repeat(self, answer: wire.Answer, before: int) -> wire.Answer:
        """The answer as a device gives it, for whoever repeats it: `before`: tokens in front of it."""
        each = [
            self.side.pace.takes("decode", 1, before + n) or 0.0 for n in range(max(0, answer.tokens - 1))
        ]
        mean = sum(each) / len(each) if each else None
        return structs.replace(answer, worked=tuple(self._repeated), generate_s=sum(each), token_s=mean)


def kept_digest(kept: list[tuple[Tensor, int | None]]) -> str:
    """BLAKE2b over the kept positions of every layer and head; empty without a layer."""
    return digest(b"|".join(positions.cpu().numpy().tobytes() for positions, _ in kept)) if kept else ""
