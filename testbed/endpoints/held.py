"""The example at hand on the edge: its prefill, and everything made from it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.endpoints.side import Prefix

if TYPE_CHECKING:
    from testbed.models.language import Prefill
    from testbed.tasks.prompt import Prompted
    from testbed.tasks.task import Example


@dataclass
class Batch:
    """A task's examples at one context length."""

    task: Prompted
    examples: list[Example]
    prefix: str
    max_new_tokens: int


@dataclass
class Encoded:
    """A payload ready to be sent, and what it took to make."""

    payload: bytes | bytearray | memoryview
    select_s: float = 0.0
    encode_s: float = 0.0
    question_s: float | None = None  #: of select_s, the question's pass; None: the context's text
    shared_bytes: int = 0  #: what the other side must have had beforehand to read it


@dataclass
class Local:
    """An answer given on this machine alone, and its stages."""

    text: str
    tokens: int
    token_s: float | None
    first_token_s: float
    generate_s: float
    used: bool = False  #: a row has carried these times as its own


@dataclass
class Held:
    """The example at hand: its prefill and everything made from it so far."""

    key: tuple[int, int]
    prefix: Prefix
    context: bytes  #: its text
    question: str
    choices: tuple[str, ...]
    ids: list[int]
    prefill: Prefill
    prefill_s: float
    used: bool = False  #: a row has carried the prefill's time as its own
    encoded: dict[tuple[str, int], Encoded] = field(default_factory=dict)
    local: dict[int, Local] = field(default_factory=dict)
    #: by codec ("": the text) and repeat, the request by which the cloud knows its answer
    answered: dict[tuple[str, int], int] = field(default_factory=dict)
