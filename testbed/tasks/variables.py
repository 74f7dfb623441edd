"""Follow assignments: which variables hold the value that one of them was given?

Variable tracking of Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024,
section 3: chains of ``X2 = X1`` in a text about other things. Scored as there: by the share of the names that the answer has.
"""

from __future__ import annotations

import random
import re
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

_NAME = re.compile(r"\b[A-Z]{3}\b")


@dataclass(frozen=True)
class Variables(GeneratedTask):
    """Chains of assignments in filler text; the question asks for every variable that holds a value.

    `hops` assignments follow the first of each of `chains` chains. `depth`: 0 (first) to 1 (last), ``random``, or a list that
    the examples take in turn: where the asked chain begins. Its other assignments stand behind, in order, each anywhere.
    """

    hops: int = 2
    chains: int = 1
    depth: Depth = "random"

    name: ClassVar[str] = "variables"
    metric: ClassVar[str] = "recall"
    max_new_tokens: ClassVar[int] = 32
    demonstrations: ClassVar[tuple[Example, ...]] = (
        Example(
            "shown-1",
            "VAR QKD = 48213. A warm wind blew from the lake. VAR TUV = QKD. Two goats stood on the wall. VAR BEJ = TUV.",
            "Which variables hold the value 48213?",
            ("QKD TUV BEJ",),
        ),
        Example(
            "shown-2",
            "The road to the mill was closed. VAR MOZ = 70956. VAR HIR = MOZ. The boats came back before noon. VAR WAP = HIR.",
            "Which variables hold the value 70956?",
            ("MOZ HIR WAP",),
        ),
    )

    def __post_init__(self) -> None:
        check_count(self.name, "hops", self.hops, 1, 16)
        check_count(self.name, "chains", self.chains, 1, 16)
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def generate(
        self, index: int, context_tokens: int, count: CountTokens, rng: random.Random
    ) -> tuple[str, str, str]:
        """(context, question, answer); see `GeneratedTask`."""
        depth = depth_of(self.depth, index, rng)
        names = self._names(rng)
        values = rng.sample(range(10_000, 100_000), self.chains)
        hidden: list[tuple[float, str]] = []
        for chain, value in enumerate(values):
            begin = depth if chain == 0 else rng.random()
            places = [begin, *sorted(rng.uniform(begin, 1.0) for _ in range(self.hops))]
            own = names[chain * (self.hops + 1) : (chain + 1) * (self.hops + 1)]
            right = [str(value), *own[:-1]]
            hidden += [
                (place, f"VAR {left} = {given}.")
                for place, left, given in zip(places, own, right, strict=True)
            ]
        context = hide(self.label, hidden, context_tokens, count, rng)
        asked = " ".join(names[: self.hops + 1])
        return context, f"Which variables hold the value {values[0]}?", asked

    def _names(self, rng: random.Random) -> list[str]:
        """Three capitals each, no two alike and none of the demonstrations'."""
        taken = set(_NAME.findall(" ".join(shown.context for shown in self.demonstrations)))
        found: list[str] = []
        while len(found) < self.chains * (self.hops + 1):
            name = "".join(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3))
            if name not in taken:
                taken.add(name)
                found.append(name)
        return found

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """``score``: the share of the names that the answer has; ``f1`` counts wrong names too; ``em``: all of them, no other."""
        gold = set(example.answers[0].split())
        given = set(_NAME.findall(answer.split(self.stop, 1)[0]))
        right = len(gold & given)
        f1 = 2 * right / (len(gold) + len(given))
        return {"score": right / len(gold), "em": float(gold == given), "f1": f1}
