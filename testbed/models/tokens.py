"""A model's tokenizer as prompts need it: what opens a text, what ends one, and nothing else that is special."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers


class Tokens:
    """Text to token ids and back. `ends`: the tokens that end a text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self.ends = frozenset(ends)
        self._start = self._start_tokens()

    def _start_tokens(self) -> list[int]:
        """What the tokenizer puts before a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a text, without special tokens; `start`: behind the one that opens a prompt, where there is one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._start, *ids] if start else ids

    def decode(self, ids: Sequence[int], stop: str | None = None) -> str:
        """The text of token ids, without special tokens; with `stop`, only what is before it."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded if not stop else decoded.partition(stop)[0]
