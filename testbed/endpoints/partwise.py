"""How a request is answered whose context comes in parts: each is rebuilt while later ones cross the link."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import structs

from testbed.delivery.delivery import Pipelined
from testbed.delivery.meet import Meet
from testbed.delivery.progressive import Progressive
from testbed.endpoints.answering import Answering
from testbed.endpoints.arrivals import Arrivals, Arrived
from testbed.endpoints.assembly import Layers, Parts, Planes
from testbed.endpoints.meeting import meet
from testbed.endpoints.verifying import verify
from testbed.errors import PayloadError, WireError


def partwise(about: Answering, delivery: Pipelined, arrivals: Arrivals) -> None:
    """Answers it, as its delivery has it. Raises PayloadError, WireError, NotFiniteError."""
    request, model = about.request, about.side.model
    if not request.levels or not 0 < request.tokens <= model.max_positions:
        raise WireError(f"a request in parts of {request.tokens} tokens at {len(request.levels)} levels")
    if isinstance(delivery, Meet):
        meet(about, delivery, arrivals)
        return
    if isinstance(delivery, Progressive):
        _by_planes(about, delivery.planes, arrivals)
        return
    layers = delivery.parts(1, model.num_layers)[0].by == "layers"
    (_by_layers if layers else _by_tokens)(about, arrivals)


def _by_tokens(about: Answering, arrivals: Arrivals) -> None:
    """Each part is decoded in a turn of its own, texts that wait together are computed in one; the question is read when all are
    there.
    """
    parts, waiting = Parts(about.side, about.prefix, about.request), deque[Arrived]()
    for first in arrivals:
        waiting.append(first)
        while waiting:
            with about.turn():
                waiting += arrivals.here()
                run = parts.next(waiting)
                last = run[-1]
                with about.work(parts.stage(last), last.chunk.index, last.at) as made:
                    parts.take(run, made)
            about.worked[-1] = structs.replace(about.worked[-1], tokens=made.tokens)
            about.payload += [arrived.payload for arrived in run]
    about.arrived = arrivals.times
    if not about.arrived:
        raise WireError("a request without a chunk")
    with about.turn():
        with about.work("decode", len(about.arrived) - 1):
            rebuilt = parts.finish()
        about.session.remember(about.request.id, about.answer(rebuilt))


def _by_planes(about: Answering, count: int, arrivals: Arrivals) -> None:
    """The answer is given from the first planes, and verified when all are there."""
    coming, planes = iter(arrivals), Planes(about.side, about.prefix, about.request)
    for arrived in coming:
        planes.take(arrived)
        if len(planes.arrived) > count:  # the first chunk is what planes are read with
            break
    first = planes.arrived[: count + 1]
    if not first:
        raise WireError("a request without the chunk that its others are read with")
    about.payload, about.arrived = [one.payload for one in first], [one.at for one in first]
    with about.turn():
        with about.work("decode", first[-1].chunk.index, first[-1].at):
            rebuilt = planes.rebuilt(len(first))
        served = about.answer(rebuilt)
        about.session.remember(about.request.id, served)
    for arrived in coming:
        planes.take(arrived)
    about.go_on()
    later = planes.arrived[len(first) :]
    if not later and not rebuilt.missing:
        verify(about, served, None, [])
        return
    with about.turn():
        with about.work("decode", planes.arrived[-1].chunk.index):
            rebuilt = planes.rebuilt(len(planes.arrived))
        if rebuilt.missing:
            raise PayloadError(rebuilt.missing)
        verify(about, served, rebuilt, [one.at for one in later])


def _by_layers(about: Answering, arrivals: Arrivals) -> None:
    """The question is read through the layers that are there; the next one, when it is wanted, is waited for and decoded."""
    coming = iter(arrivals)

    def take(arrived: Arrived) -> None:
        with about.work("decode", arrived.chunk.index, arrived.at):
            layers.take(arrived)
        about.payload.append(arrived.payload)

    @contextmanager
    def next_part() -> Iterator[None]:
        with about.idle():
            arrived = next(coming, None)
        if arrived is None:
            raise WireError("the layers of a context did not all come")
        take(arrived)
        about.begin()
        yield

    layers = Layers(about.side, about.prefix, about.request, next_part)
    about.there = layers.there
    first = next(coming, None)
    if first is None:
        raise WireError("a request without a chunk")
    about.arrived = arrivals.times
    with about.turn():
        take(first)
        about.session.remember(about.request.id, about.answer(layers.rebuilt))
