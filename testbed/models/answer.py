"""A greedy answer as it grows: which token ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence


class Answer:
    """`tokens`: those so far. ends: tokens that end a text; limit: most tokens; text: what tokens say.

    It ends before an end token or the `stop` text, or with the last token that it may have. A token that holds text before `stop`
    and the stop itself is the last one. Where the stop spans tokens, those with its beginning are there when its end comes.
    """

    def __init__(
        self, ends: Collection[int], stop: str | None, limit: int, text: Callable[[Sequence[int]], str]
    ) -> None:
        self.tokens: list[int] = []
        self.limit = limit
        self._ends, self._stop, self._text = ends, stop, text
        self._before = ""

    def take(self, token: int) -> bool:
        """Add the likeliest token behind these, unless the answer ends before it. Whether decoding goes on."""
        if token in self._ends:
            return False
        decoded = self._text([*self.tokens, token]) if self._stop else ""
        at = decoded.find(self._stop) if self._stop else -1
        if 0 <= at <= len(self._before):
            return False
        self.tokens.append(token)
        self._before = decoded
        return at < 0 and len(self.tokens) < self.limit
