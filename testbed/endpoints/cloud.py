"""The cloud: receives requests across the link, rebuilds the cache, reads the question and decodes greedily."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from msgspec import structs

from testbed.codecs.fast.pinned import is_gpu, pinned
from testbed.deadline import Deadline
from testbed.delivery.delivery import Bytes, Pipelined, parse
from testbed.endpoints.answering import Answering
from testbed.endpoints.arrivals import Arrivals
from testbed.endpoints.assembly import decoded, prefilled
from testbed.endpoints.decoding_together import timed_together
from testbed.endpoints.partwise import partwise
from testbed.endpoints.protocol import (
    Compare,
    Compute,
    Computed,
    Examine,
    Forget,
    FullCache,
    Outcome,
    Passes,
    Read,
    Serve,
    Together,
)
from testbed.endpoints.room import ran_out, within_memory
from testbed.endpoints.scouted import own_choice, scouted
from testbed.endpoints.sessions import Admission, Served, Session, Sessions
from testbed.endpoints.side import Handlers, InferenceSide, digest, held, main, wait_until
from testbed.errors import (
    NotFiniteError,
    OutOfMemory,
    PayloadError,
    SpecError,
    TestbedError,
    UsageError,
    WireError,
)
from testbed.transport import wire
from testbed.transport.transport import Listener, Stream
from testbed.transport.transport import parse as parse_transport

if TYPE_CHECKING:
    pass

_MAX_CONNECTIONS = 64
#: A connection that has carried a request is kept so long for the next: an edge has one a link, and goes through all links.
_IDLE_S = 3600.0
_LOOK_S = 0.002  #: between two looks at whether a token has been confirmed


class Cloud(InferenceSide):
    """Serves the link in threads of its own; calls from the orchestrator come in on the main thread."""

    def __init__(self) -> None:
        super().__init__()
        self.max_payload = 0
        self._request_s = 0.0
        self._sessions = Sessions()
        self._admission = Admission(_MAX_CONNECTIONS)

    def handlers(self) -> Handlers:
        """What this side does for the orchestrator, by message."""
        own: Handlers = {Serve: self.serve, Compare: self.compare, Examine: self.examine, Forget: self.forget}
        return {**super().handlers(), **own, Read: self.read, Together: self.together}

    def compute(self, message: Compute) -> Computed:
        """As a request is computed: on a thread that has just begun, while no other computes."""
        with self._sessions.turn(""), ThreadPoolExecutor(1) as thread:
            return thread.submit(super().compute, message).result()

    def serve(self, message: Serve) -> int:
        """Listen by one more transport, and answer requests from now on; returns the port."""
        self.max_payload, self._request_s = message.max_payload, message.request_s
        try:
            transport = parse_transport(message.transport).closed(message.secret)
            listener = transport.listen(message.address, message.congestion)
        except OSError as error:
            raise UsageError(
                f"the cloud cannot listen at {message.address} ({error.strerror}): it has to be an address of its own host"
            ) from error
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener.port

    def forget(self, message: Forget) -> None:
        """Drop a client's answers."""
        self._sessions.of(message.client).forget()

    def compare(self, message: Compare) -> None:
        """Take the full cache's next-token distributions along the gold answer."""
        from testbed.models.likelihood import from_bytes

        self._sessions.of(message.client).compare(from_bytes(message.distributions, message.vocabulary))

    def read(self, message: Read) -> FullCache:
        """Answer an example with this side's own model and the full cache; outcomes are compared with it from now on."""
        from testbed.models import likelihood
        from testbed.models.trail import Trail

        asked = message.asked
        with self._sessions.turn(message.client):
            prefix = self.under(asked.prefix)
            ids, gold = self.model.tokenize(asked.context), self.model.tokenize(asked.gold)
            context = self.model.prefill(ids, prefix.cache).cache
            past = self.behind(prefix, context)
            question = self.model.tokenize(asked.question, closing=prefix.closing)
            limits, trail = (asked.max_new_tokens, asked.stop, asked.choices), Trail()
            text = self.model.text(
                self.answer(question, past, *limits, lambda index, token: None, trail=trail), asked.stop
            )
            if self.model.stands_in:
                return FullCache(len(ids), context.nbytes, text, None, b"", 0)
            found = self.model.likelihood(question, gold, past, trail)
        vocabulary = found.shape[1]
        self.compare(Compare(likelihood.to_bytes(found), vocabulary, message.client))
        return FullCache(len(ids), context.nbytes, text, likelihood.mean_nll(found, gold), b"", vocabulary)

    def examine(self, message: Examine) -> Outcome:
        """Digests, tokens kept, the gold answer's NLL, the KL divergence from the distributions given to `compare`, and of a
        scout's choice what this side's own model shares."""
        with self._sessions.turn(message.client):  # which a request keeps until all is known of it
            session = self._sessions.of(message.client)
            served = session.served(message.request)
            known_by = served.alike(message.gold, message.selector)
            if known_by not in session.outcomes:
                session.outcomes[known_by] = self._outcome(session, served, message.gold, message.selector)
        return session.outcomes[known_by]

    def together(self, message: Together) -> Passes:
        """Decode the latest request of a client with others like it, off every clock."""
        with self._sessions.turn(message.client):
            session = self._sessions.of(message.client)
            served = session.served(message.request)
            return timed_together(self, served, session.past(served), message.most)

    def _outcome(self, session: Session, served: Served, gold: str, selector: str) -> Outcome:
        from testbed.models.likelihood import mean_kl, mean_nll

        if self.model.stands_in:
            return Outcome(nll=None, **served.details)
        past = session.past(served)
        self.under(served.request.prefix)
        ids = self.model.tokenize(gold)
        distributions = self.model.likelihood(served.question_ids, ids, past, served.trail)
        kl = None if session.full is None else mean_kl(session.full, distributions)
        overlap = self._overlap(session, served, gold, selector) if selector else None
        return Outcome(nll=mean_nll(distributions, ids), kl=kl, choice_overlap=overlap, **served.details)

    def _overlap(self, session: Session, served: Served, gold: str, selector: str) -> float | None:
        """The share of a scout's choice that this side's own model would have chosen; of one example it is found once."""
        if served.scouted is None:
            return None
        ids, theirs = served.scouted
        chosen = digest(np.asarray(ids).tobytes(), theirs.tobytes())
        known_by = (served.request.prefix, served.request.question, selector, gold, chosen)
        if known_by not in session.overlaps:
            own = own_choice(self, served, selector, self.model.tokenize(gold))
            session.overlaps[known_by] = len(np.intersect1d(own, theirs)) / len(theirs)
        return session.overlaps[known_by]

    def _accept(self, listener: Listener) -> None:
        while True:
            threading.Thread(target=self._welcome, args=(listener.accept(),), daemon=True).start()

    def _welcome(self, connection: Stream) -> None:
        if not self._admission.admit(connection):
            self._complain(
                connection, 0, f"{self._admission.limit} requests are under way: no more are taken"
            )
            connection.finish()
            return
        if is_gpu(self.pace.device):
            connection.memory = lambda size: pinned(size).data
        try:
            self._converse(connection)
        finally:
            connection.finish()
            self._admission.leave(connection)

    def _converse(self, connection: Stream) -> None:
        """Answer requests until the peer closes. A malformed frame ends the conversation: nothing after it can be trusted."""
        try:
            patience = self._request_s  # of a peer that has not asked for anything yet
            while True:
                received = connection.receive_request(Deadline(patience), self._request_s)
                patience = _IDLE_S
                if received is None or not self._answer(connection, *received):
                    break
        except TestbedError as error:
            self._complain(connection, 0, str(error))
        except Exception as error:
            if line := ran_out(error):
                self._complain(connection, 0, line)
                return
            self._complain(connection, 0, f"{type(error).__name__}: {error}")
            raise

    @staticmethod
    def _complain(connection: Stream, id: int, message: str) -> None:
        try:
            connection.send(wire.Failure(id=id, message=message[:2000]))
        except TestbedError:
            pass

    def _answer(self, connection: Stream, request: wire.Request, deadline: Deadline) -> bool:
        """Answer one request when its turn comes; False: nothing that follows on this connection can be trusted."""
        try:
            delivery = parse(request.delivery)
        except SpecError as error:
            raise WireError(f"the request: {error}") from error
        if isinstance(delivery, Pipelined) or request.placement == "scout":
            arrivals = Arrivals(connection, request, self.max_payload, deadline)

            def answer(about: Answering) -> None:
                if isinstance(delivery, Pipelined):
                    partwise(about, delivery, arrivals)
                else:
                    scouted(about, arrivals)

            answered = self._answering(connection, request, answer)
            try:
                arrivals.join()
            except TestbedError:
                if answered:  # else it has been said why not
                    raise
                return False
            return True
        chunks: dict[int, Bytes] = {}
        for frame in connection.receive_context(request, self.max_payload, deadline):
            if isinstance(frame.header, wire.Chunk):
                chunks[frame.header.index] = frame.payload
            elif isinstance(frame.header, wire.End) and frame.header.chunks > len(chunks):
                lost = frame.header.chunks - len(chunks)
                self._complain(
                    connection, request.id, f"{lost} chunks of a context that is of use as a whole were lost"
                )
                return True
            received_at = frame.at
        payload = list(delivery.receive(chunks[index] for index in sorted(chunks)))
        self._answering(connection, request, lambda about: self._whole(about, payload, received_at))
        return True

    def _answering(
        self, connection: Stream, request: wire.Request, answer: Callable[[Answering], None]
    ) -> bool:
        try:
            if request.prefix not in self.prefixes:
                raise WireError(
                    f"the request names a prefix {request.prefix[:64]!r} that this side does not know"
                )
            within_memory(lambda: answer(Answering(self, self._sessions, connection, request)))
        except (NotFiniteError, OutOfMemory, PayloadError, WireError) as error:
            self._complain(connection, request.id, str(error))
            return False
        return True

    def _whole(self, about: Answering, payload: list[Bytes], received_at: float) -> None:
        """The answer to a context that is there."""
        about.payload = payload
        with about.turn():
            known = about.session.known(about.request)
            if known is not None:
                served = self._repeat(about, known, received_at)
            elif about.request.placement == "cloud":
                with about.work("prefill", since=received_at) as made:
                    rebuilt = prefilled(self, about.prefix, payload)
                    made.tokens, made.past = rebuilt.tokens, held(about.prefix.cache)
                served = about.answer(rebuilt, received_at)
            else:
                with about.work("decode", since=received_at):
                    rebuilt = decoded(self, about.prefix, payload)
                served = about.answer(rebuilt, received_at)
            about.session.remember(about.request.id, served)

    def _repeat(self, about: Answering, known: Served, received_at: float) -> Served:
        """The answer to bytes that were answered before, each token as late as it was computed then.

        Once the first token has been confirmed, nothing is under way; on a link that stays as it is the rest of the wait then
        changes nothing that could be measured, and is left out and billed, unless `request.replay`.
        """
        request, connection = about.request, about.connection
        was, at = known.answer, time.monotonic()
        worked = [wire.Worked("queue", received_at, at)]
        for before in was.worked:
            if before.stage != "queue":
                worked.append(structs.replace(before, start=at, end=at + before.end - before.start))
                at = worked[-1].end
        wait_until(at)
        first_at = time.monotonic()
        connection.send(structs.replace(known.first, id=request.id, sent_at=first_at))
        last_at = first_at + was.generate_s
        while (now := time.monotonic()) < last_at and (request.replay or not connection.acknowledged()):
            wait_until(min(now + _LOOK_S, last_at))
        answer = structs.replace(
            was,
            id=request.id,
            received_at=received_at,
            worked=tuple(worked),
            skipped_s=max(0.0, last_at - now),
            sent_at=time.monotonic(),
            reused=True,
            retransmits=connection.stats().sent_again,
        )
        connection.send(answer)
        if digest(*about.payload) == known.details["payload_digest"]:
            return known
        mistaken = f"request {request.id} is unlike request {request.same_as}, whose answer it was to get"
        return replace(known, mistaken=mistaken)


if __name__ == "__main__":
    main(lambda: Cloud().handlers())
