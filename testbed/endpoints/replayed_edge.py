"""An edge without a model: what it sends was made beforehand, and what making it took is waited for. It asks by itself, as a load
has it, and tells afterwards what came of that.

It is a device that prepares one request at a time, and sends one at a time over its own link; requests come up whatever became of
those before them. What has been sent is waited for without holding up anything else.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from testbed import files
from testbed.delivery.run_lengths import run_lengths
from testbed.endpoints.client import REBUILDS, Answered, Client
from testbed.endpoints.experience import Experience, Passes
from testbed.endpoints.load_messages import Collect, Collected, Happened, Looping, Offer, Planned, Stage
from testbed.endpoints.protocol import Greeting, Hello, Link, Span, TrialRequest, TrialResult, Ware
from testbed.endpoints.replayed_feed import ReplayedChoice, ReplayedFeed
from testbed.endpoints.room import within_memory
from testbed.endpoints.side import Handlers, main, wait_until
from testbed.errors import EndpointError, RefusedError, TestbedError
from testbed.transport import wire
from testbed.transport.transport import Bytes
from testbed.transport.transport import parse as parse_transport


@dataclass
class _Asked:
    """A request that has come up. `came_at`: monotonic seconds; then: what is done once it has ended; `handed`: all of it is on
    its way; `feed`: where it is made and sent in parts."""

    planned: Planned
    came_at: float
    then: Callable[[], None]
    spans: list[Span] = field(default_factory=list)
    handed: threading.Event = field(default_factory=threading.Event)
    feed: ReplayedFeed | ReplayedChoice | None = None


class _Line:
    """Does one thing after another, in a thread of its own, in the order in which they came."""

    def __init__(self, work: Callable[[_Asked], None]) -> None:
        self._queue: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._work = work
        self.put = self._queue.put
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work(self._queue.get())


class ReplayedEdge:
    """Wares, a link, and what became of requests since somebody asked."""

    def __init__(self) -> None:
        self._wares: dict[int, Ware] = {}
        self._payloads: dict[str, memoryview] = {}  #: by file
        self._link: Link | None = None
        self._experience = Experience(Passes((1, 0.0)))  #: of requests over that link whose levels are chosen
        self._clients: queue.SimpleQueue[Client] = queue.SimpleQueue()  #: that nobody uses
        self._changed = threading.Lock()
        self._happened: list[Happened] = []
        self._open = 0
        self._ends = 0.0  #: monotonic seconds from which on nothing more is begun
        self._origin = 0.0
        self._device, self._uplink = _Line(self._prepare), _Line(self._send)

    def handlers(self) -> Handlers:
        """What it does for the orchestrator, by message."""
        own: Handlers = {Stage: self.stage, Offer: self.offer, Collect: self.collect}
        return {Hello: lambda message: Greeting(), **own}

    def stage(self, message: Stage) -> None:
        """Have these wares at hand, and that link; connections that were kept go."""
        parse_transport(message.link.transport).prepare()
        self._wares, self._link = message.wares, message.link
        self._experience = Experience(Passes((1, 0.0)))
        with contextlib.suppress(queue.Empty):
            while True:
                self._clients.get_nowait().close()
        paths = {ware.path for ware in message.wares.values()}
        self._payloads = {path: self._payloads.get(path) or _mapped(Path(path)) for path in paths}

    def offer(self, message: Offer) -> None:
        """Ask, from now on."""
        assert self._link is not None
        self._origin = message.origin
        self._ends = message.origin + message.until_s + self._link.timeout
        self._open += len(message.planned) + len(message.looping)
        if message.planned:
            threading.Thread(target=self._come_up, args=(message,), daemon=True).start()
        for client in message.looping:
            threading.Thread(target=self._loop, args=(message, client), daemon=True).start()

    def collect(self, message: Collect) -> Collected:
        """What became of requests since this was asked last."""
        with self._changed:
            happened, self._happened = tuple(self._happened), []
            return Collected(happened, self._open)

    def _come_up(self, message: Offer) -> None:
        for planned in message.planned:
            at = message.origin + planned.at
            wait_until(at)
            self._device.put(_Asked(planned, at, self._close))

    def _loop(self, message: Offer, client: Looping) -> None:
        number, at = client.number, message.origin + client.at
        for turn in range(1 << 40):
            wait_until(at)
            if at - message.origin >= message.until_s:
                break
            ware = client.wares[turn % len(client.wares)]
            planned = Planned(number, at - message.origin, client.client, ware)
            answered = threading.Event()
            self._device.put(_Asked(planned, at, answered.set))
            answered.wait()
            number, at = number + client.stride, time.monotonic() + message.think_s
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._open -= 1

    def _prepare(self, asked: _Asked) -> None:
        """What the edge computes of a request: waited for."""
        if (at := time.monotonic()) > self._ends:
            self._ended(asked, error="given up: its turn at the edge had not come by the load's end")
            return
        ware = self._wares[asked.planned.ware]
        asked.spans.append(Span("edge_queue", asked.came_at, at))
        if ware.parts is not None:
            pieces = list(_pieces(self._payloads[ware.path], ware.lengths))
            if ware.parts.choices:
                assert self._link is not None
                about = (asked.came_at, self._experience, self._link.name)
                asked.feed = ReplayedChoice(ware, pieces, asked.handed.set, *about)
            else:
                asked.feed = ReplayedFeed(ware, pieces, asked.handed.set)
            self._uplink.put(asked)
            threading.Thread(target=self._ask, args=(asked,), daemon=True).start()
            asked.feed.make()
            return
        for stage in ("prefill", "select", "encode"):
            ended = at + float(getattr(ware, f"{stage}_s"))
            asked.spans.append(Span(stage, at, ended))
            at = ended
        wait_until(at)
        self._uplink.put(asked)

    def _send(self, asked: _Asked) -> None:
        """Its way onto the link: whoever is behind it waits until all of it is handed over."""
        if asked.feed is not None:
            asked.feed.grant()
            asked.handed.wait()
            return
        if (at := time.monotonic()) > self._ends:
            self._ended(asked, error="given up: its turn at the link had not come by the load's end")
            return
        asked.spans.append(Span("link_queue", asked.spans[-1].end, at))
        threading.Thread(target=self._ask, args=(asked,), daemon=True).start()
        asked.handed.wait()

    def _ask(self, asked: _Asked) -> None:
        assert self._link is not None
        try:
            client = self._clients.get_nowait()
        except queue.Empty:
            client = Client()
        try:
            result = within_memory(lambda: self._answered(asked, client, self._link))
            self._clients.put(client)
            self._ended(asked, result)
        except RefusedError as error:
            self._ended(asked, error=str(error), refused=True)
        except TestbedError as error:
            self._ended(asked, error=str(error))
        except BaseException as error:
            self._ended(asked, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            if asked.feed is not None:
                asked.feed.stop()
            asked.handed.set()

    def _answered(self, asked: _Asked, client: Client, link: Link | None) -> TrialResult:
        assert link is not None
        ware, planned = self._wares[asked.planned.ware], asked.planned
        request = wire.Request(
            id=planned.number + 1,
            placement=ware.placement,
            codec=ware.codec,
            prefix=ware.prefix,
            question=ware.question,
            stop=ware.stop,
            max_new_tokens=ware.max_new_tokens,
            choices=ware.choices,
            same_as=planned.ware,
            replay=True,
            delivery=ware.delivery,
            client=planned.client,
        )
        if asked.feed is not None and ware.parts is not None:
            request = structs.replace(
                request,
                levels=asked.feed.levels,
                tokens=ware.parts.tokens,
                receipts=asked.feed.asks_receipts,
            )
            return _of_parts(client.feed(request, asked.feed, link), asked.feed, asked.spans)
        payload = self._payloads[ware.path]
        answered = client.ask(request, list(_pieces(payload, ware.lengths)), link, asked.handed.set)
        message = TrialRequest("split", 0, 0, replay=True)
        reused = ["prefill", "select", "encode"] if ware.placement != "cloud" else []
        reused += [REBUILDS[ware.placement], "first_token", "generate"]
        return answered.result(message, [*asked.spans, *answered.spans], reused)

    def _ended(
        self, asked: _Asked, result: TrialResult | None = None, error: str = "", refused: bool = False
    ) -> None:
        planned = asked.planned
        what = Happened(
            planned.number, planned.client, max(0.0, asked.came_at - self._origin), planned.ware, result
        )
        what.error, what.refused = error[:2000], refused
        what.ended = max(0.0, time.monotonic() - self._origin)
        with self._changed:
            self._happened.append(what)
        asked.then()


def _of_parts(answered: Answered, feed: ReplayedFeed | ReplayedChoice, before: list[Span]) -> TrialResult:
    done = max(span.end for span in answered.spans)
    here = [span._replace(end=min(span.end, done)) for span in feed.spans if span.start < done]
    message = TrialRequest("split", 0, 0, replay=True)
    reused = [*sorted(feed.reused), REBUILDS["split"], "first_token", "generate"]
    spans = [*before, *here, *answered.spans]
    result = structs.replace(
        answered.result(message, spans, reused),
        chunks=len(feed.sent),
        levels=run_lengths(feed.sent),
        tokens_left_out=answered.answer.left_out,
    )
    if isinstance(feed, ReplayedFeed):
        return result
    first_token_s, deadline_s = result.e2e_s - result.stages.generate_s, feed.deadline_s
    feed.learn(spans, first_token_s)
    return structs.replace(
        result,
        payload_bytes=feed.payload_bytes,
        deadline_s=deadline_s,
        met=None if deadline_s is None else first_token_s <= deadline_s,
    )


def _mapped(path: Path) -> memoryview:
    """A file's bytes, which all processes that have it share. Raises StorageError, EndpointError."""
    with files.open_named(path) as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise EndpointError(f"{path}: cannot be held in memory: {error}") from error


def _pieces(payload: memoryview, lengths: tuple[int, ...]) -> Iterator[Bytes]:
    start = 0
    for length in lengths:
        yield payload[start : start + length]
        start += length


if __name__ == "__main__":
    main(lambda: ReplayedEdge().handlers())
