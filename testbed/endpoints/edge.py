"""The edge: holds the context, prefills it, compresses its KV cache, sends it across the link and waits for the answer."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from testbed.codecs.evidence import Needs
from testbed.endpoints.gathering import gather, prefill_for
from testbed.endpoints.held import Batch, Encoded, Held, Local
from testbed.endpoints.pace import wait_until
from testbed.endpoints.side import InferenceSide, main, per_token
from testbed.endpoints.uplink import Uplink
from testbed.transport import wire

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec


class Edge(InferenceSide):
    """One request at a time, as the orchestrator asks."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[Batch] = []
        self._held: Held | None = None
        self._uplink = Uplink()
        self._codecs: dict[str, Codec] = {}
        self._needs = Needs()
        self._request = 0

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """The orchestrator's calls."""
        return {
            "load": self.load,
            "compute": self.compute,
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
        from testbed.endpoints.examples import longest_context, make_examples, told

        made, examples = make_examples(self.model, task, parameters, count, context_tokens, seed, prompt)
        max_new_tokens = max_new_tokens or made.max_new_tokens
        self._needs = Needs.of_all(self._codec(text).needs for text in codecs)
        opening = len(self.model.tokenize(made.prefix, start=True))
        reach = made.reach(examples, lambda text: len(self.model.tokenize(text)), opening, max_new_tokens)
        prefix = self.learn_prefix(made.prefix, reach, made.closing)
        self._batches.append(Batch(made, examples, prefix, max_new_tokens))
        longest = longest_context(self.model, made, examples, max_new_tokens)
        # The first prefill of a size pays for memory and thread pools, which is no example's own cost.
        warm = self.model.tokenize(made.context_text(examples[0]))
        prefill_for(self.model, self._needs, warm, self.under(prefix).cache)
        return {
            "batch": len(self._batches) - 1,
            "prefix_text": made.prefix,
            "reach": reach,
            "closing": made.closing,
            "longest": longest,
            "examples": [told(made, example) for example in examples],
        }

    def reference(self, batch: int, example: int) -> dict[str, Any]:
        """The example's answer, NLL and next-token distributions with the full cache on this machine alone.

        Makes it the example at hand.
        """
        from testbed.models.likelihood import mean_nll, to_bytes

        held = self._hold(batch, example)
        local = self._local(held, 0)
        past = self.behind(held.prefix, held.prefill.cache)
        gold = self._gold(batch, example)
        found = self.model.likelihood(self._question(held), gold, past)
        return {
            "context_tokens": len(held.ids),
            "kv_bytes": held.prefill.cache.nbytes,
            "answer": local.text,
            "nll": mean_nll(found, gold),
            "distributions": to_bytes(found),
            "vocabulary": found.shape[1],
        }

    def edge(self, batch: int, example: int, repeat: int, reuse: str, replay: bool = False) -> dict[str, Any]:
        """`edge` placement: everything here."""
        if reuse == "none":
            self._held = None
        held, reused = self._take_up(batch, example, replay)
        if reuse != "all":
            held.local.pop(repeat, None)
        known = repeat in held.local
        local = self._local(held, repeat)
        if known and replay:
            wait_until(time.monotonic() + local.first_token_s + local.generate_s)
        if local.used:
            reused += ["first_token", "generate"]
        local.used = True
        stages = {
            "prefill_s": held.prefill_s,
            "first_token_s": local.first_token_s,
            "generate_s": local.generate_s,
        }
        return {
            "stages": stages,
            "e2e_s": sum(stages.values()),
            "reused": reused,
            "replayed": replay and bool(reused),
            "answer": local.text,
            "answer_tokens": local.tokens,
            "token_s": local.token_s,
            "wire_bytes": 0,
            "retransmits": 0,
            "payload_bytes": 0,
            "congestion": "",
        }

    def split(
        self,
        batch: int,
        example: int,
        codec: str,
        repeat: int,
        reuse: str,
        link: dict[str, Any],
        replay: bool = False,
    ) -> dict[str, Any]:
        """`split` placement: prefill, select, encode here; send; the cloud answers."""
        made, gold = self._codec(codec), self._gold(batch, example)
        if reuse == "none":
            self._held = None
        held, reused = self._take_up(batch, example, replay)
        key = (codec, repeat)
        if reuse == "all" and key in held.encoded:
            encoded = held.encoded[key]
            reused += ["select", "encode"]
            if replay:
                wait_until(time.monotonic() + encoded.select_s + encoded.encode_s)
        else:
            encoded = self._encode(held, made, gold)
            if reuse == "all":
                held.encoded[key] = encoded
        here = {
            "prefill_s": held.prefill_s,
            "select_s": encoded.select_s,
            "encode_s": encoded.encode_s,
        }
        result = self._ask(held, "split", key, encoded.payload, reuse, replay, link)
        result["e2e_s"] += sum(here.values())
        result["stages"] |= here
        result["question_s"] = encoded.question_s
        result["reused"] = reused + result["reused"]
        result["replayed"] = replay and bool(result["reused"])
        result["shared_bytes"] = encoded.shared_bytes
        return result

    def cloud(
        self,
        batch: int,
        example: int,
        repeat: int,
        reuse: str,
        link: dict[str, Any],
        replay: bool = False,
    ) -> dict[str, Any]:
        """`cloud` placement: the context's text crosses, the cloud does the rest."""
        held = self._hold(batch, example)
        result = self._ask(held, "cloud", ("", repeat), held.context, reuse, replay, link)
        result["replayed"] = replay and bool(result["reused"])
        return result

    def _take_up(self, batch: int, example: int, replay: bool) -> tuple[Held, list[str]]:
        """The example with its prefill, made now or taken over and, with `replay`, waited for; and what a row has to call reused.

        The first row to carry the prefill's time calls it its own, though it was made for the reference.
        """
        known = self._held is not None and self._held.key == (batch, example)
        held = self._hold(batch, example)
        if known and replay:
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
        """A codec by its text, made once: what it reads from files is no request's cost."""
        from testbed.codecs.codec import Codec

        if text not in self._codecs:
            self._codecs[text] = Codec(text, self.model.name)
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
        self,
        held: Held,
        placement: str,
        key: tuple[str, int],
        payload: bytes | bytearray | memoryview,
        reuse: str,
        replay: bool,
        link: dict[str, Any],
    ) -> dict[str, Any]:
        """Ask the cloud; returns the stages from `connect_s` on, the time that they took, and what was counted.

        key: codec and repeat, by which a later request finds this answer again.
        """
        self._request += 1
        batch = self._batches[held.key[0]]
        request = wire.Request(
            id=self._request,
            placement=placement,
            codec=key[0],
            prefix=held.prefix.digest,
            question=held.question,
            stop=batch.task.stop,
            max_new_tokens=batch.max_new_tokens,
            payload_crc=zlib.crc32(payload) if placement == "cloud" else 0,
            choices=held.choices,
            same_as=held.answered.get(key, 0) if reuse == "all" else 0,
            replay=replay,
            client=link.get("client", ""),
        )
        answered = self._uplink.ask(request, payload, link)
        if reuse == "all" and not answered.reused:
            held.answered[key] = request.id
        return {
            "request": request.id,
            "stages": answered.stages,
            "e2e_s": answered.elapsed_s,
            "reused": _cloud_reuse(placement) if answered.reused else [],
            "answer": answered.text,
            "answer_tokens": answered.tokens,
            "token_s": answered.token_s,
            "wire_bytes": answered.wire_bytes,
            "retransmits": answered.retransmits,
            "payload_bytes": len(payload),
            "congestion": answered.congestion,
        }


def _cloud_reuse(placement: str) -> list[str]:
    return ["prefill" if placement == "cloud" else "decode", "first_token", "generate"]


if __name__ == "__main__":
    main(lambda: Edge().handlers())
