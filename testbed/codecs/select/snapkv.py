"""SnapKV: what the last tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector, pool

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class SnapKV(Selector):
    """Observation window: keeps what the context's last tokens attend to, and those tokens themselves.

    score[h, t] = pool over t's `kernel` neighbours of the mean, over the last `window` context tokens and the query
    heads of KV head h, of the causal softmax attention to t: [kv_heads, tokens]. The window is pooled apart, so that
    what it pays to itself does not leak into the tokens before it.

    window: 0: all context tokens. question: the question's tokens observe instead (the paper's setting, whose prompts end with
    the question), and behind a window of 0 beside them all: score[h, t] is the mean over every token of context and question
    then. In both cases no context token is kept by right.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation (arXiv:2404.14469)"

    window: int = 32
    kernel: int = 7
    pool: Literal["max", "mean"] = "max"
    question: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("window", "0 (all) or from 1 to 65536", 0 <= self.window <= 65536)
        self.require("kernel", "odd, from 1 to 1023", 1 <= self.kernel <= 1023 and self.kernel % 2 == 1)
        self.require("pool", "max or mean", self.pool in ("max", "mean"))

    def needs(self) -> Needs:
        if self.window == 0:
            return Needs(question=self.question, context_attention=True)
        return Needs(question=True) if self.question else Needs(context_queries=self.window)

    def always(self, tokens: int, budget: int) -> range:
        return range(0) if self.question else range(tokens - 1, max(-1, tokens - 1 - self.window), -1)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        if self.question or self.window == 0:
            attention, observers = self._observed(evidence, layer)
            return pool(attention / observers, self.kernel, self.pool)
        attention = evidence.attention_of_context(layer, self.window) / self.window
        before = max(0, attention.shape[1] - self.window)
        attention[:, :before] = pool(attention[:, :before], self.kernel, self.pool)
        return attention

    def _observed(self, evidence: Evidence, layer: int) -> tuple[Tensor, int]:
        """What the question pays to each context token, what the whole context does, or both; and how many tokens those are."""
        if self.window:
            return evidence.attention_of_question(layer), evidence.question_tokens
        attention, observers = evidence.attention_of_context(layer, last=None), evidence.tokens
        if self.question:
            attention = attention + evidence.attention_of_question(layer)
            observers += evidence.question_tokens
        return attention, observers
