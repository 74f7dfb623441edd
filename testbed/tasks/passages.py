"""Questions about short passages that come with the testbed (``passages.yaml``), among other passages as distractors."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from testbed.errors import UsageError
from testbed.tasks.padding import CountTokens, Depth, among_distractors, check_depth, depth_of
from testbed.tasks.shown import MILL
from testbed.tasks.task import Example, ExtractiveTask


@dataclass(frozen=True)
class Passage:
    """A short text and its (question, answer) pairs; each answer stands verbatim, and once, in the text."""

    id: str
    text: str
    questions: tuple[tuple[str, str], ...]


@functools.cache
def load_passages() -> tuple[Passage, ...]:
    """The passages that come with the testbed, in the order of the file."""
    path = Path(__file__).with_name("passages.yaml")
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tuple(Passage(row["id"], row["text"], tuple((q, a) for q, a in row["questions"])) for row in rows)


@dataclass(frozen=True)
class Passages(ExtractiveTask):
    """Short questions about original passages; the answer stands verbatim in one of them.

    The passage that answers stands at `depth` among other passages: 0 (first) to 1 (last), ``random``, or a list that the
    examples take in turn. Contexts of the asked length end with a passage cut behind a sentence; without a length, a context
    is the passage alone.
    """

    depth: Depth = "random"

    name: ClassVar[str] = "passages"
    demonstrations: ClassVar[tuple[Example, ...]] = (
        MILL,
        Example(
            "shown-2",
            "Quint is a small harbour town. Its people live from fishing, and their boats are painted white.",
            "What colour are the boats of Quint painted?",
            ("white",),
        ),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples, of different passages while these last; see `Task.examples`."""
        asked = self._order(seed)
        if count > len(asked):
            raise UsageError(f"task passages: {count} examples were asked; it has {len(asked)} questions")
        return [
            self._example(index, passage, number, context_tokens, count_tokens, seed)
            for index, (passage, number) in enumerate(asked[:count])
        ]

    def _order(self, seed: int) -> list[tuple[Passage, int]]:
        """Every (passage, question number): each passage once, then each a second time, and so on."""
        rng = random.Random(f"passages/{seed}")
        passages = list(load_passages())
        turns = {
            passage.id: rng.sample(range(len(passage.questions)), len(passage.questions))
            for passage in passages
        }
        order: list[tuple[Passage, int]] = []
        for turn in range(max(map(len, turns.values()))):
            rng.shuffle(passages)
            order += [
                (passage, turns[passage.id][turn]) for passage in passages if turn < len(turns[passage.id])
            ]
        return order

    def _example(
        self,
        index: int,
        passage: Passage,
        number: int,
        context_tokens: int | None,
        count_tokens: CountTokens,
        seed: int,
    ) -> Example:
        rng = random.Random(f"passages/{seed}/{index}")
        depth = depth_of(self.depth, index, rng)
        question, answer = passage.questions[number]
        context: str | None = passage.text
        if context_tokens is not None:
            others: Sequence[str] = [other.text for other in load_passages() if other is not passage]
            others = rng.sample(others, len(others))
            context = among_distractors(
                passage.text, others, depth, context_tokens, self.counting(count_tokens), rng
            )
        if context is None:
            least = self.counting(count_tokens)(passage.text)
            raise UsageError(
                f"task passages: passage {passage.id!r} alone has {least} tokens; ask for a longer context than {context_tokens}"
            )
        return Example(f"{passage.id}-{number + 1}", context, question, (answer,))
