"""The edge: holds the context, prefills it, compresses its KV cache, sends it across the link and waits for the answer."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from testbed.endpoints import wire
from testbed.endpoints.inference import InferenceSide, Prefix, main
from testbed.endpoints.transport.tcp import Connection
from testbed.errors import EndpointError, UsageError

if TYPE_CHECKING:
    from testbed.models.language import Prefill
    from testbed.tasks.prompt import Prompted
    from testbed.tasks.task import Example, Task

#: A cloud's answer holds no payload.
_NO_PAYLOAD = 0


@dataclass
class Encoded:
    """A payload ready to be sent, and what it took to make."""

    payload: bytes | bytearray | memoryview
    select_s: float
    encode_s: float


@dataclass
class Held:
    """The example at hand: its prefill and everything made from it so far."""

    key: tuple[int, int]
    prefix: Prefix
    context_text: str
    question_text: str
    choices: tuple[str, ...]
    ids: list[int]
    question_ids: list[int]
    prefill: Prefill
    prefill_s: float
    used: bool = False  #: a row has carried the prefill's time as its own
    encoded: dict[tuple[str, int], Encoded] = field(default_factory=dict)
    local: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Batch:
    """A task's examples at one context length."""

    task: Prompted
    examples: list[Example]
    prefix: str
    max_new_tokens: int


