"""What a task is, how its prompt is laid out, and how it is found by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar, Protocol

from testbed.errors import UsageError
from testbed.kinds import load
from testbed.tasks.metrics import exact_match, token_f1

CountTokens = Callable[[str], int]

#: One line a task: name -> "module:class". The class is a frozen dataclass whose fields are the task's parameters.
TASKS = {
    "needle": "testbed.tasks.needle:Needle",
    "multikey": "testbed.tasks.multikey:MultiKey",
    "variables": "testbed.tasks.variables:Variables",
    "passages": "testbed.tasks.passages:Passages",
    "choice": "testbed.tasks.choice:Choice",
    "multihop": "testbed.tasks.multihop:Multihop",
    "qa": "testbed.tasks.qa:QA",
    "summary": "testbed.tasks.summary:Summary",
    "mmlu": "testbed.tasks.mmlu:MMLU",
}


@dataclass(frozen=True)
class Example:
    """One question about one context. `answers` are the gold answers, the preferred one first; there is at least one.

    `choices`: of a multiple-choice question; empty where the answer is free.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


class Task(Protocol):
    """A source of examples, the texts of their prompts, and the metric that scores an answer."""

    name: ClassVar[str]
    stop: ClassVar[str]  #: generation ends before this text
    metric: ClassVar[str]  #: what "score" is: "em", "f1", "recall" or "rouge_l"
    max_new_tokens: ClassVar[int]  #: enough for every answer that the task asks for
    demonstrations: ClassVar[tuple[Example, ...]]  #: short examples with their answers, for the prefix

    @property
    def label(self) -> str:
        """The task with the parameters that are not the defaults, such as ``needle(needles=4)``."""

    @property
    def prefix(self) -> str:
        """Instructions and demonstrations: fixed, known to both sides, never sent."""

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples whose `context_text` has at most `context_tokens` tokens, and few fewer.

        The same arguments give the same examples, and a larger `count` only adds to them. None for `context_tokens` takes
        contexts as long as they are. Raises UsageError where that many examples of that length cannot be had.
        """

    def context_text(self, example: Example) -> str:
        """The part of the prompt that the edge holds and the link must carry."""

    def question_text(self, example: Example) -> str:
        """What follows the context, up to where the answer begins."""

    def answer_text(self, example: Example) -> str:
        """The gold answer as a continuation of `question_text`, for its likelihood."""

    def choice_texts(self, example: Example) -> list[str]:
        """The example's choices as continuations of `question_text`; empty where the answer is free."""

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """``score`` (the task's metric), ``em`` and ``f1`` of a generated answer, each in 0..1."""


class ExtractiveTask:
    """The prompt that the built-in tasks share: two demonstrations, then the context, the question, and ``Answer:``.

    The three texts are tokenised apart and their tokens put one behind the other. So the pieces meet between a single newline
    and a letter, where no tokeniser merges: byte-pair tokenisers join two newlines at a text's end but not before a word.
    """

    name: ClassVar[str]
    demonstrations: ClassVar[tuple[Example, ...]]
    stop: ClassVar[str] = "\n"
    metric: ClassVar[str] = "f1"
    max_new_tokens: ClassVar[int] = 24

    @property
    def label(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        told = [
            f"{f.name}={_plain(_told(f.name, getattr(self, f.name)))}"
            for f in fields
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(told)})" if told else self.name

    @property
    def prefix(self) -> str:
        return "".join(
            f"{self.context_text(shown)}{self.question_text(shown)}{self.answer_text(shown)}\n"
            for shown in self.demonstrations
        )

    def context_text(self, example: Example) -> str:
        return f"Context: {example.context}\n"

    def question_text(self, example: Example) -> str:
        return f"Question: {example.question}\nAnswer:"

    def answer_text(self, example: Example) -> str:
        return f" {example.answers[0]}"

    def choice_texts(self, example: Example) -> list[str]:
        return [f" {choice}" for choice in example.choices]

    def counting(self, count_tokens: CountTokens) -> CountTokens:
        """Counts the tokens that a context has as `context_text` writes it."""
        return lambda context: count_tokens(self.context_text(Example("", context, "", ("",))))

    def score(self, answer: str, example: Example) -> dict[str, float]:
        given = self.cut(answer)
        scores = {"em": exact_match(given, example.answers), "f1": token_f1(given, example.answers)}
        return {"score": scores[self.metric], **scores}

    def cut(self, answer: str) -> str:
        """The answer up to the stop."""
        return answer.split(self.stop, 1)[0].strip()


@dataclass(frozen=True)
class TaskDescription:
    """A row of ``testbed tasks``: the name, one sentence, and each parameter with its default (None: it must be given)."""

    name: str
    summary: str
    metric: str
    parameters: dict[str, str | None]


def make_task(name: str, **parameters: Any) -> Task:
    """The task of that name with these parameters. Raises UsageError naming what is unknown, missing or out of range."""
    cls = _find(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for given in parameters:
        if given not in fields:
            remedy = _near(given, fields) or f"it takes {', '.join(fields)}"
            raise UsageError(f"task {name}: unknown parameter {given!r}; {remedy}")
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in parameters:
            raise UsageError(f"task {name}: the parameter {field.name!r} is missing")
    task: Task = cls(**parameters)
    return task


def parse_task(written: str | Mapping[str, Any]) -> Task:
    """The task that a scenario writes as ``needle`` or as ``{task: needle, needles: 4}``. Raises UsageError."""
    if isinstance(written, str):
        return make_task(written)
    if not isinstance(written, Mapping) or not isinstance(written.get("task"), str):
        raise UsageError(
            f"task {written!r}: expected a name or a mapping with 'task', such as {{task: needle}}"
        )
    parameters = {str(key): value for key, value in written.items() if key != "task"}
    return make_task(written["task"], **parameters)


def describe() -> list[TaskDescription]:
    """Every task that can be asked for, in the order of the registry."""
    rows = []
    for name in TASKS:
        cls = _find(name)
        summary = (inspect.getdoc(cls) or "").split("\n\n", 1)[0].replace("\n", " ")
        parameters = {
            field.name: None if field.default is dataclasses.MISSING else _plain(field.default)
            for field in dataclasses.fields(cls)
        }
        rows.append(TaskDescription(name, summary, cls.metric, parameters))
    return rows


def _find(name: str) -> Any:
    if name not in TASKS:
        remedy = _near(name, TASKS) or f"known are {', '.join(TASKS)}"
        raise UsageError(f"unknown task {name!r}; {remedy} (see `testbed tasks`)")
    return load(TASKS[name])


def _near(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def _told(name: str, value: Any) -> Any:
    """A file by its name alone: where it lies is nothing that a result is named by."""
    return PurePath(value).stem if name == "path" and not str(value).startswith("hub:") else value


def _plain(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
