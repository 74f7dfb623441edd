"""The cloud: receives requests across the link, rebuilds the cache, reads the question and decodes greedily."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from msgspec import structs

from testbed.deadline import Deadline
from testbed.delivery.delivery import Bytes, parse
from testbed.endpoints.protocol import Compare, Compute, Computed, Examine, Forget, Outcome, Serve
from testbed.endpoints.sessions import Admission, Served, Session, Sessions
from testbed.endpoints.side import Handlers, InferenceSide, Prefix, digest, main, per_token, wait_until
from testbed.errors import NotFiniteError, PayloadError, SpecError, TestbedError, WireError
from testbed.models.kvcache import EMPTY
from testbed.transport import wire
from testbed.transport.transport import Arrived, Listener, Stream
from testbed.transport.transport import parse as parse_transport

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.kvcache import KVCache

_MAX_CONNECTIONS = 64
#: A connection that has carried a request is kept so long for the next: an edge has one a link, and goes through all links.
_IDLE_S = 3600.0
_LOOK_S = 0.002  #: between two looks at whether a token has been confirmed


@dataclass
class Rebuilt:
    """Prefix and context as the model's past."""

    past: KVCache | None
    tokens: int  #: of the context's text; 0 where a cache came
    kept: list[tuple[Tensor, int | None]]  #: positions and window of each layer of the cache that came


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
        return {**super().handlers(), **own}

    def compute(self, message: Compute) -> Computed:
        """As a request is computed: on a thread that has just begun, while no other computes."""
        with self._sessions.turn(""), ThreadPoolExecutor(1) as thread:
            return thread.submit(super().compute, message).result()

    def serve(self, message: Serve) -> int:
        """Listen by one more transport, and answer requests from now on; returns the port."""
        self.max_payload, self._request_s = message.max_payload, message.request_s
        listener = parse_transport(message.transport).listen(congestion=message.congestion)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener.port

    def forget(self, message: Forget) -> None:
        """Drop a client's answers."""
        self._sessions.of(message.client).forget()

    def compare(self, message: Compare) -> None:
        """Take the full cache's next-token distributions along the gold answer."""
        from testbed.models.likelihood import from_bytes

        self._sessions.of(message.client).full = from_bytes(message.distributions, message.vocabulary)

    def examine(self, message: Examine) -> Outcome:
        """Digests, tokens kept, the gold answer's NLL, and the KL divergence from the distributions given to `compare`."""
        with self._sessions.turn(message.client):  # which a request keeps until all is known of it
            session = self._sessions.of(message.client)
            served = session.served(message.request)
            if message.gold not in served.outcomes:
                served.outcomes[message.gold] = self._outcome(session, served, message.gold)
        return served.outcomes[message.gold]

    def _outcome(self, session: Session, served: Served, gold: str) -> Outcome:
        from testbed.models.likelihood import mean_kl, mean_nll

        past = session.past(served)
        self.under(served.request.prefix)
        ids = self.model.tokenize(gold)
        distributions = self.model.likelihood(served.question_ids, ids, past)
        kl = None if session.full is None else mean_kl(session.full, distributions)
        return Outcome(nll=mean_nll(distributions, ids), kl=kl, **served.details)

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
                arrived = connection.receive_request(self.max_payload, Deadline(patience), self._request_s)
                patience = _IDLE_S
                if arrived is None:
                    break
                self._answer(connection, arrived)
        except TestbedError as error:
            self._complain(connection, 0, str(error))
        except Exception as error:
            self._complain(connection, 0, f"{type(error).__name__}: {error}")
            raise

    @staticmethod
    def _complain(connection: Stream, id: int, message: str) -> None:
        try:
            connection.send(wire.Failure(id=id, message=message[:2000]))
        except TestbedError:
            pass

    def _answer(self, connection: Stream, arrived: Arrived) -> None:
        """Answer one request when its turn comes. What is counted and hashed is so behind the answer, as part of no stage."""
        request = arrived.request
        with self._sessions.turn(request.client):
            turn_at = time.monotonic()
            session = self._sessions.of(request.client)
            known = session.known(request)
            try:
                if known is not None:
                    served = self._repeat(connection, arrived, known, turn_at)
                else:
                    served = self._compute(connection, arrived, session)
            except (NotFiniteError, PayloadError, WireError) as error:
                self._complain(connection, request.id, str(error))
                return
            session.remember(request.id, served)

    def _repeat(self, connection: Stream, arrived: Arrived, known: Served, turn_at: float) -> Served:
        """The answer to bytes that were answered before, each token as late as it was computed then.

        Once the first token has been confirmed, nothing is under way; on a link that stays as it is the rest of the wait then
        changes nothing that could be measured, and is left out and billed, unless `request.replay`.
        """
        request, was = arrived.request, known.answer
        wait_until(turn_at + was.prefill_s + was.decode_s + was.first_token_s)
        first_at = time.monotonic()
        connection.send(structs.replace(known.first, id=request.id, sent_at=first_at))
        last_at = first_at + was.generate_s
        while (now := time.monotonic()) < last_at and (request.replay or not connection.acknowledged()):
            wait_until(min(now + _LOOK_S, last_at))
        answer = structs.replace(
            was,
            id=request.id,
            received_at=arrived.at,
            queue_s=turn_at - arrived.at,
            skipped_s=max(0.0, last_at - now),
            sent_at=time.monotonic(),
            reused=True,
            retransmits=connection.stats().sent_again,
        )
        connection.send(answer)
        if digest(*_payload(arrived)) == known.details["payload_digest"]:
            return known
        mistaken = f"request {request.id} is unlike request {request.same_as}, whose answer it was to get"
        return replace(known, mistaken=mistaken)

    def _compute(self, connection: Stream, arrived: Arrived, session: Session) -> Served:
        request = arrived.request
        if request.prefix not in self.prefixes:
            raise WireError(
                f"the request names a prefix {request.prefix[:64]!r} that this side does not know"
            )
        prefix = self.under(request.prefix)
        began = self.pace.begin()
        rebuild = self._prefill if request.placement == "cloud" else self._decode
        payload = _payload(arrived)
        rebuilt = rebuild(payload, prefix)
        rebuilt_at = self.pace.hold("prefill" if request.placement == "cloud" else "codec")
        question_ids = self.model.tokenize(request.question, closing=prefix.closing)
        firsts: list[wire.FirstToken] = []
        times: list[float] = []

        def on_token(index: int, token: int) -> None:
            times.append(self.pace.hold("decode" if index else "prefill"))
            if index == 0:
                firsts.append(wire.FirstToken(id=request.id, token=token, sent_at=times[0]))
                connection.send(firsts[0])
                self.pace.begin()

        ids = self.answer(
            question_ids, rebuilt.past, request.max_new_tokens, request.stop, request.choices, on_token
        )
        done_at = self.pace.hold("decode" if firsts else "prefill")
        if not firsts:  # nothing but the end of the text: the first token is the empty answer
            on_token(0, 0)
        rebuild_s = rebuilt_at - began
        answer = wire.Answer(
            id=request.id,
            text=self.model.text(ids, request.stop)[:8000],
            tokens=len(ids),
            received_at=arrived.at,
            queue_s=began - arrived.at,
            decode_s=0.0 if request.placement == "cloud" else rebuild_s,
            prefill_s=rebuild_s if request.placement == "cloud" else 0.0,
            first_token_s=firsts[0].sent_at - rebuilt_at,
            generate_s=max(0.0, done_at - firsts[0].sent_at),
            token_s=per_token(times),
            skipped_s=0.0,
            sent_at=time.monotonic(),
            reused=False,
            retransmits=connection.stats().sent_again,
        )
        connection.send(answer)
        details = {
            "payload_digest": digest(*payload),
            "tokens_kept": kept_tokens(rebuilt.kept) or rebuilt.tokens,
            "kept_digest": kept_digest(rebuilt.kept),
        }
        served = Served(request, answer, firsts[0], question_ids, details, rebuilt.past)
        session.hold(served)
        return served

    def _prefill(self, payload: list[Bytes], prefix: Prefix) -> Rebuilt:
        """The past by prefilling the context's text."""
        try:
            text = b"".join(payload).decode()
        except UnicodeDecodeError as error:
            raise WireError("the request's context is not UTF-8 text") from error
        ids = self.model.tokenize(text)
        context = self.model.prefill(ids, prefix.cache).cache
        return Rebuilt(self.behind(prefix, context), len(ids), [])

    def _decode(self, payload: list[Bytes], prefix: Prefix) -> Rebuilt:
        """The past from the codec's bytes."""
        from testbed.codecs.cache_format import CacheShape
        from testbed.codecs.codec import Decoder

        shapes = tuple((s.kv_heads, s.head_dim, s.value_dim, s.window) for s in self.model.shapes)
        decoder = Decoder(self.model.device, CacheShape(shapes, self.model.max_positions))
        for piece in payload:
            decoder.feed(piece)
        cache = decoder.finish()
        kept = [(layer.positions, layer.window) for layer in cache.layers]
        return Rebuilt(self.behind(prefix, cache), 0, kept)


def _payload(arrived: Arrived) -> list[Bytes]:
    """A request's context, its bytes in their order. Raises WireError where it comes as nobody knows here."""
    try:
        return list(parse(arrived.request.delivery).receive(arrived.chunks))
    except SpecError as error:
        raise WireError(f"the request: {error}") from error


def kept_tokens(kept: list[tuple[Tensor, int | None]]) -> int:
    """Context tokens kept, as the mean over the layers that a selector may prune (all, where none has full attention).

    kept: positions ([tokens] or [kv_heads, tokens]) and window of each layer.
    """
    layers = [positions for positions, window in kept if window is None] or [
        positions for positions, _ in kept
    ]
    held = [int((p != EMPTY).sum()) / (len(p) if p.dim() == 2 else 1) for p in layers]
    return round(sum(held) / len(held)) if held else 0


def kept_digest(kept: list[tuple[Tensor, int | None]]) -> str:
    """BLAKE2b over the kept positions of every layer and head; empty without a layer."""
    return digest(b"|".join(positions.cpu().numpy().tobytes() for positions, _ in kept)) if kept else ""


if __name__ == "__main__":
    main(lambda: Cloud().handlers())
