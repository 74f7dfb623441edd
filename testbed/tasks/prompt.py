"""How a task's texts are laid out for a model: plain text with k demonstrations, or the model's own chat template.

Written as ``plain:2`` or ``chat:0`` (the number of demonstrations), or ``auto``: what a measured comparison found best for the
model's family (docs/tasks.md). Knows no model: a chat template comes in as a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from testbed.errors import SpecError, UsageError
from testbed.tasks.padding import CountTokens
from testbed.tasks.task import Example, Task

#: Turns of a conversation ({"role": "user" or "assistant", "content": text}) -> the text that opens the next answer.
Template = Callable[[list[dict[str, str]]], str]

_MOST_SHOTS = 2
_HERE = "\ue000the example goes here\ue001"  # stands for the example's own turn; private-use characters, in no template
_INSTRUCTION = "Answer the question from the context, with the answer alone and as few words as possible."


@dataclass(frozen=True)
class PromptFormat:
    """A layout and the number of demonstrations in it."""

    layout: Literal["plain", "chat"]
    shots: int

    def __str__(self) -> str:
        return f"{self.layout}:{self.shots}"


#: The best format by family, as benchmarks/prompt_formats.py measured it (docs/tasks.md); all other families get the default.
MEASURED: dict[str, PromptFormat] = {
    "smollm2": PromptFormat("plain", 2),
    "gemma3": PromptFormat("plain", 2),
}
DEFAULT = PromptFormat("plain", 2)


def parse_prompt(text: str) -> PromptFormat | None:
    """A format as people write it: ``auto`` (None), ``plain``, ``chat``, ``plain:0`` … ``chat:2``. Raises SpecError.

    Without a number, ``plain`` has two demonstrations and ``chat`` none.
    """
    if text == "auto":
        return None
    found = re.fullmatch(r"(plain|chat)(?::(\d))?", text)
    if not found or int(found[2] or 0) > _MOST_SHOTS:
        raise SpecError(
            f"prompt {text!r}: write auto, plain or chat, with the number of demonstrations where it matters: "
            f"plain:0 to plain:{_MOST_SHOTS}, chat:0 to chat:{_MOST_SHOTS}"
        )
    layout: Literal["plain", "chat"] = "plain" if found[1] == "plain" else "chat"
    return PromptFormat(layout, int(found[2]) if found[2] else {"plain": 2, "chat": 0}[layout])


def choose_prompt(text: str, model: str) -> PromptFormat:
    """The format that `text` means for a model's name. Raises UsageError."""
    name = re.sub(r"[^a-z0-9]", "", model.lower())
    measured = next((found for family, found in MEASURED.items() if family in name), DEFAULT)
    return parse_prompt(text) or measured


class Prompted:
    """A task whose prompts are written in a format; everything else about it is the task's own."""

    def __init__(self, task: Task, prompt: PromptFormat, template: Template | None = None) -> None:
        """template: of the model, for the layout ``chat``. Raises UsageError where there is none."""
        if prompt.layout == "chat" and template is None:
            raise UsageError(f"prompt {prompt}: the model has no chat template; use plain")
        self.task, self.prompt = task, prompt
        self.name, self.stop, self.metric = task.name, task.stop, task.metric
        self.max_new_tokens, self.label, self.demonstrations = (
            task.max_new_tokens,
            task.label,
            task.demonstrations,
        )
        #: What the layout has between a question and its answer, besides the question's own text; special tokens in it are meant.
        self.closing = ""
        self._prefix = self._chat(template) if prompt.layout == "chat" and template else self._plain()

    @property
    def prefix(self) -> str:
        """What stands before the example's context: demonstrations, and the template's opening."""
        return self._prefix

    def _plain(self) -> str:
        return "".join(
            f"{self.context_text(shown)}{self.question_text(shown)}{self.answer_text(shown)}\n"
            for shown in self.demonstrations[: self.prompt.shots]
        )

    def _chat(self, template: Template) -> str:
        turns = []
        for shown in self.demonstrations[: self.prompt.shots]:
            turns += [
                {"role": "user", "content": f"{self.context_text(shown)}{self._asked(shown)}"},
                {"role": "assistant", "content": shown.answers[0]},
            ]
        turns.append({"role": "user", "content": _HERE})
        turns[0]["content"] = f"{_INSTRUCTION}\n{turns[0]['content']}"
        head, here, self.closing = template(turns).partition(_HERE)
        if not here:
            raise UsageError(f"prompt {self.prompt}: the model's chat template does not show what users say")
        return head

    def _asked(self, example: Example) -> str:
        return self.task.question_text(example).removesuffix("\nAnswer:")

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        return self.task.examples(count, context_tokens, count_tokens, seed)

    def reach(
        self, examples: list[Example], count_tokens: CountTokens, prefix: int, max_new_tokens: int
    ) -> int:
        """Tokens that the longest of the prompts has, answer and `prefix` tokens included; perhaps a few more."""
        closing = count_tokens(self.closing)
        lengths = []
        for example in examples:
            answers = [self.answer_text(example), *self.choice_texts(example)]
            answer = max(max_new_tokens, *map(count_tokens, answers))
            lengths.append(
                count_tokens(self.context_text(example)) + count_tokens(self.question_text(example)) + answer
            )
        return prefix + closing + max(lengths, default=0)

    def context_text(self, example: Example) -> str:
        return self.task.context_text(example)

    def question_text(self, example: Example) -> str:
        if self.prompt.layout == "plain":
            return self.task.question_text(example)
        return self._asked(example)

    def answer_text(self, example: Example) -> str:
        return self._begun(self.task.answer_text(example))

    def choice_texts(self, example: Example) -> list[str]:
        return [self._begun(text) for text in self.task.choice_texts(example)]

    def _begun(self, text: str) -> str:
        """An answer as the layout lets it begin: a turn of a conversation has no space before it."""
        return text if self.prompt.layout == "plain" else text.removeprefix(" ")

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return self.task.score(answer, example)
