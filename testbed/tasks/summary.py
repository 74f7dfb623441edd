"""Summaries: what a text says, in a few sentences, scored by ROUGE-L."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from testbed.errors import UsageError
from testbed.tasks.forms import SUMMARIZE
from testbed.tasks.jsonl import Row
from testbed.tasks.metrics import exact_match, rouge_l, token_f1
from testbed.tasks.padding import CountTokens, around, sentences
from testbed.tasks.rows import RowTask, check_path, load_rows
from testbed.tasks.shown import BAKING, MILL
from testbed.tasks.task import Example


@dataclass(frozen=True)
class Summary(RowTask):
    """Summaries of texts from a file (`path`): LongBench's, XSum's, CNN/DailyMail's, or lines with `summary: true`.

    A text of an asked length is the beginning of a longer one: another text beside it would have to be summarised, too. Texts
    that are shorter are passed over.
    """

    path: str

    name: ClassVar[str] = "summary"
    metric: ClassVar[str] = "rouge_l"
    max_new_tokens: ClassVar[int] = 96
    demonstrations: ClassVar[tuple[Example, ...]] = (
        replace(
            MILL, question=SUMMARIZE, answers=("Anna Brook built a mill that ground oats for the valley.",)
        ),
        replace(BAKING, question=SUMMARIZE, answers=("Because it was raining, Tim baked a cake.",)),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", check_path(self.name, self.path))

    def rows(self) -> Sequence[Row]:
        """The rows that ask for a summary. Raises UsageError where there is none."""
        found = [row for row in load_rows(self.path) if row.summary]
        if not found:
            raise UsageError(
                f"task summary: {self.path} has no rows that ask for a summary (of LongBench, XSum, CNN/DailyMail, or with "
                "summary: true)"
            )
        return found

    def _of_length(
        self, rows: list[Row], context_tokens: int, count_tokens: CountTokens, seed: int
    ) -> Iterator[Example]:
        count_context = self.counting(count_tokens)
        for row in rows:
            if count_context(row.context) < context_tokens:
                continue
            beginning = around(sentences(row.context), [0], " ", context_tokens, count_context)
            if beginning is not None:
                yield self.example(row, beginning)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """ROUGE-L, beside an extract's scores."""
        given = self.cut(answer)
        scores = {"em": exact_match(given, example.answers), "f1": token_f1(given, example.answers)}
        return {"score": rouge_l(given, example.answers), **scores}
