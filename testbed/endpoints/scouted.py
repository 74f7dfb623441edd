"""The cloud's part of a scout's request: its own model prefills the text while the choice is under way, and keeps what was
chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.endpoints import choice
from testbed.endpoints.answering import Answering
from testbed.endpoints.arrivals import Arrivals
from testbed.endpoints.assembly import rebuilt_from
from testbed.endpoints.sessions import Served
from testbed.endpoints.side import held
from testbed.endpoints.tokens import from_bytes
from testbed.errors import WireError

if TYPE_CHECKING:
    from testbed.codecs.cache_format import Positions
    from testbed.endpoints.side import InferenceSide


def scouted(about: Answering, arrivals: Arrivals) -> None:
    """Answers it. Raises PayloadError, WireError, NotFiniteError."""
    request, side = about.request, about.side
    if request.levels != choice.LEVELS or not request.tokens:
        raise WireError("a scout's request has a text and a choice, and a context of at least a token")
    coming = iter(arrivals)
    text = next(coming, None)
    if text is None or text.chunk.level != 0:
        raise WireError("a scout's request begins with its text")
    with about.turn(), about.work("prefill", 0, text.at) as passed:
        ids = from_bytes(text.payload, request.tokens, side.model.vocabulary)
        cache = side.model.prefill(ids, about.prefix.cache).cache
        passed.tokens, passed.past = len(ids), held(about.prefix.cache)
    made = next(coming, None)
    if made is None or made.chunk.level != 1 or next(coming, None) is not None:
        raise WireError("behind a scout's text there is its choice, and nothing else")
    about.payload += [text.payload, made.payload]
    about.arrived = arrivals.times
    # Behind its own text it waits for nobody: what it is held up by is the prefill.
    ready = max(made.at, about.worked[-1].end)
    with about.turn():
        with about.work("decode", 1, ready):
            positions = choice.from_bytes(made.payload, request.tokens)
            rebuilt = rebuilt_from(side, about.prefix, choice.keep(cache, positions))
        served = about.answer(rebuilt)
        served.scouted = (ids, positions)
        about.session.remember(request.id, served)


def own_choice(side: InferenceSide, served: Served, selector: str, gold: list[int]) -> Positions:
    """What this side's own model would have kept of a scout's context, by the same selector."""
    from testbed.codecs.codec import Codec
    from testbed.codecs.evidence import gather, prefill_for

    assert served.scouted is not None
    ids, _ = served.scouted
    codec, prefix = Codec(selector, side.model.name), side.under(served.request.prefix)
    context = prefill_for(side.model, codec.needs, ids, prefix.cache)
    asked = served.question_ids if codec.asks else ()
    answer = gold if codec.needs.answer else ()
    evidence = gather(side.model, codec.needs, prefix.cache, context, asked, answer, seed="the cloud's own")
    return choice.chosen(codec.select(evidence), len(ids))
