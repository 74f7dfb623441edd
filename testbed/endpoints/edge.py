"""The edge: holds the context, prefills it, compresses its KV cache, sends it across the link and waits for the answer."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from msgspec import structs

from testbed.codecs import spec
from testbed.codecs.evidence import Needs, blocks_for, gather, prefill_for
from testbed.delivery.adaptive import Adaptive
from testbed.delivery.delivery import SKIP, TEXT, Pipelined, parse
from testbed.delivery.progressive import Progressive
from testbed.delivery.run_lengths import run_lengths
from testbed.endpoints import choice
from testbed.endpoints.at_hand import Encoded, Prefilled, TaskExamples
from testbed.endpoints.choosing import AdaptiveFeed, Outlook
from testbed.endpoints.client import REBUILDS, Client
from testbed.endpoints.experience import Experience, Passes
from testbed.endpoints.feed import Context, Feed, Made
from testbed.endpoints.local import answered_here
from testbed.endpoints.plane_feed import PlaneFeed
from testbed.endpoints.protocol import (
    Asked,
    Cost,
    FullCache,
    HangUp,
    Keep,
    Learn,
    Link,
    Load,
    Loaded,
    Prepare,
    Prepared,
    PreparedExample,
    Reference,
    Show,
    Stock,
    TrialRequest,
    TrialResult,
    Ware,
)
from testbed.endpoints.room import ran_out, within_memory
from testbed.endpoints.scouting import Scouting
from testbed.endpoints.side import Handlers, InferenceSide, Pace, held, main, wait_until
from testbed.endpoints.spans import Span, behind, in_turn
from testbed.endpoints.wares import written, written_parts
from testbed.errors import OutOfMemory
from testbed.tasks.task import make_task
from testbed.transport import wire

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec
    from testbed.codecs.evidence import Evidence
    from testbed.models.prefill import Prefill
    from testbed.models.trail import Trail


class Edge(InferenceSide):
    """One request at a time, as the orchestrator asks."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[TaskExamples] = []
        self._at_hand: Prefilled | None = None
        self._client = Client()
        self._codecs: dict[str, Codec] = {}
        self._needs = Needs()
        self._request = 0
        self._experience: Experience | None = None

    def handlers(self) -> Handlers:
        """What this side does for the orchestrator, by message."""
        own: Handlers = {
            Prepare: self.prepare,
            Reference: self.reference,
            Show: self.show,
            Keep: self.keep,
            Stock: self.stock,
            TrialRequest: self.trial,
            HangUp: self.hang_up,
        }
        return {**super().handlers(), **own}

    def load(self, message: Load) -> Loaded:
        """What this side computes is timed off every clock, and waited for where a trial's clock runs; parts have paces of their
        own, on it.
        """
        loaded = super().load(message)
        self.pace = self.pace.another(waits=False)
        return loaded

    def prepare(self, message: Prepare) -> Prepared:
        """Make a task's examples with this model's tokenizer and prefill its prefix."""
        from testbed.endpoints.examples import longest_context, prompted

        def count(text: str) -> int:
            return len(self.model.tokenize(text))

        task = prompted(self.model, make_task(message.task, **message.parameters), message.prompt)
        examples = task.examples(message.count, message.context_tokens, count, message.seed)
        max_new_tokens = message.max_new_tokens or task.max_new_tokens
        self._needs = Needs.of_all(self._codec(text).needs for text in message.codecs)
        opening = len(self.model.tokenize(task.prefix, start=True))
        reach = task.reach(examples, count, opening, max_new_tokens)
        prefix = Learn(task.prefix, reach, task.closing)
        self._batches.append(TaskExamples(task, examples, self.learn(prefix), max_new_tokens))
        longest = longest_context(self.model, task, examples, max_new_tokens)
        # The first prefill of a size pays for memory and thread pools, which is no example's own cost.
        warm = self.model.tokenize(task.context_text(examples[0]))
        before = self.under(self._batches[-1].prefix).cache
        with contextlib.suppress(OutOfMemory):  # which the trials will say, each in its row
            within_memory(lambda: prefill_for(self.model, self._needs, warm, before))
        told = [PreparedExample(replace(e, context="", choices=()), task.answer_text(e)) for e in examples]
        return Prepared(len(self._batches) - 1, prefix, longest, tuple(told))

    def reference(self, message: Reference) -> FullCache:
        """The example's answer, NLL and next-token distributions with the full cache on this machine alone."""
        from testbed.models.likelihood import mean_nll, to_bytes
        from testbed.models.trail import Trail

        prefilled, trail = self._prefilled(message.batch, message.example), Trail()
        local = self._local(prefilled, 0, trail)
        about = (len(prefilled.ids), prefilled.prefill.cache.nbytes, local.answer)
        if self.model.stands_in:
            return FullCache(*about, None, b"", 0)
        past = self.behind(prefilled.prefix, prefilled.prefill.cache)
        distributions = self.model.likelihood(prefilled.question(self.model), prefilled.gold, past, trail)
        return FullCache(
            *about,
            nll=mean_nll(distributions, prefilled.gold),
            distributions=to_bytes(distributions),
            vocabulary=distributions.shape[1],
        )

    def show(self, message: Show) -> Asked:
        """An example's texts."""
        return self._batches[message.batch].asked(message.example)

    def trial(self, message: TrialRequest) -> TrialResult:
        """One request, in its placement. Where memory runs out, nothing is kept of its example."""
        try:
            return self._trial(message)
        except Exception as error:
            if ran_out(error):
                self._at_hand = None
            raise

    def hang_up(self, message: HangUp) -> Cost:
        """Close the latest trial's connection."""
        return self._client.hang_up()

    def _trial(self, message: TrialRequest) -> TrialResult:
        if message.placement == "edge":
            return self._edge(message)
        if message.link is None:
            raise ValueError("no link to ask the cloud over")
        delivery = parse(message.delivery)
        if isinstance(delivery, Pipelined):
            return self._feed(message, message.link, delivery)
        own = {"split": self._split, "store": self._store, "cloud": self._cloud, "scout": self._scout}
        return own[message.placement](message, message.link)

    def _edge(self, message: TrialRequest) -> TrialResult:
        """Everything here."""
        prefilled, reused = self._take_up(message)
        started = time.monotonic()
        if message.reuse != "all":
            prefilled.local.pop(message.repeat, None)
        local = self._local(prefilled, message.repeat)
        if message.replay:
            wait_until(started + local.stages.first_token_s + local.stages.generate_s)
        prefilled.local[message.repeat] = structs.replace(local, reused=("first_token", "generate"))
        reused += local.reused
        return structs.replace(local, reused=tuple(reused), replayed=message.replay and bool(reused))

    def _split(self, message: TrialRequest, link: Link) -> TrialResult:
        """Prefill, select, encode here; send; the cloud answers."""
        prefilled, reused = self._take_up(message)
        started = time.monotonic()
        encoded, known = self._encoded(prefilled, message)
        reused += ["select", "encode"] if known else []
        if message.replay:
            wait_until(started + encoded.select_s + encoded.encode_s)
        here = in_turn(prefill=prefilled.prefill_s, select=encoded.select_s, encode=encoded.encode_s)
        return self._ask(prefilled, message, link, encoded, here, reused)

    def _store(self, message: TrialRequest, link: Link) -> TrialResult:
        """The context was prefilled earlier, and encoded where the request does not decide what is sent of it."""
        prefilled = self._prefilled(message.batch, message.example)
        started = time.monotonic()
        encoded, known = self._encoded(prefilled, message)
        reused, here = [], list[Span]()
        if self._codec(message.codec).asks:
            reused = ["select", "encode"] if known else []
            if message.replay:
                wait_until(started + encoded.select_s + encoded.encode_s)
            here = in_turn(select=encoded.select_s, encode=encoded.encode_s)
        result = self._ask(prefilled, message, link, encoded, here, reused)
        stored_s = 0.0 if here else encoded.select_s + encoded.encode_s
        return structs.replace(result, store_prefill_s=prefilled.prefill_s, store_encode_s=stored_s)

    def _encoded(self, prefilled: Prefilled, message: TrialRequest) -> tuple[Encoded, bool]:
        """The payload, and whether it is an earlier trial's."""
        scouts = message.placement == "scout"
        key = (f"scout {message.codec}" if scouts else message.codec, message.repeat)
        if message.reuse == "all" and key in prefilled.encoded:
            return prefilled.encoded[key], True
        encoded = self._encode(prefilled, self._codec(message.codec), scouts)
        if message.reuse == "all":
            prefilled.encoded[key] = encoded
        return encoded, False

    def stock(self, message: Stock) -> None:
        """Encode what a trial will find stored."""
        trial, delivery = message.trial, parse(message.trial.delivery)
        if isinstance(delivery, Pipelined):
            self._parts_of(trial, delivery)
        elif not self._codec(trial.codec).asks:
            self._encoded(self._prefilled(trial.batch, trial.example), trial)

    def _parts_of(self, message: TrialRequest, delivery: Pipelined) -> tuple[Prefilled, Context, Feed]:
        """The context in parts; what is to be stored of them is."""
        if message.reuse == "none":
            self._at_hand = None
        prefilled, stored = self._prefilled(message.batch, message.example), message.placement == "store"
        made = prefilled.made.setdefault((message.placement, message.delivery, message.repeat), Made())
        if message.reuse == "prefill":
            made.gathered, made.kept, made.payloads = {}, {}, {}
        levels, cache = delivery.ladder(message.codec), prefilled.prefix.cache
        context = Context(
            ids=prefilled.ids,
            begin=cache.length if cache is not None else 0,
            num_layers=self.model.num_layers,
            vocabulary=self.model.vocabulary,
            codecs={level: self._codec(level) for level in levels if level not in (TEXT, SKIP)},
            blocks=lambda: blocks_for(self.model, self._needs, prefilled.ids, cache),
            held=held(cache),
            gather=lambda codec, prefill, pace: self._gathered(prefilled, codec, prefill, pace),
            knowing=self.model.knowing_ropes,
            pace=self.pace.another,
            stored=prefilled.prefill if stored else None,
            made=made,
        )
        feed = self._feed_of(context, delivery, levels, prefilled, message)
        if stored:
            feed.store()
        return prefilled, context, feed

    def _feed(self, message: TrialRequest, link: Link, delivery: Pipelined) -> TrialResult:
        """The context in parts, each made while others cross."""
        prefilled, context, feed = self._parts_of(message, delivery)
        key = (message.codec, message.delivery, message.repeat)
        known = prefilled.answered.get(key, 0) if message.reuse == "all" else 0
        request = self._request_for(prefilled, message, link, known, feed.levels)
        request = structs.replace(request, receipts=feed.asks_receipts)
        answered = self._client.feed(request, feed, link)
        prefilled.answered[key] = request.id
        done = max(span.end for span in answered.spans)
        here = [span._replace(end=min(span.end, done)) for span in feed.spans if span.start < done]
        spans = [*here, *answered.spans]
        result = answered.result(message, spans, sorted(feed.reused))
        first_token_s = result.e2e_s - result.stages.generate_s
        deadline_s = delivery.deadline if isinstance(delivery, Adaptive) else None
        if isinstance(feed, AdaptiveFeed):
            feed.learn(spans, first_token_s)
        if isinstance(feed, PlaneFeed):
            feed.answered(answered.answer.planes)
        return structs.replace(
            result,
            deadline_s=deadline_s,
            met=None if deadline_s is None else first_token_s <= deadline_s,
            replayed=bool(feed.reused),
            payload_bytes=feed.payload_bytes,
            shared_bytes=max((codec.spec.shared_bytes for codec in context.codecs.values()), default=0),
            chunks=len(feed.sent),
            levels=run_lengths(feed.sent),
            tokens_left_out=answered.answer.left_out,
            store_prefill_s=prefilled.prefill_s if message.placement == "store" else 0.0,
            store_encode_s=feed.stored_s,
            planes=answered.answer.planes or None,
            changed=None if self.model.stands_in else result.changed,
        )

    def _feed_of(
        self,
        context: Context,
        delivery: Pipelined,
        levels: tuple[str, ...],
        prefilled: Prefilled,
        message: TrialRequest,
    ) -> Feed:
        """The parts, and who chooses their levels."""
        if isinstance(delivery, Progressive):
            return PlaneFeed(context, delivery, levels)
        if not isinstance(delivery, Adaptive):
            return Feed(context, delivery, levels)
        token_s = prefilled.prefill_s / len(prefilled.ids)
        if self._experience is None:
            own = len(prefilled.ids), prefilled.prefill_s / self.pace.speed.factor("prefill")
            asked_s = [local.stages.first_token_s for local in prefilled.local.values()]
            self._experience = Experience(Passes(own), max(asked_s, default=0.0))
        shapes = [(s.kv_heads, s.head_dim, s.value_dim, s.window) for s in self.model.shapes]
        link = message.link.name if message.link else ""
        outlook = Outlook(shapes, token_s, self._experience, link, message.rate)
        return AdaptiveFeed(context, delivery, outlook)

    def _cloud(self, message: TrialRequest, link: Link) -> TrialResult:
        """The context's text crosses, the cloud does the rest."""
        prefilled = self._prefilled(message.batch, message.example)
        return self._ask(prefilled, message, link, Encoded([prefilled.text]), [], [])

    def keep(self, message: Keep) -> Ware:
        """What a trial has sent, in a file."""
        trial = message.trial
        prefilled = self._prefilled(trial.batch, trial.example)
        if isinstance(delivery := parse(trial.delivery), Pipelined):
            layers, codec = self.model.num_layers, self._codec(trial.codec)
            return written_parts(prefilled, trial, delivery, layers, codec, message.path)
        pieces = [prefilled.text] if trial.placement == "cloud" else self._encoded(prefilled, trial)[0].pieces
        return written(prefilled, pieces, trial, message.path)

    def _scout(self, message: TrialRequest, link: Link) -> TrialResult:
        """The context's text crosses while this side chooses, and then its choice; the cloud prefills, and keeps that."""
        prefilled, reused = self._take_up(message, waits=False)
        encoded, known = self._encoded(prefilled, message)
        reused += ["select", "encode"] if known else []
        takes = {"prefill": prefilled.prefill_s, "select": encoded.select_s, "encode": encoded.encode_s}
        scouting = Scouting(encoded.pieces, len(prefilled.ids), takes)
        request = self._request_for(prefilled, message, link, 0, scouting.levels)
        answered = self._client.feed(request, scouting, link)
        result = answered.result(message, [*scouting.spans, *answered.spans], reused)
        return structs.replace(
            result,
            replayed=bool(reused),
            payload_bytes=sum(map(len, encoded.pieces)),
            question_s=encoded.question_s,
            chunks=len(encoded.pieces),
            levels=",".join(scouting.levels),
            tokens_left_out=0,
        )

    def _take_up(self, message: TrialRequest, waits: bool = True) -> tuple[Prefilled, list[str]]:
        """The example with its prefill, made now or taken over (waited for, where so asked), and what a row has to call reused.

        The first row to carry the prefill's time calls it its own, though it was made for the reference.
        """
        if message.reuse == "none":
            self._at_hand = None
        started = time.monotonic()
        prefilled = self._prefilled(message.batch, message.example)
        if message.replay and waits:
            wait_until(started + prefilled.prefill_s)
        reused = ["prefill"] if prefilled.used else []
        prefilled.used = True
        return prefilled, reused

    def _prefilled(self, batch: int, example: int) -> Prefilled:
        """The example's prefill: the one at hand, or made now (and timed)."""
        own = self._batches[batch]
        prefix = self.under(own.prefix)
        if self._at_hand is not None and self._at_hand.key == (batch, example):
            return self._at_hand
        self._at_hand = None
        chosen = own.examples[example]
        context, gold = own.task.context_text(chosen), self.model.tokenize(own.task.answer_text(chosen))
        started = self.pace.begin()
        ids = self.model.tokenize(context)
        prefill = prefill_for(self.model, self._needs, ids, prefix.cache)
        took = self.pace.hold("prefill", len(ids), held(prefix.cache)) - started
        self._at_hand = Prefilled((batch, example), own, chosen, prefix, gold, ids, prefill, took)
        return self._at_hand

    def _local(self, prefilled: Prefilled, repeat: int, trail: Trail | None = None) -> TrialResult:
        if repeat not in prefilled.local:
            prefilled.local[repeat] = answered_here(self, prefilled, trail)
        return prefilled.local[repeat]

    def _codec(self, text: str) -> Codec:
        """A codec by its text, read and made once: what it reads from files is no request's cost."""
        from testbed.codecs.codec import Codec

        if text not in self._codecs:
            self._codecs[text] = Codec(spec.parse(text), self.model.name)
        return self._codecs[text]

    def _evidence(self, prefilled: Prefilled, codec: Codec, prefill: Prefill) -> Evidence:
        return gather(
            self.model,
            codec.needs,
            prefilled.prefix.cache,
            prefill,
            prefilled.question(self.model) if codec.asks else (),
            prefilled.gold if codec.needs.answer else (),
            seed=f"{prefilled.key[0]}/{prefilled.example.id}",
        )

    def _asked(self, prefilled: Prefilled, codec: Codec, pace: Pace) -> float:
        """The question's pass has been made, and the context's second one, where the codec needs them; returns the time."""
        tokens = len(prefilled.question(self.model)) if codec.asks else 0
        tokens += len(prefilled.ids) if codec.needs.reread else 0
        return pace.hold("prefill", tokens, held(prefilled.prefix.cache, prefilled.prefill.cache))

    def _gathered(self, prefilled: Prefilled, codec: Codec, prefill: Prefill, pace: Pace) -> Evidence:
        evidence = self._evidence(prefilled, codec, prefill)
        self._asked(prefilled, codec, pace)
        return evidence

    def _encode(self, prefilled: Prefilled, codec: Codec, scouts: bool = False) -> Encoded:
        cache = prefilled.prefill.cache
        if codec.undoes_rope:  # known from the model, once for all requests
            cache = self.model.knowing_ropes(cache)
        started = self.pace.begin()
        evidence = self._evidence(prefilled, codec, prefilled.prefill)
        asked = self._asked(prefilled, codec, self.pace)
        kept = codec.select(evidence)
        selected = self.pace.hold("codec")
        pieces = (
            choice.pieces(prefilled.ids, self.model.vocabulary, kept) if scouts else codec.chunks(cache, kept)
        )
        encode_s = self.pace.hold("codec") - selected
        question_s = asked - started if codec.needs.question else 0.0
        return Encoded(pieces, selected - started, encode_s, question_s, codec.spec.shared_bytes)

    def _request_for(
        self,
        prefilled: Prefilled,
        message: TrialRequest,
        link: Link,
        same_as: int,
        levels: tuple[str, ...] = (),
    ) -> wire.Request:
        """The next request to the cloud."""
        self._request += 1
        batch, example = prefilled.batch, prefilled.example
        return wire.Request(
            id=self._request,
            placement=message.placement,
            codec=message.codec,
            prefix=prefilled.prefix.digest,
            question=batch.task.question_text(example),
            stop=batch.task.stop,
            max_new_tokens=batch.max_new_tokens,
            choices=tuple(batch.task.choice_texts(example)),
            same_as=same_as,
            replay=message.replay,
            client=link.client,
            delivery=message.delivery,
            levels=levels,
            tokens=len(prefilled.ids) if levels else 0,
        )

    def _ask(
        self,
        prefilled: Prefilled,
        message: TrialRequest,
        link: Link,
        encoded: Encoded,
        here: list[Span],
        reused: list[str],
    ) -> TrialResult:
        """Ask the cloud. `here`: what lies behind; `reused`: of its stages, those taken over."""
        key = (message.codec, message.delivery, message.repeat)
        known = prefilled.answered.get(key, 0) if message.reuse == "all" else 0
        request = self._request_for(prefilled, message, link, known)
        context = parse(message.delivery).send(encoded.pieces)
        answered = self._client.ask(request, context, link)
        if answered.answer.reused:
            reused = [*reused, REBUILDS[message.placement], "first_token", "generate"]
        elif message.reuse == "all":
            prefilled.answered[key] = request.id
        result = answered.result(message, behind(here, answered.spans), reused)
        return structs.replace(
            result,
            payload_bytes=sum(map(len, encoded.pieces)),
            shared_bytes=encoded.shared_bytes,
            question_s=encoded.question_s,
        )


if __name__ == "__main__":
    main(lambda: Edge().handlers())
