"""The edge: holds the context, prefills it, compresses its KV cache, sends it across the link and waits for the answer."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

from testbed.codecs.evidence import Needs
from testbed.endpoints import wire
from testbed.endpoints.gathering import gather, prefill_for
from testbed.endpoints.held import Batch, Encoded, Held
from testbed.endpoints.inference import InferenceSide, main
from testbed.endpoints.uplink import Uplink


class Edge(InferenceSide):
    """One request at a time, as the orchestrator asks."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[Batch] = []
        self._held: Held | None = None
        self._uplink = Uplink()
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
        from testbed.codecs.codec import Codec
        from testbed.endpoints.preparing import longest_context, make_examples, told

        made, examples = make_examples(self.model, task, parameters, count, context_tokens, seed, prompt)
        max_new_tokens = max_new_tokens or made.max_new_tokens
        self._needs = Needs.of_all(Codec(text, self.model.name).needs for text in codecs)
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
        result = self._ask(held, "split", codec, encoded.payload, repeat, reuse, link)
        result["e2e_s"] += carried - started
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
        result = self._ask(held, "cloud", "", payload, repeat, reuse, link)
        result["e2e_s"] -= started
        return result

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
        self._held = Held(
            (batch, example),
            prefix,
            context,
            question,
            choices,
            ids,
            self.model.tokenize(question, closing=prefix.closing),
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

    def _ask(
        self,
        held: Held,
        placement: str,
        codec: str,
        payload: bytes | bytearray | memoryview,
        repeat: int,
        reuse: str,
        link: dict[str, Any],
    ) -> dict[str, Any]:
        """Ask the cloud; returns the stages from `connect_s` on and what was counted. `e2e_s` is the time at which the answer
        was whole: the caller takes off when its request began.
        """
        self._request += 1
        batch = self._batches[held.key[0]]
        request = wire.Request(
            id=self._request,
            placement=placement,
            codec=codec,
            prefix=held.prefix.digest,
            question=held.question_text,
            stop=batch.task.stop,
            max_new_tokens=batch.max_new_tokens,
            payload_crc=zlib.crc32(payload) if placement == "cloud" else 0,
            repeat=repeat,
            choices=held.choices,
            reuse=reuse == "all",
        )
        answered = self._uplink.ask(request, payload, link)
        return {
            "request": request.id,
            "stages": answered.stages,
            "e2e_s": answered.ended,
            "reused": _cloud_reuse(placement) if answered.reused else [],
            "answer": answered.text,
            "wire_bytes": answered.wire_bytes,
            "retransmits": answered.retransmits,
            "payload_bytes": len(payload),
            "congestion": answered.congestion,
        }


def _cloud_reuse(placement: str) -> list[str]:
    return (["prefill"] if placement == "cloud" else []) + ["decode", "first_token", "generate"]


if __name__ == "__main__":
    main(lambda: Edge().handlers())
