"""A request's chunks at the cloud: read by a thread of its own, so that they arrive while others are decoded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from testbed.deadline import Deadline
from testbed.transport import wire
from testbed.transport.transport import Stream


@dataclass(frozen=True)
class Arrived:
    """One of them, and when its last byte was there (monotonic seconds)."""

    chunk: wire.Chunk
    payload: memoryview
    at: float


class Arrivals:
    """Iterated once, by whoever computes: each as soon as it is there. Raises what reading raises, where it comes."""

    def __init__(self, connection: Stream, request: wire.Request, bound: int, deadline: Deadline) -> None:
        self.times: list[float] = []  #: of each chunk, so far; of one that was lost, when that was known
        self.bytes = 0
        self._connection, self._request = connection, request
        self._frames = connection.receive_context(request, bound, deadline)
        self._changed = threading.Condition()
        self._waiting: deque[Arrived] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for frame in self._frames:
                if isinstance(frame.header, wire.End):
                    self._give_up(frame.header.chunks, frame.at)
                if not isinstance(frame.header, wire.Chunk):
                    break
                arrived = Arrived(frame.header, frame.payload, frame.at)
                if self._request.receipts:
                    self._connection.send(wire.Receipt(self._request.id, frame.header.index, frame.at))
                with self._changed:
                    self.times += [0.0] * (frame.header.index + 1 - len(self.times))
                    self.times[frame.header.index] = frame.at
                    self._waiting.append(arrived)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _give_up(self, chunks: int, at: float) -> None:
        """Of so many chunks, no more comes."""
        with self._changed:
            self.times += [0.0] * (chunks - len(self.times))
            self.times[:] = [came or at for came in self.times]

    def __iter__(self) -> Iterator[Arrived]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                arrived = self._waiting.popleft()
            yield arrived
        self.join()

    def here(self) -> list[Arrived]:
        """Those that are there by now, taken without waiting. Raises what reading raised, behind the last one."""
        with self._changed:
            arrived = list(self._waiting)
            self._waiting.clear()
            if self._error is not None and not arrived:
                raise self._error
        return arrived

    def join(self) -> None:
        """Wait until nothing more comes."""
        self._thread.join()
        if self._error is not None:
            raise self._error
