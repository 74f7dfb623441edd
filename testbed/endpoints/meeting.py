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


def meeting_point(tokens: int, chunk: int, front: int, since: float, arrival: float, left: float) -> int:
    """The first token behind `front`, of those that chunks begin with, that will have arrived when those between are computed.

    since: seconds since the first chunk of the `tokens` was begun, from the end; arrival: seconds for each token that arrives;
    left: for each that is computed, which takes as long for each.
    """
    met = (tokens * arrival - since + left * front) / (arrival + left)
    return front + max(1, math.ceil((met - front) / chunk)) * chunk


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
        if request.tokens > wire.MAX_PARTS * delivery.chunk:  # before they are listed
            raise WireError(f"{delivery} of {request.tokens} tokens has more than {wire.MAX_PARTS} parts")
        self.parts = Parts(about.side, about.prefix, request)
        self._about, self._arrivals = about, arrivals
        self._expected = deque(delivery.parts(request.tokens, model.num_layers))
        self._front, self._back = 0, request.tokens
        self._came: deque[Arrived] = deque()  # and are not decoded
        # Of the block under way: its pass, when it began, layers that are begun, tokens of those that are done, the timed work.
        self._pass, self._since, self._layers, self._tokens, self._made = Pass(), 0.0, 0, 0, Pass()
        self._check(text, text=True)
        ids = from_bytes(text.payload, request.tokens, model.vocabulary)
        self._blocks = model.blocks(ids, about.prefix.cache)
        self._chunk = delivery.chunk

    @property
    def more_comes(self) -> bool:
        """Whether not all of it has arrived."""
        return self._back > 0

    def come_together(self) -> None:
        """Prefill all that is missing, in one pass, which shrinks as the other way comes nearer; where it shrank too far, what is
        missing then in another. What has arrived is decoded before the next layer is prefilled: that delays what is prefilled,
        which is met the earlier by what arrives; decoded behind it, it would delay the answer by all it takes.
        """
        while self._front < self._look():
            if self._came:
                self._decode(self._came.popleft())
            else:
                self._prefill()

    def _meeting_point(self) -> int:
        """Up to which token the block is to go on if both ways do as so far."""
        tokens, arrived = self._about.request.tokens, self._about.request.tokens - self._back
        if not arrived or not self._tokens:
            return self._back
        now, came = time.monotonic(), self._about.arrived
        # The next chunk is not there by now.
        arrival = max((came[-1] - came[0]) / arrived, (now - came[0]) / (arrived + self._chunk))
        left = (now - self._since) / self._tokens * (self._about.side.model.num_layers - self._layers)
        return min(self._back, meeting_point(tokens, self._chunk, self._front, now - came[0], arrival, left))

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

    def _wanted(self, layer: bool) -> int:
        """Up to which token the block goes on. Before each layer, at the pace at which they are computed, what has arrived is
        decoded; within one it is only given up where all has.
        """
        import torch

        if not layer:
            return self._look()
        about, block = self._about, self._pass
        if self._layers:
            self._computed()
        stop = min(self._front + block.tokens, self._look())
        while self._came and stop > self._front:
            arrived = self._came.popleft()
            with (
                about.amid("prefill", self._made),
                about.work("decode", arrived.chunk.index) as made,
                torch.inference_mode(False),  # ordinary tensors, here too
            ):
                self.parts.take([arrived], made)
        if stop > self._front:
            stop = min(stop, self._meeting_point())
        block.tokens = stop - self._front
        self._layers += 1
        return stop

    def _computed(self) -> None:
        """A layer of the block."""
        about, block = self._about, self._pass
        about.side.pace.hold("prefill", block.tokens, block.past, share=1 / about.side.model.num_layers)
        self._tokens += block.tokens

    @contextmanager
    def _work(self, stage: Stage, chunk: int) -> Iterator[Pass]:
        asked = time.monotonic()
        with self._about.turn(), self._about.work(stage, chunk, asked) as made:
            yield made

    def _prefill(self) -> None:
        """What is missing, or some layers of it if it has come meanwhile."""
        about, start = self._about, self._front
        self._pass = Pass(self._back - start, held(about.prefix.cache) + start)
        self._layers, self._tokens, self._since = 0, 0, time.monotonic()
        with self._work("prefill", 0) as self._made, suppress(Stopped):
            cache = self._blocks.run(self._back, self._wanted)
            self._computed()
            self._front = self._blocks.done
        about.worked[-1] = structs.replace(about.worked[-1], tokens=self._front - start)
        if self._front > start:
            prefix = about.prefix.cache
            end = about.request.tokens + (prefix.length if prefix is not None else 0)
            self.parts.put(start, self._front, seen_from(cache, end))

    def _decode(self, arrived: Arrived) -> None:
        with self._work("decode", arrived.chunk.index) as made:
            self.parts.take([arrived], made)
