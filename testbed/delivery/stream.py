"""A part crosses while the next one is prefilled and encoded, and is decoded while the next one crosses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from testbed.delivery.delivery import Part, Pipelined, cut


@dataclass(frozen=True)
class Stream(Pipelined):
    """Part by part: blocks of tokens from the front, or groups of layers from the first on."""

    name: ClassVar[str] = "stream"
    source: ClassVar[str] = (
        "Liu et al., CacheGen, SIGCOMM 2024 (tokens); Patel et al., Splitwise, ISCA 2024 (layers)"
    )

    by: Literal["tokens", "layers"] = "tokens"
    chunk: int = 0  #: tokens or layers of a part; 0: 256 tokens, 4 layers

    def __post_init__(self) -> None:
        self.require(
            "chunk",
            "at least 8 tokens or 1 layer",
            self.chunk == 0 or self.chunk >= (8 if self.by == "tokens" else 1),
        )
        if self.chunk == self._usual:  # one text for one delivery
            object.__setattr__(self, "chunk", 0)

    @property
    def _usual(self) -> int:
        return 256 if self.by == "tokens" else 4

    @property
    def needs_every_part(self) -> bool:
        return self.by == "layers"

    def parts(self, tokens: int, layers: int) -> list[Part]:
        return cut(self.by, tokens if self.by == "tokens" else layers, self.chunk or self._usual)
