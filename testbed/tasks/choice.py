"""Multiple choice: the model's answer is the option that it finds likeliest behind the question, per token.

The length-normalised score of Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020, section 2.4. The options'
likelihoods are computed where the answer is: in the cloud, from the cache that arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from testbed.errors import UsageError
from testbed.tasks.jsonl import Row
from testbed.tasks.padding import Depth, check_depth
from testbed.tasks.rows import RowTask, check_path, choice_rows, load_rows
from testbed.tasks.shown import BAKING, MILL
from testbed.tasks.task import Example


@dataclass(frozen=True)
class Choice(RowTask):
    """Which of a question's options is right: the likeliest per token, given the context; the score is accuracy.

    Without a `path`, the testbed's passages with four options each; with one, the rows of a file that have `choices`, one of
    which is the first answer. `options`: ``hidden`` (the question alone is shown) or ``listed``. `depth` as in `qa`.
    """

    path: str = ""
    depth: Depth = "random"
    options: Literal["hidden", "listed"] = "hidden"

    name: ClassVar[str] = "choice"
    metric: ClassVar[str] = "em"
    demonstrations: ClassVar[tuple[Example, ...]] = (
        replace(MILL, choices=("Simon Pike", "Anna Brook", "Clara Tull", "Peter Dunn")),
        replace(BAKING, choices=("bread", "biscuits", "a pie", "a cake")),
    )

    def __post_init__(self) -> None:
        if self.path:
            object.__setattr__(self, "path", check_path(self.name, self.path))
        if self.options not in ("hidden", "listed"):
            raise UsageError(f"task choice: options {self.options!r} is neither 'hidden' nor 'listed'")
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def rows(self) -> Sequence[Row]:
        """The rows that have choices. Raises UsageError where a row's answer is none of them, or no row has any."""
        if not self.path:
            return choice_rows()
        found = [row for row in load_rows(self.path) if row.choices]
        for row in found:
            if row.answers[0] not in row.choices:
                raise UsageError(
                    f"task choice: {self.path}: row {row.id[:40]!r}: the answer {row.answers[0][:40]!r} is none of its choices"
                )
        if not found:
            raise UsageError(f"task choice: {self.path} has no rows with choices")
        return found

    def example(self, row: Row, context: str) -> Example:
        return Example(row.id, context, row.question, row.answers[:1], row.choices)

    def question_text(self, example: Example) -> str:
        shown = f"Options: {'; '.join(example.choices)}\n" if self.options == "listed" else ""
        return f"Question: {example.question}\n{shown}Answer:"

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """Accuracy: the option's very text, since options may differ in an article or a comma alone."""
        right = float(answer.strip() == example.answers[0])
        return {"score": right, "em": right, "f1": right}
