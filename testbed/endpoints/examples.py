"""A task as a model is asked it: in its prompt format, and no context too long for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.errors import UsageError
from testbed.tasks.prompt import Prompted, choose_prompt
from testbed.tasks.task import Example, Task

if TYPE_CHECKING:
    from testbed.models.language import LanguageModel

#: Tokens left for a question.
_QUESTION_ROOM = 256


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
