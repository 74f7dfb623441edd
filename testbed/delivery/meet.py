"""Two ways meet: the cloud prefills the context from its beginning while its cache arrives from its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.delivery import TEXT, Part, Pipelined, cut


@dataclass(frozen=True)
class Meet(Pipelined):
    """The text, then blocks of tokens, the last one first, until the cloud has computed all that is missing before them."""

    name: ClassVar[str] = "meet"
    source: ClassVar[str] = "Jin et al., Cake (Compute or Load KV Cache? Why Not Both?), arXiv 2410.03065"

    may_end: ClassVar[bool] = True
    depends_on_times: ClassVar[bool] = True

    chunk: int = 128  #: tokens of a part

    def __post_init__(self) -> None:
        self.require("chunk", "from 8 to 65536 tokens", 8 <= self.chunk <= 65536)

    def ladder(self, codec: str) -> tuple[str, ...]:
        """The text, and the codec of all that is sent behind it."""
        return (TEXT, codec)

    @property
    def needs_every_part(self) -> bool:
        return True

    def parts(self, tokens: int, layers: int) -> list[Part]:
        blocks = cut("tokens", tokens, self.chunk)[::-1]
        return [Part("tokens", 0, tokens, level=0), *(block._replace(level=1) for block in blocks)]
