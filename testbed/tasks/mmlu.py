"""MMLU: multiple choice without a text. Its context is what such a question is asked behind: others, with their answers.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021: five questions of a subject with their answers,
and the letter that the model finds likeliest behind the one that is asked. A cache of them is what crosses. They do not hold the
answer: by the rule on floors (docs/tasks.md) such a pair tells little of what a codec lost of the context.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from testbed.errors import UsageError
from testbed.files import read_at_most
from testbed.tasks.hub import hub_records
from testbed.tasks.padding import CountTokens, most_that_fit
from testbed.tasks.rows import HUB, check_path, enough
from testbed.tasks.task import Example, ExtractiveTask

LETTERS = "ABCD"
_SHOTS = 5
_LARGEST_FILE = 2**25
_FORM = "question,A,B,C,D,answer"


class Asked(NamedTuple):
    """One question: its text, four options, the letter of the right one."""

    id: str
    question: str
    options: tuple[str, ...]
    letter: str

    def text(self) -> str:
        """As it is asked, up to where the letter begins."""
        options = "".join(
            f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)
        )
        return f"{self.question}{options}\nAnswer:"


@dataclass(frozen=True)
class MMLU(ExtractiveTask):
    """Four-way multiple choice from a CSV file of MMLU's (`path`), or ``hub:mmlu``; the score is accuracy.

    The context is other questions with their answers: those of the subject's ``_dev.csv`` (beside the file, or in ``../dev``),
    then the file's own; five, or as many as fit into the asked length.
    """

    path: str

    name: ClassVar[str] = "mmlu"
    metric: ClassVar[str] = "em"
    max_new_tokens: ClassVar[int] = 2
    demonstrations: ClassVar[tuple[Example, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", check_path(self.name, self.path))

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` questions, each behind others; see `Task.examples`."""
        dev, own = read(self.path)
        random.Random(f"{self.name}/{seed}").shuffle(own)
        found: list[Example] = []
        for asked in own:
            if len(found) == count:
                break
            rng = random.Random(f"{self.name}/{seed}/{asked.id}")
            others = [other for other in own if other.question != asked.question]
            shown = [*dev, *rng.sample(others, len(others))]
            if context := self._shots(shown, context_tokens, self.counting(count_tokens)):
                found.append(Example(asked.id, context, asked.text(), (asked.letter,), tuple(LETTERS)))
        return enough(self.name, self.path, count, context_tokens, found)

    def _shots(self, shown: Sequence[Asked], context_tokens: int | None, count_context: CountTokens) -> str:
        """Empty where not even one fits."""

        def build(number: int) -> str:
            return "\n".join(f"{shot.text()} {shot.letter}" for shot in shown[:number])

        if context_tokens is None:
            return build(_SHOTS)
        fitting = most_that_fit(build, len(shown), context_tokens, count_context)
        return build(fitting or 0)

    def context_text(self, example: Example) -> str:
        return f"{example.context}\n"

    def question_text(self, example: Example) -> str:
        return example.question


def read(path: str) -> tuple[list[Asked], list[Asked]]:
    """The subject's questions to be shown, and those to be asked. Raises UsageError naming file and line."""
    if path.startswith(HUB):
        name = path.removeprefix(HUB)
        records = hub_records(name)
        return [], [
            _of_hub(record, f"{path}:{number}", str(number)) for number, record in enumerate(records, 1)
        ]
    file = Path(path)
    subject = file.stem.rpartition("_")[0] or file.stem
    beside = (file.with_name(f"{subject}_dev.csv"), file.parent.parent / "dev" / f"{subject}_dev.csv")
    dev = next((_read(p) for p in beside if p.is_file() and p.resolve() != file.resolve()), [])
    return dev, _read(file)


def _read(path: Path) -> list[Asked]:
    try:
        text = read_at_most(path, _LARGEST_FILE).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not in UTF-8: {error.reason}; write it in UTF-8") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[Asked] = []
    try:
        for fields in lines:
            place = f"{path}:{lines.line_num}"
            if not fields or (not found and [field.lower() for field in fields[-2:]] == ["d", "answer"]):
                continue
            if len(fields) != 2 + len(LETTERS):
                raise UsageError(
                    f"{place}: {len(fields)} fields; a line of MMLU's is {_FORM}, texts with commas in quotes"
                )
            found.append(_asked(f"{path.stem}-{lines.line_num}", fields[0], fields[1:-1], fields[-1], place))
    except csv.Error as error:
        raise UsageError(f"{path}:{lines.line_num}: not CSV: {error}; a line is {_FORM}") from error
    return found


def _of_hub(record: Any, place: str, number: str) -> Asked:
    try:
        letter = LETTERS[record["answer"]]
        return _asked(f"{record['subject']}-{number}", record["question"], record["choices"], letter, place)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(f"{place}: not a question of MMLU's: {error}") from error


def _asked(name: str, question: str, options: Sequence[str], letter: str, place: str) -> Asked:
    texts = [" ".join(text.split()) for text in (question, *options)]
    if not all(texts) or len(texts) != 1 + len(LETTERS):
        raise UsageError(f"{place}: a question or an option is empty; a line of MMLU's is {_FORM}")
    if (right := letter.strip().upper()) not in tuple(LETTERS):
        raise UsageError(f"{place}: the answer {letter[:20]!r} is none of {', '.join(LETTERS)}")
    return Asked(name, texts[0], tuple(texts[1:]), right)
