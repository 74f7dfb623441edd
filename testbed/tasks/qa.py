"""Questions from a file of JSON lines: SQuAD, MCTest, HotpotQA and the like, brought into one format.

A line is an object with ``context``, ``question`` and ``answers`` (a list of texts, the preferred one first), and optionally
``id`` (default: the line's number), ``paragraphs`` (a list of ``title``, ``text``, ``gold``) and ``choices``. Choices are not
shown: the question is answered freely, and the answer's words are compared with the right choice's text.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from testbed.errors import UsageError
from testbed.tasks.padding import (
    CountTokens,
    Depth,
    among_distractors,
    around,
    check_depth,
    depth_of,
    sentences,
)
from testbed.tasks.task import Example, ExtractiveTask

_LONGEST_LINE = 4 * 2**20  # bytes
_LARGEST_FILE = 2**30  # bytes
_MOST_DISTRACTORS = 2_000  # rows whose contexts are looked at to pad one example
_BLANK_LINES = re.compile(r"\s*\n\s*")


@dataclass(frozen=True)
class Row:
    """A checked line of a file. `paragraphs` are (text, gold) pairs; empty where the line had none."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class QA(ExtractiveTask):
    """Questions and contexts from a file of JSON lines (`path`), such as SQuAD's, answered freely.

    Rows come in an order drawn from the seed. With a length asked, rows whose context fits come first, padded with other rows'
    contexts around them (`depth`: 0 first … 1 last, ``random``, or a list taken in turn). Longer ones follow, cut down:
    to the gold paragraphs and as many others as fit, or to the sentences around the first gold answer; a row
    whose answer does not stand in its context is passed over, since nobody can tell what may be cut.
    """

    path: str
    depth: Depth = "random"

    name: ClassVar[str] = "qa"
    demonstrations: ClassVar[tuple[Example, ...]] = (
        Example(
            "shown-1",
            "The mill at Hartley was built by Anna Brook in 1720. It ground oats for the whole valley.",
            "Who built the mill at Hartley?",
            ("Anna Brook",),
        ),
        Example(
            "shown-2",
            "Tim wanted to go swimming, but it was raining. He stayed in the kitchen and baked a cake.",
            "What did Tim bake?",
            ("a cake",),
        ),
    )

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise UsageError(f"task qa: path {self.path!r} is not the name of a file of JSON lines")
        object.__setattr__(self, "path", str(self.path))
        if not Path(self.path).is_file():
            raise UsageError(f"task qa: {self.path} does not exist or is not a file")
        object.__setattr__(self, "depth", check_depth(self.name, self.depth))

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples from the file; see `Task.examples`. Raises UsageError naming the line of a malformed row."""
        rows = list(read_rows(Path(self.path)))
        random.Random(f"qa/{seed}").shuffle(rows)
        if context_tokens is None:
            found = [Example(row.id, row.context, row.question, row.answers) for row in rows[:count]]
        else:
            found = list(itertools.islice(self._of_length(rows, context_tokens, count_tokens, seed), count))
        if len(found) < count:
            length = (
                f" with a context of at most {context_tokens} tokens" if context_tokens is not None else ""
            )
            raise UsageError(f"task qa: {count} examples were asked; {self.path} has {len(found)}{length}")
        return found

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
            rng = random.Random(f"qa/{seed}/{row.id}")
            depth = depth_of(self.depth, index, rng)
            others = rng.sample(rows, min(len(rows), _MOST_DISTRACTORS))
            texts = list(dict.fromkeys(other.context for other in others if _may_distract(other, row)))
            context = among_distractors(row.context, texts, depth, context_tokens, count_context, rng)
            yield Example(row.id, context or row.context, row.question, row.answers)
            index += 1
        for row in longer:
            shortened = _shorten(row, context_tokens, count_context)
            if shortened is not None:
                yield Example(row.id, shortened, row.question, row.answers)


def _may_distract(other: Row, row: Row) -> bool:
    """Whether `other`'s context can stand beside `row`'s without answering its question or repeating its text."""
    shared = other.context == row.context or row.context in other.context or other.context in row.context
    return not shared and not any(
        re.search(rf"\b{re.escape(answer)}\b", other.context, re.IGNORECASE)
        for answer in row.answers
        if answer.lower() not in ("yes", "no")
    )


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


@functools.lru_cache(maxsize=4)
def _cached(path: str, _stamp: tuple[int, int]) -> tuple[Row, ...]:
    return tuple(_read(Path(path)))


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a file of JSON lines; blank lines are passed over.

    Raises UsageError naming the file and the line of the first row that is not as the module's text says, and where the file
    cannot be read or is larger than 1 GiB.
    """
    try:
        stat = path.stat()
        if stat.st_size > _LARGEST_FILE:
            raise UsageError(f"{path}: larger than {_LARGEST_FILE >> 30} GiB; split it")
        return _cached(str(path), (stat.st_mtime_ns, stat.st_size))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: Path) -> Iterator[Row]:
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > _LONGEST_LINE:
                raise UsageError(f"{path}:{number}: the line is longer than {_LONGEST_LINE >> 20} MiB")
            if not line.strip():
                continue
            row = _row(line, f"{path}:{number}", str(number))
            if row.id in seen:
                raise UsageError(
                    f"{path}:{number}: the id {row.id[:40]!r} was given in line {seen[row.id]} already"
                )
            seen[row.id] = number
            yield row


def _row(line: bytes, place: str, default_id: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not a line of JSON in UTF-8: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{place}: expected an object with context, question and answers")
    name = value.get("id", default_id)
    if isinstance(name, bool) or not isinstance(name, str | int) or not _encodable(str(name)):
        raise UsageError(f"{place}: id is not a text or a whole number")
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers:
        raise UsageError(f"{place}: answers is not a list with at least one text")
    golds = tuple(" ".join(_text(gold, f"answers[{i}]", place).split()) for i, gold in enumerate(answers))
    context = _BLANK_LINES.sub("\n", _text(value.get("context"), "context", place).strip())
    question = " ".join(_text(value.get("question"), "question", place).split())
    return Row(str(name), context, question, golds, _paragraphs(value.get("paragraphs"), place))


def _paragraphs(value: Any, place: str) -> tuple[tuple[str, bool], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UsageError(f"{place}: paragraphs is not a list of objects with title, text and gold")
    found = []
    for i, each in enumerate(value):
        text = " ".join(_text(each.get("text"), f"paragraphs[{i}].text", place).split())
        title = each.get("title")
        if title is not None:
            text = f"{' '.join(_text(title, f'paragraphs[{i}].title', place).split())}: {text}"
        found.append((text, each.get("gold") is True))
    return tuple(found)


def _text(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip() or not _encodable(value):
        raise UsageError(f"{place}: {what} is missing or not a text")
    return value


def _encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
