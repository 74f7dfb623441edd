"""A model's tokenizer as prompts need it. Texts are data: whatever they say, no special token comes of them.

Only the layout that we write around them has special tokens: what stands before a context, and what closes a chat's question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers


class Tokens:
    """Text to token ids and back. `ends`: the tokens that end a text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # as the text that they look like
        self.ends = frozenset(ends)
        self._start = self._start_tokens()

    def _start_tokens(self) -> list[int]:
        """What the tokenizer puts before a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def encode(self, text: str, start: bool = False, closing: str = "") -> list[int]:
        """The ids of a text; `closing`: of the prompt's layout behind it.

        start: the text is the layout that opens a prompt, behind the token that opens every one, where there is such a token.
        """
        ids = [*self._start, *self._layout(text)] if start else self._encoded(text)
        return [*ids, *self._layout(closing)] if closing else ids

    def _layout(self, text: str) -> list[int]:
        """With the special tokens that are written in it."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._encoded(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], stop: str | None = None) -> str:
        """The text of token ids, without special tokens; with `stop`, only what is before it."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded if not stop else decoded.partition(stop)[0]
