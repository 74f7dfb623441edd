"""A task's examples as the edge makes them: in the model's prompt format, to length, and none too long for the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from testbed.endpoints.protocol import Prepare, PreparedExample
from testbed.errors import UsageError
from testbed.tasks.prompt import Prompted, choose_prompt
from testbed.tasks.task import Example, Task, make_task

if TYPE_CHECKING:
    from testbed.models.language import LanguageModel

#: Tokens left for a question.
_QUESTION_ROOM = 256


def make_examples(model: LanguageModel, message: Prepare) -> tuple[Prompted, list[Example]]:
    """The task with its prompts in the format that `prompt` names (see `tasks.prompt`), and `count` examples of it, their
    contexts of `context_tokens` of the model's tokens (None: as they are). Raises UsageError where they cannot be had.
    """
    made = prompted(model, make_task(message.task, **message.parameters), message.prompt)
    return made, made.examples(
        message.count, message.context_tokens, lambda text: len(model.tokenize(text)), message.seed
    )


def prompted(model: LanguageModel, task: Task, prompt: str) -> Prompted:
    """The task in the format that `prompt` names for this model. Raises UsageError where it has no such template."""
    format = choose_prompt(prompt, model.name)
    return Prompted(task, format, model.chat_template() if format.layout == "chat" else None)


def longest_context(
    model: LanguageModel, task: Prompted, examples: list[Example], max_new_tokens: int
) -> int:
    """Tokens of the longest context. Raises UsageError where one is empty, or leaves no room for question and answer."""
    longest = 0
    for example in examples:
        length = len(model.tokenize(task.context_text(example)))
        longest = max(longest, length)
        if length == 0:
            raise UsageError(f"task {task.name}: example {example.id!r} has an empty context")
    prefix = len(model.tokenize(task.prefix, start=True))
    room = model.max_positions - prefix - max_new_tokens - _QUESTION_ROOM
    if longest > room:
        raise UsageError(
            f"task {task.name}: a context of {longest} tokens leaves no room in a model of {model.max_positions} "
            f"positions; ask for context_tokens of at most {max(0, room)}"
        )
    return longest


def prepared(task: Prompted, example: Example) -> PreparedExample:
    """What the orchestrator gets of an example."""
    return PreparedExample(replace(example, context="", choices=()), task.answer_text(example))