class Edge(InferenceSide):
    """One request at a time, as the orchestrator asks."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[Batch] = []
        self._held: Held | None = None
        self._connections: dict[str, Connection] = {}
        self._queries: int | None = 0
        self._request = 0

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """The orchestrator's calls."""
        return {
            "load": self.load,
            "prepare": self.prepare,
            "reference": self.reference,
            "split": self.split,
            "cloud": self.cloud,
            "edge": self.edge,
        }

    def prepare(
        self,
        task: str,
        parameters: dict[str, Any],
        count: int,
        context_tokens: int | None,
        seed: int,
        codecs: list[str],
        max_new_tokens: int | None,
        prompt: str = "plain:2",
    ) -> dict[str, Any]:
        """Make a task's examples with this model's tokenizer and prefill its prefix; returns what the orchestrator needs."""
        from testbed.codecs.codec import Codec
        from testbed.tasks.task import make_task

        made = self._prompted(make_task(task, **parameters), prompt)
        max_new_tokens = max_new_tokens or made.max_new_tokens
        examples = made.examples(count, context_tokens, lambda text: len(self.model.tokenize(text)), seed)
        wanted = [Codec(text, self.model.name).needs.context_queries for text in codecs]
        self._queries = None if None in wanted else max((n for n in wanted if n is not None), default=0)
        prefix = self.learn_prefix(made.prefix)
        self._batches.append(Batch(made, examples, prefix, max_new_tokens))
        longest = 0
        for example in examples:
            length = len(self.model.tokenize(made.context_text(example)))
            longest = max(longest, length)
            if length == 0:
                raise UsageError(f"task {task}: example {example.id!r} has an empty context")
        room = (
            self.model.max_positions
            - len(self.model.tokenize(made.prefix, start=True))
            - max_new_tokens
            - 256
        )
        if longest > room:
            raise UsageError(
                f"task {task}: a context of {longest} tokens leaves no room in a model of {self.model.max_positions} positions; "
                f"ask for context_tokens of at most {max(0, room)}"
            )
        # The first prefill of a size pays for memory and thread pools, which is no example's own cost.
        warm = self.model.tokenize(made.context_text(examples[0]))
        self.model.prefill(warm, self.prefixes[prefix].cache, queries=self._queries)
        return {
            "batch": len(self._batches) - 1,
            "prefix_text": made.prefix,
            "longest": longest,
            "examples": [
                {
                    "id": example.id,
                    "answers": list(example.answers),
                    "gold": made.answer_text(example),
                    "question": example.question,
                    "context": "",
                }
                for example in examples
            ],
        }

    def _prompted(self, task: Task, prompt: str) -> Prompted:
        """The task with its prompts in the format that the scenario asks for."""
        from testbed.tasks.prompt import Prompted, choose_prompt

        format = choose_prompt(prompt, self.model.name)
        template = self.model.chat_template() if format.layout == "chat" else None
        return Prompted(task, format, template)

    def reference(self, batch: int, example: int) -> dict[str, Any]:
        """The example's answer, NLL and next-token distributions with the full cache on this machine alone.

        Makes it the example at hand.
        """
        from testbed.models.likelihood import mean_nll, to_bytes

        held = self._hold(batch, example)
        local = self._local(held, 0)
        past = self.behind(held.prefix, held.prefill.cache)
        task = self._batches[batch].task
        gold = self.model.tokenize(task.answer_text(self._batches[batch].examples[example]))
        found = self.model.likelihood(held.question_ids, gold, past)
        return {
            "context_tokens": len(held.ids),
            "kv_bytes": held.prefill.cache.nbytes,
            "answer": local["answer"],
            "nll": mean_nll(found, gold),
            "distributions": to_bytes(found),
            "vocabulary": found.shape[1],
        }

    def edge(self, batch: int, example: int, repeat: int, reuse: str) -> dict[str, Any]:
        """`edge` placement: everything here."""
        if reuse == "none":
            self._held = None
        held = self._hold(batch, example)
        reused = self._prefill_reuse(held)
        if reuse != "all":
            held.local.pop(repeat, None)
        fresh = repeat not in held.local or not held.local[repeat]["used"]
        local = self._local(held, repeat)
        local["used"] = True
        if not fresh:
            reused += ["first_token", "generate"]
        stages = {
            "prefill_s": held.prefill_s,
            "first_token_s": local["first_token_s"],
            "generate_s": local["generate_s"],
        }
        # Timed around the request where it ran just now, and the sum of what was measured where it did not.
        elapsed = local["elapsed_s"]
        return {
            "stages": stages,
            "e2e_s": held.prefill_s + elapsed,
            "reused": reused,
            "answer": local["answer"],
            "wire_bytes": 0,
            "retransmits": 0,
            "payload_bytes": 0,
            "congestion": "",
        }

    def split(
        self, batch: int, example: int, codec: str, repeat: int, reuse: str, link: dict[str, Any]
    ) -> dict[str, Any]:
        """`split` placement: prefill, select, encode here; send; the cloud answers."""
        started = time.monotonic()
        if reuse == "none":
            self._held = None
        known = self._held is not None and self._held.key == (batch, example)
        held = self._hold(batch, example)
        reused = self._prefill_reuse(held)
        carried = held.prefill_s if known else 0.0
        key = (codec, repeat)
        if reuse == "all" and key in held.encoded:
            encoded = held.encoded[key]
            reused += ["select", "encode"]
            carried += encoded.select_s + encoded.encode_s
        else:
            encoded = self._encode(held, codec)
            if reuse == "all":
                held.encoded[key] = encoded
        result = self._request_cloud(
            batch, held, "split", codec, encoded.payload, repeat, reuse, link, started, carried
        )
        result["stages"] = {
            "prefill_s": held.prefill_s,
            "select_s": encoded.select_s,
            "encode_s": encoded.encode_s,
            **result["stages"],
        }
        result["reused"] = reused + result["reused"]
        return result

    def cloud(
        self, batch: int, example: int, repeat: int, reuse: str, link: dict[str, Any]
    ) -> dict[str, Any]:
        """`cloud` placement: the context's text crosses, the cloud does the rest."""
        held = self._hold(batch, example)
        started = time.monotonic()
        payload = held.context_text.encode()
        return self._request_cloud(batch, held, "cloud", "", payload, repeat, reuse, link, started, 0.0)

    def _hold(self, batch: int, example: int) -> Held:
        """The example's prefill: the one at hand, or made now (and timed)."""
        if self._held is not None and self._held.key == (batch, example):
            return self._held
        self._held = None
        task, chosen = self._batches[batch].task, self._batches[batch].examples[example]
        prefix = self.prefixes[self._batches[batch].prefix]
        context, question = task.context_text(chosen), task.question_text(chosen)
        choices = tuple(task.choice_texts(chosen))
        started = self.pace.begin()
        ids = self.model.tokenize(context)
        prefill = self.model.prefill(ids, prefix.cache, queries=self._queries)
        took = self.pace.hold() - started
        self._held = Held(
            (batch, example),
            prefix,
            context,
            question,
            choices,
            ids,
            self.model.tokenize(question),
            prefill,
            took,
        )
        return self._held

    @staticmethod
    def _prefill_reuse(held: Held) -> list[str]:
        reused = ["prefill"] if held.used else []
        held.used = True
        return reused

    def _local(self, held: Held, repeat: int) -> dict[str, Any]:
        if repeat in held.local:
            return held.local[repeat]
        batch = self._batches[held.key[0]]
        times: list[float] = []
        started = self.pace.begin()
        past = self.behind(held.prefix, held.prefill.cache)
        ids = self.answer(
            held.question_ids,
            past,
            batch.max_new_tokens,
            batch.task.stop,
            held.choices,
            lambda index, token: times.append(self.pace.hold()),
        )
        ended = self.pace.hold()
        first = times[0] if times else ended
        held.local[repeat] = {
            "answer": self.model.text(ids, batch.task.stop),
            "first_token_s": first - started,
            "generate_s": ended - first,
            "elapsed_s": ended - started,
            "used": False,
        }
        return held.local[repeat]

    def _encode(self, held: Held, codec_text: str) -> Encoded:
        from testbed.codecs.codec import Codec
        from testbed.endpoints.gathering import gather

        codec = Codec(codec_text, self.model.name)
        cache = held.prefill.cache
        if codec.undoes_rope:  # known from the model, once for all requests
            cache = self.model.knowing_ropes(cache)
        started = self.pace.begin()
        batch = self._batches[held.key[0]]
        example = batch.examples[held.key[1]]
        evidence = gather(
            self.model,
            codec.needs,
            held.prefix.cache,
            held.prefill,
            held.question_ids,
            self.model.tokenize(batch.task.answer_text(example)) if codec.needs.answer else (),
            seed=f"{held.key[0]}/{example.id}",
        )
        kept = codec.select(evidence)
        selected = self.pace.hold()
        payload = codec.encode(cache, kept)
        return Encoded(payload, selected - started, self.pace.hold() - selected)

    def _request_cloud(
        self,
        batch: int,
        held: Held,
        placement: str,
        codec: str,
        payload: bytes | bytearray | memoryview,
        repeat: int,
        reuse: str,
        link: dict[str, Any],
        started: float,
        carried: float,
    ) -> dict[str, Any]:
        """Send a request and wait for its answer; returns the stages from `connect_s` on and what was counted.

        `started`: when this request began; `carried`: seconds of stages taken over from an earlier trial.
        """
        self._request += 1
        request = wire.Request(
            id=self._request,
            placement=placement,
            codec=codec,
            prefix=held.prefix.digest,
            question=held.question_text,
            stop=self._batches[batch].task.stop,
            max_new_tokens=self._batches[batch].max_new_tokens,
            payload_crc=zlib.crc32(payload) if placement == "cloud" else 0,
            repeat=repeat,
            choices=held.choices,
            reuse=reuse == "all",
        )
        before = interface_bytes()
        connect_started = time.monotonic()
        connection, fresh = self._connect(link)
        connected = time.monotonic()
        already = 0 if fresh else connection.retransmits()
        keep = False
        try:
            sent_at = connection.send(request, payload)
            first, first_at = self._expect(connection, wire.FirstToken, request.id, link["timeout"])
            answer, answered_at = self._expect(connection, wire.Answer, request.id, link["timeout"])
            retransmits = connection.retransmits() - already + answer.retransmits
            congestion = connection.congestion()
            keep = bool(link["reuse"])
        finally:
            if keep:
                self._connections[link["name"]] = connection
            else:
                self._connections.pop(link["name"], None)
                connection.finish()
        stages, turnaround, computed = _timeline(first, first_at, answer, answered_at, sent_at)
        return {
            "request": request.id,
            "stages": {"connect_s": connected - connect_started if fresh else 0.0, **stages},
            "e2e_s": answered_at - started - turnaround + computed + carried,
            "reused": _cloud_reuse(placement) if answer.reused else [],
            "answer": answer.text,
            "wire_bytes": interface_bytes() - before,
            "retransmits": retransmits,
            "payload_bytes": len(payload),
            "congestion": congestion,
        }

    def _connect(self, link: dict[str, Any]) -> tuple[Connection, bool]:
        """A connection for this request, and whether it was opened for it."""
        if link["reuse"] and link["name"] in self._connections:
            return self._connections[link["name"]], False
        opened = Connection.open(link["address"], link["port"], link["congestion"], link["timeout"])
        return opened, True

    @staticmethod
    def _expect(connection: Connection, kind: type[Any], id: int, timeout: float) -> tuple[Any, float]:
        received = connection.receive(_NO_PAYLOAD, timeout)
        if received is None:
            raise EndpointError("the cloud closed the connection without an answer")
        if isinstance(received.header, wire.Failure):
            raise EndpointError(f"the cloud: {received.header.message}")
        if not isinstance(received.header, kind) or received.header.id != id:
            raise EndpointError(f"the cloud sent a {type(received.header).__name__} frame out of turn")
        return received.header, received.at


