"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

from testbed.codecs.select import Layers, Scope, Selector


@dataclass(frozen=True)
class Window(Selector):
    """Sinks and recent tokens: keeps the context's first `sinks` tokens and the last ones; looks at nothing else.

    A budget smaller than `sinks` keeps the first tokens alone.
    """

    name: ClassVar[str] = "window"
    source: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453)"

    scope: Scope = field(default="global", init=False)
    layers: Layers = field(default="all", init=False)
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        return chain(range(min(self.sinks, tokens)), range(tokens - 1, -1, -1))
