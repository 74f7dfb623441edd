"""Find one sentence in a long text that has nothing to do with it.

After Kamradt, "Needle in a haystack: pressure testing LLMs" (2023) and the single- and multi-key needles of Hsieh et al.,
"RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.errors import UsageError
from testbed.tasks.filler import SHORT, filler
from testbed.tasks.padding import CountTokens, Depth, check_depth, depth_of, insert_at_depth, most_that_fit
from testbed.tasks.task import Example, ExtractiveTask

_NAMES = (
    "Larsen", "Okafor", "Benedek", "Marchetti", "Sorensen", "Vandermeer", "Castillo", "Novak", "Ferreira", "Lindqvist", "Haddock",
    "Moreau", "Tanner", "Petrov", "Winslow", "Adeyemi", "Kowalski", "Delgado", "Fitzroy", "Nakamura", "Osborne", "Rinaldi",
    "Schuster", "Thackeray", "Ulrich", "Varga", "Whitaker", "Yilmaz", "Zimmer", "Ashworth", "Bellamy", "Crawford",
)  # fmt: skip
_PLACES = ("archive", "museum", "laboratory", "warehouse", "library", "hotel", "garage", "gallery")
_MOST_NEEDLES = 64
_MOST_TOKENS = 10_000_000


@dataclass(frozen=True)
class Needle(ExtractiveTask):
    """One sentence with a five-digit code, hidden in filler text; the question asks for the code.

    `needles` sentences with codes of different owners are hidden, and one of them is asked for; `distractors` more carry its
    owner's name with another place. `depth` is where the asked one stands: 0 (first) to 1 (last), ``random``, or a list
    that the examples take in turn. The others stand anywhere.
    """

    needles: int = 1
    depth: Depth = "random"
    distractors: int = 0

    name: ClassVar[str] = "needle"
    metric: ClassVar[str] = "em"
    max_new_tokens: ClassVar[int] = 12
    demonstrations: ClassVar[tuple[Example, ...]] = (
        Example(
            "shown-1",
            "The boats came back before noon. The access code for the Hartley theatre is 60457. A warm wind blew from the lake.",
            "What is the access code for the Hartley theatre?",
            ("60457",),
        ),
        Example(
            "shown-2",
            "The access code for the Quint factory is 81932. Two goats stood on the wall. The road to the mill was closed.",
            "What is the access code for the Quint factory?",
            ("81932",),
        ),
    )

    def __post_init__(self) -> None:
        _check_count("needles", self.needles, 1, _MOST_NEEDLES)
        _check_count("distractors", self.distractors, 0, len(_PLACES) - 1)
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples within about 3 % below `context_tokens`; see `Task.examples`."""
        if context_tokens is None:
            raise UsageError(
                "task needle: its text has no length of its own; give context_tokens, such as 512"
            )
        if not 1 <= context_tokens <= _MOST_TOKENS:
            raise UsageError(f"task needle: context_tokens {context_tokens} lies outside 1..{_MOST_TOKENS}")
        return [self._example(index, context_tokens, count_tokens, seed) for index in range(count)]

    def _example(self, index: int, context_tokens: int, count_tokens: CountTokens, seed: int) -> Example:
        rng = random.Random(f"needle/{seed}/{index}")
        depth = depth_of(self.depth, index, rng)
        keys = self._keys(rng)
        codes = rng.sample(range(10_000, 100_000), len(keys))
        depths = [depth, *(rng.random() for _ in keys[1:])]
        hidden = [
            (place, f"The access code for the {key} is {code}.")
            for place, key, code in zip(depths, keys, codes, strict=True)
        ]
        question = f"What is the access code for the {keys[0]}?"
        context = self._hide(hidden, context_tokens, count_tokens, rng)
        return Example(f"needle-{seed}-{index}", context, question, (str(codes[0]),))

    def _keys(self, rng: random.Random) -> list[str]:
        """The asked key, then its distractors, then those of the other needles; no two alike."""
        places = rng.sample(_PLACES, self.distractors + 1)
        asked, *others = rng.sample(_NAMES, len(_NAMES))
        keys = [f"{asked} {place}" for place in places]
        start = [rng.randrange(len(_PLACES)) for _ in others]
        for turn, (first, owner) in itertools.product(range(len(_PLACES)), zip(start, others, strict=True)):
            keys.append(f"{owner} {_PLACES[(first + turn) % len(_PLACES)]}")
        return keys[: self.distractors + self.needles]

    def _hide(
        self,
        hidden: Sequence[tuple[float, str]],
        context_tokens: int,
        count_tokens: CountTokens,
        rng: random.Random,
    ) -> str:
        drawn: list[str] = []
        more = filler(random.Random(rng.random()))

        def build(n: int, extra: Sequence[str] = ()) -> str:
            drawn.extend(itertools.islice(more, max(0, n - len(drawn))))
            return " ".join(insert_at_depth([*drawn[:n], *extra], hidden))

        tokens = self.counting(count_tokens)
        n = most_that_fit(build, context_tokens, context_tokens, tokens)
        if n is None:
            least = tokens(build(0))
            raise UsageError(
                f"task needle: {self.label} needs a context of at least {least} tokens; {context_tokens} were asked"
            )
        extra: list[str] = []
        left = context_tokens - tokens(build(n))
        for short in rng.sample(SHORT, len(SHORT)):
            size = count_tokens(f" {short}")
            if size <= left:
                extra.append(short)
                left -= size
        while extra and tokens(build(n, extra)) > context_tokens:  # a tokeniser whose counts do not add up
            extra.pop()
        return build(n, extra)


def _check_count(what: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"task needle: {what} {value!r} is not a whole number from {least} to {most}")