def _timeline(
    first: wire.FirstToken, first_at: float, answer: wire.Answer, answered_at: float, sent_at: float
) -> tuple[dict[str, float], float, float]:
    """The stages of a request from its first byte on; and, where the answer came from memory, the time the cloud took to find it
    (which is no part of the request) and the compute time that the finding replaced."""
    travel_first = first_at - first.sent_at
    travel_last = answered_at - answer.sent_at
    if answer.reused:
        generate_s = answer.generate_s + travel_last - travel_first
        first_token_s = answer.first_token_s + travel_first
        turnaround = first.sent_at - answer.received_at
        computed = answer.prefill_s + answer.decode_s + answer.first_token_s + answer.generate_s
    else:
        rebuilt_at = answer.received_at + answer.prefill_s + answer.decode_s
        first_token_s = first_at - rebuilt_at
        generate_s = answered_at - first_at
        turnaround = computed = 0.0
    stages = {
        "transmit_s": answer.received_at - sent_at,
        "decode_s": answer.decode_s,
        "first_token_s": first_token_s,
        "generate_s": generate_s,
    }
    if answer.prefill_s:
        stages["prefill_s"] = answer.prefill_s
    return stages, turnaround, computed


def _cloud_reuse(placement: str) -> list[str]:
    return (["prefill"] if placement == "cloud" else []) + ["decode", "first_token", "generate"]


def interface_bytes() -> int:
    """Bytes that this namespace's interfaces (without lo) have received and sent so far (/proc/net/dev, proc_net(5))."""
    total = 0
    with open("/proc/self/net/dev", encoding="ascii") as file:
        for line in file.readlines()[2:]:
            name, _, figures = line.partition(":")
            if name.strip() != "lo":
                fields = figures.split()
                total += int(fields[0]) + int(fields[8])
    return total


if __name__ == "__main__":
    main(lambda: Edge().handlers())
