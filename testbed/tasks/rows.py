"""Tasks whose questions are rows: from a file of JSON lines, from the hub, or from the passages that come with the testbed."""

from __future__ import annotations

import functools
import itertools
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import yaml

from testbed.errors import UsageError
from testbed.tasks.jsonl import Row, read_rows
from testbed.tasks.metrics import KOREAN, UNSPACED, unspaced
from testbed.tasks.padding import CountTokens, Depth, among_distractors, around, depth_of, sentences
from testbed.tasks.passages import load_passages
from testbed.tasks.task import Example, ExtractiveTask

HUB = "hub:"
_MOST_DISTRACTORS = 2_000  # rows whose contexts are looked at to pad one example


def check_path(task: str, path: object) -> str:
    """A source of rows as people write it: a file's path, or ``hub:ID``. Raises UsageError where it is neither."""
    if not isinstance(path, str | Path) or not str(path):
        raise UsageError(f"task {task}: path {path!r} is not the name of a file of JSON lines")
    if not str(path).startswith(HUB) and not Path(path).is_file():
        raise UsageError(f"task {task}: {path} does not exist or is not a file")
    return str(path)


def load_rows(path: str) -> tuple[Row, ...]:
    """The rows of a source that `check_path` accepted. Raises UsageError naming what is wrong with it, and where."""
    if path.startswith(HUB):
        from testbed.tasks.hub import read_hub

        return read_hub(path.removeprefix(HUB))
    return read_rows(Path(path))


@functools.cache
def choice_rows() -> tuple[Row, ...]:
    """The questions of the testbed's passages with four choices each, in an order that tells nothing."""
    wrong = yaml.safe_load(Path(__file__).with_name("passages_choices.yaml").read_text(encoding="utf-8"))
    rows = []
    for passage in load_passages():
        for number, (question, answer) in enumerate(passage.questions):
            choices = [answer, *wrong[passage.id][number]]
            random.Random(question).shuffle(choices)
            name = f"{passage.id}-{number + 1}"
            rows.append(Row(name, passage.text, question, (answer,), choices=tuple(choices)))
    return tuple(rows)


@functools.cache
def multihop_rows() -> tuple[Row, ...]:
    """Questions that take two paragraphs to answer: a bridge that names a passage's subject, and the passage."""
    bridges = yaml.safe_load(Path(__file__).with_name("passages_bridges.yaml").read_text(encoding="utf-8"))
    rows = []
    for passage in load_passages():
        bridge = bridges[passage.id]
        paragraphs = ((bridge["text"], True), (passage.text, True))
        context = "\n".join(text for text, _ in paragraphs)
        for number, (_, answer) in enumerate(passage.questions):
            question = bridge["questions"][number]
            rows.append(Row(f"{passage.id}-hop-{number + 1}", context, question, (answer,), paragraphs))
    return tuple(rows)


class RowTask(ExtractiveTask):
    """What `qa` and `choice` share: rows in an order drawn from the seed, padded with or cut down to the asked length.

    With a length asked, rows whose context fits come first, padded with other rows' contexts around them. Longer ones follow,
    cut down: to the gold paragraphs and as many others as fit, or to the sentences around the first gold answer; a row
    whose answer does not stand in its context is passed over, since nobody can tell what may be cut.
    """

    path: str
    depth: Depth
    name: ClassVar[str]

    def rows(self) -> Sequence[Row]:
        """Every row of the source. Raises UsageError naming the line of a malformed one, and one that another task scores."""
        found = load_rows(self.path)
        if (other := next((row.id for row in found if row.summary), None)) is not None:
            raise UsageError(
                f"task {self.name}: {self.path}: row {other[:40]!r} asks for a summary; take the task summary"
            )
        return found

    def example(self, row: Row, context: str) -> Example:
        """The example that a row makes with this context."""
        return Example(row.id, context, row.question, row.answers)

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples from the source; see `Task.examples`."""
        rows = list(self.rows())
        random.Random(f"{self.name}/{seed}").shuffle(rows)
        if context_tokens is None:
            found = [self.example(row, row.context) for row in rows[:count]]
        else:
            found = list(itertools.islice(self._of_length(rows, context_tokens, count_tokens, seed), count))
        return enough(self.name, self.path, count, context_tokens, found)

    def _of_length(
        self, rows: list[Row], context_tokens: int, count_tokens: CountTokens, seed: int
    ) -> Iterator[Example]:
        count_context = self.counting(count_tokens)
        longer: list[Row] = []
        index = 0
        for row in rows:
            if count_context(row.context) > context_tokens:
                longer.append(row)
                continue
            rng = random.Random(f"{self.name}/{seed}/{row.id}")
            depth = depth_of(self.depth, index, rng)
            others = rng.sample(rows, min(len(rows), _MOST_DISTRACTORS))
            texts = list(dict.fromkeys(other.context for other in others if may_distract(other.context, row)))
            context = among_distractors(row.context, texts, depth, context_tokens, count_context, rng)
            yield self.example(row, context or row.context)
            index += 1
        for row in longer:
            shortened = _shorten(row, context_tokens, count_context)
            if shortened is not None:
                yield self.example(row, shortened)


def enough(
    task: str, path: str, count: int, context_tokens: int | None, found: list[Example]
) -> list[Example]:
    """`found`. Raises UsageError where these are fewer than the `count` that were asked."""
    if len(found) < count:
        source = path or "the built-in passages"
        have = f"{source} has" if path else f"{source} have"
        length = f" with a context of at most {context_tokens} tokens" if context_tokens is not None else ""
        raise UsageError(f"task {task}: {count} examples were asked; {have} {len(found)}{length}")
    return found


def may_distract(text: str, row: Row) -> bool:
    """Whether `text` can stand beside the row's context without answering its question or repeating it."""
    shared = text == row.context or row.context in text or text in row.context
    return not shared and not any(
        _stands_in(answer, text) for answer in row.answers if answer.lower() not in ("yes", "no")
    )


def _stands_in(answer: str, text: str) -> bool:
    """Whether `text` holds the answer, and not as a part of a longer word."""
    starts, ends = (c.isalnum() and not unspaced(c) for c in (answer[0], answer[-1]))
    before = rf"(?:\b|(?<=[{UNSPACED}]))" if starts else ""
    behind = (
        rf"(?:\b|(?=[{UNSPACED}{KOREAN}]))" if ends else ""
    )  # Korean joins particles to words of any script
    pattern = f"{before}{re.escape(unicodedata.normalize('NFC', answer))}{behind}"
    return re.search(pattern, unicodedata.normalize("NFC", text), re.IGNORECASE) is not None


def _shorten(row: Row, context_tokens: int, count_context: CountTokens) -> str | None:
    if row.paragraphs and any(gold for _, gold in row.paragraphs):
        gold = [i for i, (_, is_gold) in enumerate(row.paragraphs) if is_gold]
        return around([text for text, _ in row.paragraphs], gold, "\n", context_tokens, count_context)
    pieces = sentences(row.context)
    for answer in row.answers:
        for i, piece in enumerate(pieces):
            if answer.lower() in piece.lower():
                return around(pieces, [i], " ", context_tokens, count_context)
    return None
