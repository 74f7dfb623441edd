"""What a diagnosis is asked for; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """bits: of the coarse quantization. scale: its scales, as `mixed` has them. high: bits of what is protected. measure: "nll"
    or "score", whose loss must stay within `epsilon` (nats a token, or points of the score). `examples` rank the layers, and as
    many others choose the set. rule: "smallest", the smallest set that holds, or "published", the layers that alone cost more
    than 3 % of the score (`published`), which asks `examples` alone. prompt: as a run has it.
    """

    model: str
    task: str = "needle"
    context_tokens: int = 512
    bits: int = 4
    scale: str = "group"
    high: int = 8
    examples: int = 8
    epsilon: float = 0.05
    measure: str = "nll"
    seed: int = 1
    threads: int | None = None
    rule: str = "smallest"
    prompt: str = "auto"
    parameters: dict[str, Any] = field(default_factory=dict)  #: of the task
