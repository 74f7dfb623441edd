"""Find one sentence in a long text that has nothing to do with it.

After Kamradt, "Needle in a haystack: pressure testing LLMs" (2023) and the single- and multi-key needles of Hsieh et al.,
"RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import ClassVar

from testbed.tasks.generated import GeneratedTask
from testbed.tasks.padding import (
    CountTokens,
    Depth,
    check_count,
    check_depth,
    depth_of,
    hide,
)
from testbed.tasks.task import Example

_NAMES = (
    "Larsen", "Okafor", "Benedek", "Marchetti", "Sorensen", "Vandermeer", "Castillo", "Novak", "Ferreira", "Lindqvist", "Haddock",
    "Moreau", "Tanner", "Petrov", "Winslow", "Adeyemi", "Kowalski", "Delgado", "Fitzroy", "Nakamura", "Osborne", "Rinaldi",
    "Schuster", "Thackeray", "Ulrich", "Varga", "Whitaker", "Yilmaz", "Zimmer", "Ashworth", "Bellamy", "Crawford",
)  # fmt: skip
_PLACES = ("archive", "museum", "laboratory", "warehouse", "library", "hotel", "garage", "gallery")
_MOST_NEEDLES = 64


@dataclass(frozen=True)
class Needle(GeneratedTask):
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
        check_count(self.name, "needles", self.needles, 1, _MOST_NEEDLES)
        check_count(self.name, "distractors", self.distractors, 0, len(_PLACES) - 1)
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def generate(
        self, index: int, context_tokens: int, count: CountTokens, rng: random.Random
    ) -> tuple[str, str, str]:
        """(context, question, answer); see `GeneratedTask`."""
        depth = depth_of(self.depth, index, rng)
        keys = self._keys(rng)
        codes = rng.sample(range(10_000, 100_000), len(keys))
        depths = [depth, *(rng.random() for _ in keys[1:])]
        hidden = [
            (place, f"The access code for the {key} is {code}.")
            for place, key, code in zip(depths, keys, codes, strict=True)
        ]
        question = f"What is the access code for the {keys[0]}?"
        context = hide(self.label, hidden, context_tokens, count, rng)
        return context, question, str(codes[0])

    def _keys(self, rng: random.Random) -> list[str]:
        """The asked key, then its distractors, then those of the other needles; no two alike."""
        places = rng.sample(_PLACES, self.distractors + 1)
        asked, *others = rng.sample(_NAMES, len(_NAMES))
        keys = [f"{asked} {place}" for place in places]
        start = [rng.randrange(len(_PLACES)) for _ in others]
        for turn, (first, owner) in itertools.product(range(len(_PLACES)), zip(start, others, strict=True)):
            keys.append(f"{owner} {_PLACES[(first + turn) % len(_PLACES)]}")
        return keys[: self.distractors + self.needles]
