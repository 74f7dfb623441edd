"""What the edge holds: its tasks' examples, and of the one at hand all that was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.endpoints.feed import Made
from testbed.endpoints.protocol import Asked, TrialResult
from testbed.endpoints.side import Prefix
from testbed.transport.transport import Bytes

if TYPE_CHECKING:
    from testbed.models.language import LanguageModel
    from testbed.models.prefill import Prefill
    from testbed.tasks.prompt import Prompted
    from testbed.tasks.task import Example


@dataclass
class TaskExamples:
    """A task's examples at one context length."""

    task: Prompted
    examples: list[Example]
    prefix: str
    max_new_tokens: int

    def asked(self, number: int) -> Asked:
        """One of them, as a model is asked it."""
        example = self.examples[number]
        return Asked(
            prefix=self.prefix,
            context=self.task.context_text(example),
            question=self.task.question_text(example),
            gold=self.task.answer_text(example),
            stop=self.task.stop,
            choices=tuple(self.task.choice_texts(example)),
            max_new_tokens=self.max_new_tokens,
        )


@dataclass
class Encoded:
    """A payload ready to be sent, and what it took to make."""

    pieces: Sequence[Bytes]
    select_s: float = 0.0
    encode_s: float = 0.0
    question_s: float | None = None  #: of select_s, the question's pass; None: the context's text
    shared_bytes: int = 0  #: what the other side must have had beforehand to read it


@dataclass
class Prefilled:
    """The example at hand: its prefill and everything made from it so far."""

    key: tuple[int, int]  #: batch and example
    batch: TaskExamples
    example: Example
    prefix: Prefix
    #: the answer's tokens, which no deployment has: for likelihoods, and for selectors that look at them
    gold: list[int]
    ids: list[int]
    prefill: Prefill
    prefill_s: float
    used: bool = False  #: a row has carried the prefill's time as its own
    #: by codec and repeat; of a scout's choice by its selector
    encoded: dict[tuple[str, int], Encoded] = field(default_factory=dict)
    #: by repeat, its answer here; `reused`: what the next row with it has to call so
    local: dict[int, TrialResult] = field(default_factory=dict)
    #: by codec ("": the text), delivery and repeat, the request by which the cloud knows its answer
    answered: dict[tuple[str, str, int], int] = field(default_factory=dict)
    #: by placement, delivery and repeat, what was made of it in parts
    made: dict[tuple[str, str, int], Made] = field(default_factory=dict)

    @property
    def text(self) -> bytes:
        """The context's, as it is sent."""
        return self.batch.task.context_text(self.example).encode()

    def question(self, model: LanguageModel) -> list[int]:
        """The question's tokens, and what the prompt's layout has behind it."""
        return model.tokenize(self.batch.task.question_text(self.example), closing=self.prefix.closing)
