"""The cloud: receives requests across the link, rebuilds the cache, reads the question and decodes greedily."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from testbed.endpoints import wire
from testbed.endpoints.admission import Admission
from testbed.endpoints.deadline import Deadline
from testbed.endpoints.inference import InferenceSide, Prefix, digest, main
from testbed.endpoints.transport.tcp import Connection, Received, listen
from testbed.errors import EndpointError, NotFiniteError, PayloadError, TestbedError, WireError

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.kvcache import KVCache

_MAX_CONNECTIONS = 64
#: A connection that has carried a request is kept so long for the next: an edge has one a link, and goes through all links.
_IDLE_S = 3600.0


@dataclass
class Outcome:
    """One computed answer: what is sent back, and what the orchestrator may ask about it afterwards."""

    answer: wire.Answer
    first: wire.FirstToken
    details: dict[str, Any]
    past: KVCache | None = None  #: prefix and context as they arrived; held for the latest request only
    likelihoods: dict[str, dict[str, float]] = field(default_factory=dict)


class Cloud(InferenceSide):
    """Serves the link in threads of its own; calls from the orchestrator come in on the main thread."""

    def __init__(self) -> None:
        super().__init__()
        self.max_payload = 0
        self._request_s = 0.0
        self._computing = threading.Lock()
        self._memory: dict[tuple[str | int | tuple[str, ...], ...], Outcome] = {}
        self._by_request: dict[int, Outcome] = {}
        self._latest: Outcome | None = None
        self._full: Tensor | None = None
        self._admission = Admission(_MAX_CONNECTIONS)

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """The orchestrator's calls."""
        return {
            "load": self.load,
            "compute": self.compute,
            "learn_prefix": self.learn_prefix,
            "serve": self.serve,
            "compare": self.compare,
            "outcome": self.outcome,
            "forget": self.forget,
        }

    def compute(self) -> dict[str, Any]:
        """As a request is computed: on a thread that has just begun, while no other computes."""
        with self._computing, ThreadPoolExecutor(1) as thread:
            return thread.submit(super().compute).result()

    def serve(self, max_payload: int, congestion: str | None, request_s: float = 120.0) -> int:
        """Open a listening socket and answer requests on it from now on; returns its port.

        `max_payload` bounds what a request may make this process allocate, in bytes, and `request_s` what its bytes may take to
        come, in seconds.
        """
        self.max_payload, self._request_s = max_payload, request_s
        listener = listen(congestion=congestion)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        port: int = listener.getsockname()[1]
        return port

    def forget(self) -> None:
        """Drop the remembered answers (a new example begins: none of them can come again)."""
        self._memory.clear()
        self._by_request.clear()
        self._full = None

    def compare(self, distributions: bytes, vocabulary: int) -> None:
        """Take the full cache's next-token distributions along the gold answer, which `outcome` compares with."""
        from testbed.models.likelihood import from_bytes

        self._full = from_bytes(distributions, vocabulary)

    def outcome(self, id: int, gold: str) -> dict[str, Any]:
        """What became of request `id`, asked after its clock has stopped.

        Digests, tokens kept, the gold answer's NLL, and the KL divergence from the distributions given to `compare`.
        """
        outcome = self._by_request.get(id)
        if outcome is None:
            raise EndpointError(f"request {id} was never answered here")
        if gold not in outcome.likelihoods:
            with self._computing:
                outcome.likelihoods[gold] = self._likelihood(outcome, gold)
        details = {k: v for k, v in outcome.details.items() if k not in ("question_ids", "prefix")}
        return {**details, **outcome.likelihoods[gold]}

    def _likelihood(self, outcome: Outcome, gold: str) -> dict[str, float]:
        from testbed.models.likelihood import mean_kl, mean_nll

        if outcome is not self._latest:
            raise EndpointError(
                "the cache of that request was given up for a later one's; ask for its outcome first"
            )
        self.under(outcome.details["prefix"])
        ids = self.model.tokenize(gold)
        found = self.model.likelihood(outcome.details["question_ids"], ids, outcome.past)
        measured = {"nll": mean_nll(found, ids)}
        if self._full is not None:
            measured["kl"] = mean_kl(self._full, found)
        return measured

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._welcome, args=(Connection(sock),), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
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

    def _converse(self, connection: Connection) -> None:
        """Answer requests until the peer closes. A malformed frame ends the conversation: nothing after it can be trusted."""
        try:
            patience = self._request_s  # of a peer that has not asked for anything yet
            while True:
                received = connection.receive(self.max_payload, Deadline(patience), self._request_s)
                patience = _IDLE_S
                if received is None:
                    break
                if not isinstance(received.header, wire.Request):
                    raise WireError(f"a {type(received.header).__name__} frame where a request was expected")
                self._answer(connection, received, received.header)
        except TestbedError as error:
            self._complain(connection, 0, str(error))
        except Exception as error:
            self._complain(connection, 0, f"{type(error).__name__}: {error}")
            raise

    @staticmethod
    def _complain(connection: Connection, id: int, message: str) -> None:
        try:
            connection.send(wire.Failure(id=id, message=message[:2000]))
        except TestbedError:
            pass

    def _answer(self, connection: Connection, received: Received, request: wire.Request) -> None:
        with self._computing:
            asked = (request.codec, request.prefix, request.question, request.stop, request.max_new_tokens)
            key = (digest(received.payload), request.placement, request.repeat, *asked, request.choices)
            known = self._memory.get(key) if request.reuse else None
            try:
                if known is not None:
                    outcome = self._repeat(connection, received, request, known)
                else:
                    outcome = self._compute(connection, received, request)
                    self._memory[key] = outcome
            except (NotFiniteError, PayloadError, WireError) as error:
                self._complain(connection, request.id, str(error))
                return
            self._by_request[request.id] = outcome

    def _repeat(
        self, connection: Connection, received: Received, request: wire.Request, known: Outcome
    ) -> Outcome:
        """The answer to bytes that were answered before, with the compute times measured then."""
        now = time.monotonic()
        connection.send(replace_struct(known.first, id=request.id, sent_at=now))
        connection.send(
            replace_struct(
                known.answer,
                id=request.id,
                received_at=received.at,
                sent_at=now,
                reused=True,
                retransmits=connection.retransmits(),
            )
        )
        return known

    def _compute(self, connection: Connection, received: Received, request: wire.Request) -> Outcome:
        if request.prefix not in self.prefixes:
            raise WireError(
                f"the request names a prefix {request.prefix[:64]!r} that this side does not know"
            )
        prefix = self.under(request.prefix)
        details: dict[str, Any] = {
            "prefix": request.prefix,
            "payload_digest": digest(received.payload),
            "tokens_kept": 0,
            "kept_digest": "",
        }
        self.pace.begin()
        past, prefill_s = self._rebuild(received, request, prefix, details)
        decoded_at = self.pace.hold()
        question_ids = self.model.tokenize(request.question, closing=prefix.closing)
        firsts: list[wire.FirstToken] = []

        def on_token(index: int, token: int) -> None:
            now = self.pace.hold()
            if index == 0:
                firsts.append(wire.FirstToken(id=request.id, token=token, sent_at=now))
                connection.send(firsts[0])
                self.pace.begin()

        ids = self.answer(question_ids, past, request.max_new_tokens, request.stop, request.choices, on_token)
        done_at = self.pace.hold()
        if not firsts:  # nothing but the end of the text: the first token is the empty answer
            on_token(0, 0)
        first = firsts[0]
        answer = wire.Answer(
            id=request.id,
            text=self.model.text(ids, request.stop)[:8000],
            tokens=len(ids),
            received_at=received.at,
            decode_s=decoded_at - received.at - prefill_s,
            prefill_s=prefill_s,
            first_token_s=first.sent_at - decoded_at,
            generate_s=max(0.0, done_at - first.sent_at),
            sent_at=time.monotonic(),
            reused=False,
            retransmits=connection.retransmits(),
        )
        connection.send(answer)
        if self._latest is not None:
            self._latest.past = None
        outcome = Outcome(answer, first, {**details, "question_ids": question_ids}, past)
        self._latest = outcome
        return outcome

    def _rebuild(
        self, received: Received, request: wire.Request, prefix: Prefix, details: dict[str, Any]
    ) -> tuple[KVCache | None, float]:
        """Prefix and context as the model's past, from the codec's bytes or by prefilling the text; and the prefill's seconds."""
        if request.placement == "cloud":
            if zlib.crc32(received.payload) != request.payload_crc:
                raise WireError("the request's context does not match its checksum")
            try:
                text = bytes(received.payload).decode()
            except UnicodeDecodeError as error:
                raise WireError("the request's context is not UTF-8 text") from error
            ids = self.model.tokenize(text)
            started = self.pace.hold()
            context = self.model.prefill(ids, prefix.cache).cache
            past = self.behind(prefix, context)
            details["tokens_kept"] = len(ids)
            return past, self.pace.hold() - started
        from testbed.codecs.codec import decode
        from testbed.codecs.shapes import CacheShape

        shapes = tuple((s.kv_heads, s.head_dim, s.value_dim, s.window) for s in self.model.shapes)
        cache = decode(received.payload, self.model.device, CacheShape(shapes, self.model.max_positions))
        details["tokens_kept"] = kept_tokens(cache)
        details["kept_digest"] = kept_digest(cache)
        return self.behind(prefix, cache), 0.0


def replace_struct(struct: Any, **changes: Any) -> Any:
    """A frozen message with some fields changed."""
    import msgspec

    return msgspec.structs.replace(struct, **changes)


def kept_tokens(cache: KVCache) -> int:
    """Context tokens kept, as the mean over the layers that a selector may prune (all, where none has full attention)."""
    layers = [layer for layer in cache.layers if layer.window is None] or cache.layers
    held = [layer.tokens if layer.counts is None else sum(layer.counts) / layer.kv_heads for layer in layers]
    return round(sum(held) / len(held)) if held else 0


def kept_digest(cache: KVCache) -> str:
    """BLAKE2b over the kept positions of every layer and head."""
    return digest(b"|".join(layer.positions.cpu().numpy().tobytes() for layer in cache.layers))


if __name__ == "__main__":
    main(lambda: Cloud().handlers())
