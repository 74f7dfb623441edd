"""The edge: holds the context, prefills it, compresses its KV cache, sends it across the link and waits for the answer."""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING

from testbed.codecs.evidence import Needs
from testbed.codecs.spec import parse
from testbed.endpoints.gathering import gather, prefill_for
from testbed.endpoints.held import Batch, Encoded, Held, Local
from testbed.endpoints.pace import wait_until
from testbed.endpoints.protocol import (
    FullCache,
    Learn,
    Prepare,
    Prepared,
    Reference,
    Stages,
    TrialRequest,
    TrialResult,
)
from testbed.endpoints.side import Handlers, InferenceSide, main, per_token
from testbed.endpoints.client import Client
from testbed.transport import wire

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec


#: What the cloud makes of what comes, by placement.
_REBUILDS = {"split": "decode", "cloud": "prefill"}


class Edge(InferenceSide):
    """One request at a time, as the orchestrator asks."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[Batch] = []
        self._held: Held | None = None
        self._client = Client()
        self._codecs: dict[str, Codec] = {}
        self._needs = Needs()
        self._request = 0

    def handlers(self) -> Handlers:
        """What this side does for the orchestrator, by message."""
        own = {Prepare: self.prepare, Reference: self.reference, TrialRequest: self.trial}
        return {**super().handlers(), **own}

    def prepare(self, message: Prepare) -> Prepared:
        """Make a task's examples with this model's tokenizer and prefill its prefix."""
        from testbed.endpoints.examples import longest_context, make_examples, prepared

        task, examples = make_examples(self.model, message)
        max_new_tokens = message.max_new_tokens or task.max_new_tokens
        self._needs = Needs.of_all(self._codec(text).needs for text in message.codecs)
        opening = len(self.model.tokenize(task.prefix, start=True))
        reach = task.reach(examples, lambda text: len(self.model.tokenize(text)), opening, max_new_tokens)
        prefix = Learn(task.prefix, reach, task.closing)
        self._batches.append(Batch(task, examples, self.learn(prefix), max_new_tokens))
        longest = longest_context(self.model, task, examples, max_new_tokens)
        # The first prefill of a size pays for memory and thread pools, which is no example's own cost.
        warm = self.model.tokenize(task.context_text(examples[0]))
        prefill_for(self.model, self._needs, warm, self.under(self._batches[-1].prefix).cache)
        told = tuple(prepared(task, example) for example in examples)
        return Prepared(len(self._batches) - 1, prefix, longest, told)

    def reference(self, message: Reference) -> FullCache:
        """The example's answer, NLL and next-token distributions with the full cache on this machine alone."""
        from testbed.models.likelihood import mean_nll, to_bytes

        held = self._hold(message.batch, message.example)
        past = self.behind(held.prefix, held.prefill.cache)
        gold = self._gold(message.batch, message.example)
        distributions = self.model.likelihood(self._question(held), gold, past)
        return FullCache(
            context_tokens=len(held.ids),
            kv_bytes=held.prefill.cache.nbytes,
            answer=self._local(held, 0).text,
            nll=mean_nll(distributions, gold),
            distributions=to_bytes(distributions),
            vocabulary=distributions.shape[1],
        )

    def trial(self, message: TrialRequest) -> TrialResult:
        """One request, in its placement."""
        return {"split": self._split, "cloud": self._cloud, "edge": self._edge}[message.placement](message)

    def _edge(self, message: TrialRequest) -> TrialResult:
        """Everything here."""
        held, reused = self._take_up(message)
        if message.reuse != "all":
            held.local.pop(message.repeat, None)
        known = message.repeat in held.local
        local = self._local(held, message.repeat)
        if known and message.replay:
            wait_until(time.monotonic() + local.first_token_s + local.generate_s)
        if local.used:
            reused += ["first_token", "generate"]
        local.used = True
        stages = Stages(
            prefill_s=held.prefill_s, first_token_s=local.first_token_s, generate_s=local.generate_s
        )
        return TrialResult(
            stages=stages,
            e2e_s=stages.total(),
            reused=tuple(reused),
            replayed=message.replay and bool(reused),
            answer=local.text,
            answer_tokens=local.tokens,
            token_s=local.token_s,
        )

    def _split(self, message: TrialRequest) -> TrialResult:
        """Prefill, select, encode here; send; the cloud answers."""
        codec, gold = self._codec(message.codec), self._gold(message.batch, message.example)
        held, reused = self._take_up(message)
        key = (message.codec, message.repeat)
        if message.reuse == "all" and key in held.encoded:
            encoded = held.encoded[key]
            reused += ["select", "encode"]
            if message.replay:
                wait_until(time.monotonic() + encoded.select_s + encoded.encode_s)
        else:
            encoded = self._encode(held, codec, gold)
            if message.reuse == "all":
                held.encoded[key] = encoded
        here = {"prefill_s": held.prefill_s, "select_s": encoded.select_s, "encode_s": encoded.encode_s}
        return self._ask(held, message, encoded, here, reused)

    def _cloud(self, message: TrialRequest) -> TrialResult:
        """The context's text crosses, the cloud does the rest."""
        held = self._hold(message.batch, message.example)
        return self._ask(held, message, Encoded(held.context), {}, [])

    def _take_up(self, message: TrialRequest) -> tuple[Held, list[str]]:
        """The example with its prefill, made now or taken over and, where so asked, waited for; and what a row has to call reused.

        The first row to carry the prefill's time calls it its own, though it was made for the reference.
        """
        if message.reuse == "none":
            self._held = None
        known = self._held is not None and self._held.key == (message.batch, message.example)
        held = self._hold(message.batch, message.example)
        if known and message.replay:
            wait_until(time.monotonic() + held.prefill_s)
        reused = ["prefill"] if held.used else []
        held.used = True
        return held, reused

    def _hold(self, batch: int, example: int) -> Held:
        """The example's prefill: the one at hand, or made now (and timed)."""
        prefix = self.under(self._batches[batch].prefix)
        if self._held is not None and self._held.key == (batch, example):
            return self._held
        self._held = None
        task, chosen = self._batches[batch].task, self._batches[batch].examples[example]
        context, question = task.context_text(chosen), task.question_text(chosen)
        choices = tuple(task.choice_texts(chosen))
        started = self.pace.begin()
        ids = self.model.tokenize(context)
        prefill = prefill_for(self.model, self._needs, ids, prefix.cache)
        took = self.pace.hold() - started
        self._held = Held((batch, example), prefix, context.encode(), question, choices, ids, prefill, took)
        return self._held

    def _local(self, held: Held, repeat: int) -> Local:
        if repeat in held.local:
            return held.local[repeat]
        batch = self._batches[held.key[0]]
        times: list[float] = []
        started = self.pace.begin()
        past = self.behind(held.prefix, held.prefill.cache)
        ids = self.answer(
            self._question(held),
            past,
            batch.max_new_tokens,
            batch.task.stop,
            held.choices,
            lambda index, token: times.append(self.pace.hold()),
        )
        text = self.model.text(ids, batch.task.stop)
        ended = self.pace.hold()
        first = times[0] if times else ended
        local = Local(text, len(ids), per_token(times), first - started, ended - first)
        held.local[repeat] = local
        return local

    def _codec(self, text: str) -> Codec:
        """A codec by its text, read and made once: what it reads from files is no request's cost."""
        from testbed.codecs.codec import Codec

        if text not in self._codecs:
            self._codecs[text] = Codec(parse(text), self.model.name)
        return self._codecs[text]

    def _gold(self, batch: int, example: int) -> list[int]:
        """The gold answer's tokens, which no deployment has: for likelihoods, and for selectors that look at them."""
        made = self._batches[batch]
        return self.model.tokenize(made.task.answer_text(made.examples[example]))

    def _question(self, held: Held) -> list[int]:
        return self.model.tokenize(held.question, closing=held.prefix.closing)

    def _encode(self, held: Held, codec: Codec, gold: list[int]) -> Encoded:
        cache = held.prefill.cache
        if codec.undoes_rope:  # known from the model, once for all requests
            cache = self.model.knowing_ropes(cache)
        example = self._batches[held.key[0]].examples[held.key[1]]
        started = self.pace.begin()
        evidence = gather(
            self.model,
            codec.needs,
            held.prefix.cache,
            held.prefill,
            self._question(held) if codec.needs.question or codec.needs.answer else (),
            gold if codec.needs.answer else (),
            seed=f"{held.key[0]}/{example.id}",
        )
        asked = self.pace.hold()
        kept = codec.select(evidence)
        selected = self.pace.hold()
        payload = codec.encode(cache, kept)
        encode_s = self.pace.hold() - selected
        question_s = asked - started if codec.needs.question else 0.0
        return Encoded(payload, selected - started, encode_s, question_s, codec.spec.shared_bytes)

    def _ask(
        self, held: Held, message: TrialRequest, encoded: Encoded, here: dict[str, float], reused: list[str]
    ) -> TrialResult:
        """Ask the cloud. `here`: the stages that lie behind; `reused`: of them, those taken over."""
        if message.link is None:
            raise ValueError("no link to ask the cloud over")
        self._request += 1
        batch, payload = self._batches[message.batch], encoded.payload
        known = held.answered.get((message.codec, message.repeat), 0) if message.reuse == "all" else 0
        request = wire.Request(
            id=self._request,
            placement=message.placement,
            codec=message.codec,
            prefix=held.prefix.digest,
            question=held.question,
            stop=batch.task.stop,
            max_new_tokens=batch.max_new_tokens,
            payload_crc=zlib.crc32(payload) if message.placement == "cloud" else 0,
            choices=held.choices,
            same_as=known,
            replay=message.replay,
            client=message.link.client,
        )
        answered = self._client.ask(request, payload, message.link)
        if answered.reused:
            reused = [*reused, _REBUILDS[message.placement], "first_token", "generate"]
        elif message.reuse == "all":
            held.answered[message.codec, message.repeat] = request.id
        return TrialResult(
            stages=Stages(**here, **answered.stages),
            e2e_s=sum(here.values()) + answered.elapsed_s,
            reused=tuple(reused),
            replayed=message.replay and bool(reused),
            answer=answered.text,
            answer_tokens=answered.tokens,
            token_s=answered.token_s,
            wire_bytes=answered.wire_bytes,
            retransmits=answered.retransmits,
            congestion=answered.congestion,
            payload_bytes=len(payload),
            shared_bytes=encoded.shared_bytes,
            question_s=encoded.question_s,
            request=request.id,
        )


if __name__ == "__main__":
    main(lambda: Edge().handlers())
