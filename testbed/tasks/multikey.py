"""Many keys with a value each, and the value of one is asked for.

The multi-key needles of Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024,
appendix B: some keys in a text about other things (their MK-1), or nothing but keys (MK-2).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from testbed.errors import UsageError
from testbed.tasks.generated import GeneratedTask
from testbed.tasks.padding import (
    CountTokens,
    Depth,
    check_count,
    check_depth,
    depth_of,
    hide,
    insert_at_depth,
    most_that_fit,
)
from testbed.tasks.task import Example

_FIRST = (
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lonely", "mellow", "narrow",
    "odd", "pale", "quiet", "rough", "sandy", "tall", "vivid", "wild", "young", "crimson", "bitter", "clever", "distant", "fancy",
)  # fmt: skip
_SECOND = (
    "anchor", "basket", "candle", "dragon", "engine", "feather", "glove", "hammer", "island", "jacket", "kettle", "ladder",
    "mirror", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "tunnel", "violin", "wagon", "acorn", "bottle",
    "compass", "drum", "falcon", "garden",
)  # fmt: skip
_MOST_KEYS = len(_FIRST) * len(_SECOND)


@dataclass(frozen=True)
class MultiKey(GeneratedTask):
    """Keys with a number each among filler text, or nothing but keys; the question asks for the number of one.

    `keys`: how many stand in filler text, or ``fill``: the whole context is keys. `depth` is where the asked one stands: 0
    (first) to 1 (last), ``random``, or a list that the examples take in turn. The others stand anywhere.
    """

    keys: int | Literal["fill"] = 4
    depth: Depth = "random"

    name: ClassVar[str] = "multikey"
    metric: ClassVar[str] = "em"
    max_new_tokens: ClassVar[int] = 12
    demonstrations: ClassVar[tuple[Example, ...]] = (
        Example(
            "shown-1",
            "The number for plain teapot is 60457. A warm wind blew from the lake. The number for silver boot is 18306.",
            "What is the number for silver boot?",
            ("18306",),
        ),
        Example(
            "shown-2",
            "The number for slow pencil is 81932. Two goats stood on the wall. The number for green wheel is 27415.",
            "What is the number for slow pencil?",
            ("81932",),
        ),
    )

    def __post_init__(self) -> None:
        if self.keys != "fill":
            check_count(self.name, "keys", self.keys, 1, _MOST_KEYS)
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def generate(
        self, index: int, context_tokens: int, count: CountTokens, rng: random.Random
    ) -> tuple[str, str, str]:
        """(context, question, answer); see `GeneratedTask`."""
        depth = depth_of(self.depth, index, rng)
        pairs = self._pairs(rng)
        key, value = next(pairs)
        evidence = (depth, _sentence(key, value))
        if self.keys == "fill":
            context = self._filled(evidence, pairs, context_tokens, count)
        else:
            others = [(rng.random(), _sentence(*pair)) for pair in itertools.islice(pairs, self.keys - 1)]
            context = hide(self.label, [evidence, *others], context_tokens, count, rng)
        return context, f"What is the number for {key}?", str(value)

    @staticmethod
    def _pairs(rng: random.Random) -> Iterator[tuple[str, int]]:
        """Keys and values, no two alike."""
        keys = [f"{first} {second}" for first, second in itertools.product(_FIRST, _SECOND)]
        rng.shuffle(keys)
        yield from zip(keys, rng.sample(range(10_000, 100_000), len(keys)), strict=True)

    def _filled(
        self, evidence: tuple[float, str], pairs: Iterator[tuple[str, int]], target: int, count: CountTokens
    ) -> str:
        others = [_sentence(*pair) for pair in pairs]

        def build(n: int) -> str:
            return " ".join(insert_at_depth(others[:n], [evidence]))

        n = most_that_fit(build, len(others), target, count)
        if n is None or n == len(others):
            limit = count(build(0)) if n is None else count(build(n))
            bound = "at least" if n is None else "at most"
            raise UsageError(
                f"task multikey: {self.label} takes a context of {bound} {limit} tokens; {target} were asked"
            )
        return build(n)


def _sentence(key: str, value: int) -> str:
    return f"The number for {key} is {value}."
