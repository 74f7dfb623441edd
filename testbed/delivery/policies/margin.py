"""How long before its deadline a plan has to end: as much as earlier requests came later than they were planned."""

from __future__ import annotations

from collections import deque
from math import ceil

_LAST = 10  # requests
_SHARE = 0.8  # of them, that would have come in time with the margin
_MOST = 0.25  # of the deadline; more is lost for other reasons than what a forecast leaves out


class Margin:
    """Of one sender. A plan that is bound by its deadline ends at it, less the margin; all that its forecast leaves out comes on
    top. The margin is what that was in four of five of the last ten requests (a quantile of past errors, as in split conformal
    prediction), and at most a quarter of the deadline: what is later than that came over a link that failed.
    """

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=_LAST)

    def seconds(self) -> float:
        """What to hold back; nothing before the first request."""
        return sorted(self._late)[ceil(_SHARE * len(self._late)) - 1] if self._late else 0.0

    def learn(self, first_token_s: float, deadline_s: float, margin_s: float) -> None:
        """When the first token of a request was there that was planned with this margin."""
        late = first_token_s - (deadline_s - margin_s)
        self._late.append(min(max(0.0, late), _MOST * deadline_s))
