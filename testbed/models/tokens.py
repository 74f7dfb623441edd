"""Texts and token ids: a model's tokenizer, and how its chat turns are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import tokenizers

#: What tokenizers are told apart by besides their vocabularies.
_SAMPLE = (
    "Anna's code: 4821,  cost 3.50 (since 1897)!\n\n\tÅse naïvely re-read the README_v2.md  … 東京 🙂 don't\n"
)


def chat_template(location: str, local: bool) -> Callable[[list[dict[str, str]]], str] | None:
    """Turns -> the text that opens the next answer, without the token that starts every prompt; None: it has no template.

    location: a directory or hub id; local: look nowhere but on this machine. transformers renders the template in a sandbox.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, local_files_only=local)
    if not tokenizer.chat_template:
        return None
    # Left to the tokenizer, where it is what puts it there; SmolLM2's puts none, and its template begins with the same token.
    opens = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    start = tokenizer.bos_token if opens else ""

    def render(turns: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(start) if start else text

    return render


class Tokens:
    """Text to token ids and back. `ends`: the tokens that end a text.

    Texts are data: whatever they say, no special token comes of them. Only the layout that we write around them has special
    tokens: what stands before a context, and what closes a chat's question.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # as the text that they look like
        self.ends = frozenset(ends)
        self._start = self._start_tokens()

    @property
    def digest(self) -> str:
        """Equal for tokenizers of one vocabulary, with the same numbers, that cut a text of ours alike and open prompts alike."""
        return self._vocabulary[0]

    @property
    def count(self) -> int:
        """One more than the greatest number of a token."""
        return self._vocabulary[1]

    @cached_property
    def _vocabulary(self) -> tuple[str, int]:
        """Both, listed once: it takes 50 ms for 50,000 tokens, and whoever loads a model asks for its digest, off the clock."""
        vocabulary = sorted(
            self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]
        )
        told = json.dumps([vocabulary, self._start, self._encoded(_SAMPLE)])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest(), 1 + vocabulary[-1][1]

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
