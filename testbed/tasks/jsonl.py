"""Files of JSON lines, or of one JSON value: SQuAD, MCTest, HotpotQA and the like, brought into one format.

A line is of one of the forms that `forms` knows, or an object with ``context``, ``question``, ``answers`` (a list of texts, the
preferred one first), and optionally ``id`` (default: the line's number), ``paragraphs`` (a list of ``title``, ``text``,
``gold``) and ``choices`` (texts); with ``summary: true`` it needs no question. A ``.json`` file may be one value: a list of such
objects, SQuAD's articles, or TriviaQA's questions beside their texts (see `triviaqa`).
Files are not trusted: lines, lists and the file are bounded, and what is wrong is named by file and line.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.errors import UsageError
from testbed.files import open_named
from testbed.tasks.forms import SUMMARIZE, convert, records
from testbed.tasks.triviaqa import is_triviaqa, with_texts

_LONGEST_LINE = 4 * 2**20  # bytes
_LARGEST_FILE = 2**30  # bytes
_LARGEST_VALUE = 2**27  # bytes; of a file that is one value, which is read at once
_MOST_CHOICES = 64
_BLANK_LINES = re.compile(r"\s*\n\s*")


@dataclass(frozen=True)
class Row:
    """A checked line of a file. `paragraphs` are (text, gold) pairs; they and `choices` are empty where the line had none.
    summary: the answer is one of the context."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[tuple[str, bool], ...] = ()
    choices: tuple[str, ...] = ()
    summary: bool = False


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
    whole = _one_value(path) if path.suffix.lower() == ".json" else None
    if whole is not None:
        yield from unique(with_texts(whole, path) if is_triviaqa(whole) else records(whole), str(path))
        return
    seen: dict[str, int] = {}
    with open_named(path) as file:
        for number in itertools.count(1):
            line = file.readline(_LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > _LONGEST_LINE:
                raise UsageError(f"{path}:{number}: the line is longer than {_LONGEST_LINE >> 20} MiB")
            if not line.strip():
                continue
            row = _row(line, f"{path}:{number}", str(number))
            if row is None:
                continue
            if row.id in seen:
                raise UsageError(
                    f"{path}:{number}: the id {row.id[:40]!r} was given in line {seen[row.id]} already"
                )
            seen[row.id] = number
            yield row


def _one_value(path: Path) -> Any:
    """Of a file that is one JSON value; None where it is lines of them."""
    with open_named(path) as file:
        data = file.read(_LARGEST_VALUE + 1)
    if len(data) > _LARGEST_VALUE:
        raise UsageError(
            f"{path}: larger than {_LARGEST_VALUE >> 20} MiB; write its questions as lines of JSON"
        )
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            return None
        raise UsageError(f"{path}:{error.lineno}: not JSON: {error.msg[:80]}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON in UTF-8: {str(error)[:80]}") from error


def unique(found: list[Any], place: str) -> Iterator[Row]:
    """The rows of records, each id once: the first. Raises UsageError naming the record that has no known form."""
    seen = set()
    for number, record in enumerate(found, start=1):
        if (value := convert(record)) is None and record is not None:
            continue
        row = make_row(value, f"{place}:{number}", str(number))
        if row.id not in seen:
            yield row
        seen.add(row.id)


def _row(line: bytes, place: str, default_id: str) -> Row | None:
    """The line's row; None where it asks what its text does not answer."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not a line of JSON in UTF-8: {str(error)[:80]}") from error
    found = convert(value)
    return None if value is not None and found is None else make_row(found, place, default_id)


def make_row(value: Any, place: str, default_id: str) -> Row:
    """The row that a line's value says. Raises UsageError naming `place` and what is wrong."""
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
    summary = value.get("summary") is True
    asked = value.get("question") or (SUMMARIZE if summary else None)
    question = " ".join(_text(asked, "question", place).split())
    paragraphs, choices = _paragraphs(value.get("paragraphs"), place), _choices(value.get("choices"), place)
    return Row(str(name), context, question, golds, paragraphs, choices, summary)


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


def _choices(value: Any, place: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not 2 <= len(value) <= _MOST_CHOICES:
        raise UsageError(f"{place}: choices is not a list of 2 to {_MOST_CHOICES} texts")
    found = tuple(" ".join(_text(each, f"choices[{i}]", place).split()) for i, each in enumerate(value))
    if len(set(found)) < len(found):
        raise UsageError(f"{place}: choices holds the same text twice")
    return found


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
