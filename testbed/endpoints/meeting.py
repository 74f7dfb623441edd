"""`meet` at the cloud: the context is prefilled from its beginning while its cache arrives from its end, until the two meet."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from msgspec import structs

from testbed.delivery.delivery import TEXT
from testbed.delivery.meet import Meet
from testbed.endpoints.answering import Answering, Stage
from testbed.endpoints.arrivals import Arrivals, Arrived
from testbed.endpoints.assembly import Parts
from testbed.endpoints.side import Pass, held
from testbed.endpoints.tokens import from_bytes
from testbed.errors import Stopped, WireError
from testbed.models.kvcache import seen_from
from testbed.transport import wire

#: Tokens of a block, at least: of fewer, a context takes much longer than at once (docs/pipeline.md).
_LEAST = {"cpu": 256}
_LEAST_ELSEWHERE = 1024
_MOST_BLOCKS = 128  #: which an answer has to tell


def meet(about: Answering, delivery: Meet, arrivals: Arrivals) -> None:
    """Answers a request whose text comes first, then its cache from the end. Raises PayloadError, WireError, NotFiniteError."""
    meeting = _Meeting(about, delivery, arrivals)
    meeting.come_together()
    if meeting.more_comes:
        about.connection.send(wire.Enough(about.request.id))
    meeting.decode()
    with about.turn():
        with about.work("decode", len(about.arrived) - 1):
            rebuilt = meeting.parts.finish()
        about.session.remember(about.request.id, about.answer(rebuilt))


class _Meeting:
    """Where the two ways are. Tokens of the context up to `_front` are prefilled, those from `_back` on have arrived."""

    def __init__(self, about: Answering, delivery: Meet, arrivals: Arrivals) -> None:
        text = next(iter(arrivals), None)
        if text is None:
            raise WireError("a request without a chunk")
        request, model = about.request, about.side.model
        self.parts = Parts(about.side, about.prefix, request)
        self._about, self._arrivals = about, arrivals
        self._expected = deque(delivery.parts(request.tokens, model.num_layers))
        self._front, self._back = 0, request.tokens
        self._came: deque[Arrived] = deque()  # and are not decoded
        # Of the block under way: its pass, layers that are done, and the work that is timed.
        self._pass, self._layers, self._made = Pass(), 0, Pass()
        self._check(text, text=True)
        ids = from_bytes(text.payload, request.tokens, model.vocabulary)
        self._blocks = model.blocks(ids, about.prefix.cache, stop=self._given_up)
        self._chunk = delivery.chunk
        self._least = max(_LEAST.get(model.device.type, _LEAST_ELSEWHERE), request.tokens // _MOST_BLOCKS)

    @property
    def more_comes(self) -> bool:
        """Whether not all of it has arrived."""
        return self._back > 0

    def come_together(self) -> None:
        """Prefill block by block until all between is there. What has arrived is decoded before the next layer is prefilled: that
        delays what is prefilled, which is met the earlier by what arrives; decoded behind it, it would delay the answer by all
        it takes.
        """
        while self._front < self._look():
            if self._came:
                self._decode(self._came.popleft())
            else:
                self._prefill()

    def _ahead(self) -> int:
        """Up to which token the next block goes: to where the two ways will meet if both go on as so far; at first, half-way.
        Each block costs a processor a pass over the model's weights, and where little arrives there are but two.
        """
        left, arrived = self._back - self._front, self._about.request.tokens - self._back
        share = self._front / (self._front + arrived) if self._front else 0.5
        tokens = max(self._least, math.ceil(left * share))
        return min(self._front + -(-tokens // self._chunk) * self._chunk, self._back)

    def decode(self) -> None:
        """What has arrived of what is not prefilled."""
        while self._came:
            if (arrived := self._came.popleft()).chunk.start >= self._front:
                self._decode(arrived)

    def _check(self, arrived: Arrived, text: bool) -> None:
        """Raises WireError where it is not the next one."""
        chunk, about = arrived.chunk, self._about
        part = self._expected.popleft() if self._expected else None
        is_text = about.request.levels[chunk.level] == TEXT
        if part is None or (chunk.start, chunk.stop) != (part.start, part.stop) or is_text != text:
            raise WireError(f"chunk {chunk.index} is not what comes next of a context that is met half-way")
        about.payload.append(arrived.payload)
        about.arrived.append(arrived.at)

    def _look(self) -> int:
        """From which token on all has arrived."""
        if self._back:
            for arrived in self._arrivals.here():
                self._check(arrived, text=False)
                self._came.append(arrived)
                self._back = arrived.chunk.start
        return self._back

    def _given_up(self) -> bool:
        """Asked before each layer, at the pace at which they are computed: the block under way has arrived meanwhile. What has
        of the tokens behind it is decoded.
        """
        import torch

        about, block = self._about, self._pass
        self._layers += 1
        about.side.pace.hold("prefill", block.tokens, block.past, share=1 / about.side.model.num_layers)
        if self._look() <= self._front:
            return True
        while self._came and self._came[0].chunk.start >= self._front + block.tokens:
            arrived = self._came.popleft()
            with (
                about.amid("prefill", self._made),
                about.work("decode", arrived.chunk.index) as made,
                torch.inference_mode(False),  # ordinary tensors, here too
            ):
                self.parts.take(arrived, made)
        return False

    @contextmanager
    def _work(self, stage: Stage, chunk: int) -> Iterator[Pass]:
        asked = time.monotonic()
        with self._about.turn(), self._about.work(stage, chunk, asked) as made:
            yield made

    def _prefill(self) -> None:
        """The next block, or some layers of one that has come meanwhile."""
        about, start = self._about, self._front
        stop = self._ahead()
        self._pass, self._layers = Pass(stop - start, held(about.prefix.cache) + start), 0
        with self._work("prefill", 0) as self._made, suppress(Stopped):
            cache = self._blocks.run(stop)
            while about.side.pace.times is not None and self._layers < about.side.model.num_layers:
                if self._given_up():  # by a device that is not here, which has not come to its end yet
                    raise Stopped("a replayed pass was given up")
            self._front = stop
        about.worked[-1] = structs.replace(about.worked[-1], tokens=self._front - start)
        if self._front > start:
            prefix = about.prefix.cache
            end = about.request.tokens + (prefix.length if prefix is not None else 0)
            self.parts.put(start, stop, seen_from(cache, end))

    def _decode(self, arrived: Arrived) -> None:
        with self._work("decode", arrived.chunk.index) as made:
            self.parts.take(arrived, made)
