"""An answer from a coarser cache, verified behind the full one: read in one pass with the question, decoded where it differs."""

from __future__ import annotations

import time

from testbed.endpoints.answering import Answering
from testbed.endpoints.assembly import Rebuilt
from testbed.endpoints.sessions import Served
from testbed.endpoints.side import Pass
from testbed.transport import wire


def verify(about: Answering, served: Served, rebuilt: Rebuilt | None, arrived: list[float]) -> None:
    """Sends what the answer that was given is from this cache. What this side did for it since is in `about.worked`.

    rebuilt: None: the answer was given from all there is. arrived: when what it was not given from had come.
    """
    side, request, draft = about.side, about.request, served.answer_ids
    ids = draft if rebuilt is None else _decoded_again(about, served, rebuilt)
    differ = (i for i, (ours, theirs) in enumerate(zip(ids, draft, strict=False)) if ours != theirs)
    verdict = wire.Verdict(
        id=request.id,
        text=side.model.text(ids, request.stop)[:8000],
        tokens=len(ids),
        agreed=next(differ, min(len(ids), len(draft))),
        arrived=tuple(arrived),
        worked=tuple(about.worked),
        sent_at=time.monotonic(),
    )
    about.connection.send(verdict)


def _decoded_again(about: Answering, served: Served, rebuilt: Rebuilt) -> list[int]:
    side, request, draft = about.side, about.request, served.answer_ids
    seen: list[int] = []
    about.asked = Pass(len(served.question_ids) + len(draft), rebuilt.held)
    before = rebuilt.held + len(served.question_ids)

    def on_token(index: int, token: int) -> None:
        if not seen:
            about.end()
        elif seen != draft[:index]:  # it took a pass of its own
            side.pace.hold("decode", 1, before + index - 1)
        seen.append(token)

    about.begin()
    ids = side.answer(
        served.question_ids,
        rebuilt.past,
        request.max_new_tokens,
        request.stop,
        request.choices,
        on_token,
        draft,
    )
    if not seen:
        about.end()
    if ids != draft[: len(ids)]:
        last, most = about.worked[-1], 0 if request.choices else request.max_new_tokens
        done_at = side.end_of_answer(len(ids), most, before)
        about.worked.append(wire.Worked("generate", last.end, done_at, last.chunk))
    return ids
