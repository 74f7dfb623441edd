"""Questions whose answer takes two or more paragraphs, among paragraphs that have nothing to do with it.

After HotpotQA (Yang et al., EMNLP 2018, distractor setting), 2WikiMultihopQA (Ho et al., COLING 2020) and MuSiQue (Trivedi et
al., TACL 2022).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.errors import UsageError
from testbed.tasks.jsonl import Row
from testbed.tasks.padding import CountTokens, Depth, check_depth, depth_of, evidence_among
from testbed.tasks.rows import check_path, enough, load_rows, may_distract, multihop_rows
from testbed.tasks.task import Example, ExtractiveTask

_MOST_DISTRACTORS = 200  # rows whose paragraphs are looked at to pad one example


@dataclass(frozen=True)
class Multihop(ExtractiveTask):
    """Questions that need several paragraphs, answered freely among distractor paragraphs; the score is answer F1.

    Without a `path`, the testbed's passages with a second paragraph each that leads to them; with one, a file's rows whose
    `paragraphs` have gold ones. Contexts of an asked length hold the gold paragraphs, then as many of the row's own
    distractors and of other rows' as fit. `depth`: each gold paragraph at a place of its own (``random``), or all of
    them, in their order, at 0 (first) to 1 (last), or at a list of depths that the examples take in turn. Without a length a
    context is as the row has it. Rows whose gold paragraphs alone are longer than was asked are passed over.
    """

    path: str = ""
    depth: Depth = "random"

    name: ClassVar[str] = "multihop"
    demonstrations: ClassVar[tuple[Example, ...]] = (
        Example(
            "shown-1",
            "Clara Tull was born in Quint, a small harbour town.\nThe song Grey Water was written by Clara Tull in one night.",
            "In which town was the writer of the song Grey Water born?",
            ("Quint",),
        ),
        Example(
            "shown-2",
            "The mill at Hartley was built in 1720 by Anna Brook.\nThe painter Simon Pike lives in the mill at Hartley.",
            "Who built the mill where Simon Pike lives?",
            ("Anna Brook",),
        ),
    )

    def __post_init__(self) -> None:
        if self.path:
            object.__setattr__(self, "path", check_path(self.name, self.path))
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples, each with all of its gold paragraphs; see `Task.examples`."""
        rows = list(self._rows())
        random.Random(f"multihop/{seed}").shuffle(rows)
        if context_tokens is None:
            found = [Example(row.id, row.context, row.question, row.answers) for row in rows[:count]]
        else:
            found = list(itertools.islice(self._of_length(rows, context_tokens, count_tokens, seed), count))
        return enough(self.name, self.path, count, context_tokens, found)

    def _rows(self) -> Sequence[Row]:
        if not self.path:
            return multihop_rows()
        found = [row for row in load_rows(self.path) if any(gold for _, gold in row.paragraphs)]
        if not found:
            raise UsageError(f"task multihop: {self.path} has no rows with paragraphs of which some are gold")
        return found

    def _of_length(
        self, rows: list[Row], context_tokens: int, count_tokens: CountTokens, seed: int
    ) -> Iterator[Example]:
        index = 0
        for row in rows:
            rng = random.Random(f"multihop/{seed}/{row.id}")
            depth = depth_of(self.depth, index, rng)
            gold = [text for text, is_gold in row.paragraphs if is_gold]
            depths = [rng.random() for _ in gold] if self.depth == "random" else [depth] * len(gold)
            if self.depth == "random":
                rng.shuffle(gold)
            context = evidence_among(
                list(zip(depths, gold, strict=True)),
                self._distractors(rows, row, rng),
                context_tokens,
                self.counting(count_tokens),
                rng,
            )
            if context is not None:
                yield Example(row.id, context, row.question, row.answers)
                index += 1

    @staticmethod
    def _distractors(rows: list[Row], row: Row, rng: random.Random) -> list[str]:
        """The row's own distractors in an order drawn, then paragraphs of other rows that do not hold the answer."""
        own = [text for text, is_gold in row.paragraphs if not is_gold]
        others = [
            text
            for other in rng.sample(rows, min(len(rows), _MOST_DISTRACTORS))
            for text, _ in other.paragraphs
            if may_distract(text, row)
        ]
        return list(dict.fromkeys([*rng.sample(own, len(own)), *others]))
