"""What a device was measured to take, between the measured points and a little beyond."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Annotated, NoReturn

from msgspec import Meta

from testbed.errors import SpecError

#: So many times the largest measured number of tokens, and no more.
BEYOND = 2

_Seconds = Annotated[float, Meta(gt=0, le=1e6)]
_Tokens = Annotated[int, Meta(ge=1, le=1 << 24)]
Points = tuple[tuple[_Tokens, _Seconds], ...]


@dataclass(frozen=True)
class DeviceTimes:
    """A device's times for one model. Straight lines lead from point to point: a pass reads the weights once and works so much
    a token, a generated token reads the weights and so much a token of context. Only attention's part of a long pass grows
    faster; were all of it that part, a line to a point of twice the tokens were at most an eighth too high.

    prefill: (tokens, seconds of the pass), in one pass from nothing. decode: (tokens of context, seconds of a token behind
    them); empty: it generates none. Both ascend in tokens.
    """

    device: str
    model: str
    prefill: Points
    decode: Points = ()

    def pass_s(self, tokens: int, past: int = 0) -> float:
        """Seconds of a pass over so many tokens behind `past` others. Raises SpecError past what was measured.

        Behind others it takes no less than alone, than one token does, and than what a pass over all would take longer than
        one over those before: the weights are read, and each token attends to what is before it.
        """
        if tokens <= 0:
            return 0.0
        alone, longer = self._from_nothing(tokens), 0.0
        if past > 0:
            longer = self._from_nothing(tokens + past) - self._from_nothing(past)
        step = self.token_s(past) if self.decode else 0.0
        return max(alone, longer, step)

    def token_s(self, past: int) -> float:
        """Seconds of one generated token behind `past` others. Raises SpecError past what was measured.

        Behind fewer than were measured, as behind the fewest: reading less takes no longer.
        """
        if not self.decode:
            raise SpecError(f"device {self.device}: has no times of decoding")
        fewest, seconds = self.decode[0]
        points = self.decode if len(self.decode) > 1 else ((fewest, seconds), (BEYOND * fewest, seconds))
        if past > BEYOND * self.decode[-1][0]:
            self._refuse("decode", self.decode, past)
        return line(points, max(past, fewest))

    def _from_nothing(self, tokens: int) -> float:
        """A pass of one token is a generated one's; without such, a short pass is as long as half of the shortest measured."""
        points = self.prefill
        if self.decode and points[0][0] > 1:
            points = ((1, min(self.decode[0][1], points[0][1])), *points)
        elif BEYOND * tokens < points[0][0]:
            raise SpecError(
                f"device {self.device}: was measured in passes of {points[0][0]} tokens and more; {tokens} are too few"
            )
        if tokens > BEYOND * points[-1][0]:
            self._refuse("prefill", points, tokens)
        return line(points, tokens)

    def _refuse(self, what: str, points: Points, tokens: int) -> NoReturn:
        raise SpecError(
            f"device {self.device}: {what} was measured up to {points[-1][0]} tokens, and {tokens} are more than {BEYOND} "
            "times that; measure it there, or ask for less"
        )


def line(points: Points, tokens: float) -> float:
    """On the straight lines from point to point, the last one prolonged at either end; one point alone is flat below and
    proportional above it.
    """
    if len(points) == 1:
        ((known, seconds),) = points
        return seconds * max(1.0, tokens / known)
    at = min(max(bisect_left([known for known, _ in points], tokens), 1), len(points) - 1)
    (left, least), (right, most) = points[at - 1], points[at]
    slope = (most - least) / (right - left)
    return max(least + slope * (tokens - left), 0.0 if tokens <= right else most)
