"""How long the cloud takes to decode several requests at once."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from testbed.endpoints.protocol import Passes
from testbed.endpoints.sessions import Served
from testbed.endpoints.side import InferenceSide

if TYPE_CHECKING:
    from testbed.models.kvcache import KVCache


def timed_together(side: InferenceSide, served: Served, past: KVCache | None, most: int) -> Passes:
    """Decodes a request in passes of 1, 2, 4, … and `most` of its like, with its cache; the median pass of each, as the side's
    pace has it. Nothing where the answer is a choice among texts, or a single token. Raises UsageError where the model cannot.
    """
    request = served.request
    side.under(request.prefix)
    pace, seconds, alike = side.pace.another(waits=False), [], True
    if request.choices or len(served.answer_ids) < 2:
        return Passes((), True)
    for count in sizes(most):
        together, times = side.model.together(), list[float]()
        for _ in range(count):
            together.join(served.question_ids, past, request.max_new_tokens, request.stop)
        while len(together.inside) == count:
            began = pace.begin()
            together.step()
            times.append(pace.hold("decode") - began)
        while together.inside:  # answers that are not alike end one by one
            together.step()
        alike = alike and all(answer == served.answer_ids for answer in together.answers)
        seconds.append((count, median(times)))
    return Passes(tuple(seconds), alike)


def sizes(most: int) -> list[int]:
    """1, 2, 4, … and the most itself."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]
