"""Block by block, each at the level that a policy chooses for it by what the link has done so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from testbed.codecs.spec import CodecSpec
from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.delivery import SKIP, TEXT, Part, Pipelined, cut
from testbed.delivery.policies.policy import Policy
from testbed.delivery.policies.throughput import Throughput
from testbed.errors import SpecError
from testbed.kinds import Time, clip

_MOST_LEVELS = 16
_USUAL = Throughput()


@dataclass(frozen=True)
class Adaptive(Pipelined):
    """Blocks of tokens from the front, each as one of `levels`: a codec, ``text`` (the cloud computes it) or ``skip`` (left out).

    levels: the best first, by whoever writes them. deadline: of the first token, from when the request begins; without one the
    earliest is sought.
    """

    name: ClassVar[str] = "adaptive"
    source: ClassVar[str] = "Liu et al., CacheGen, SIGCOMM 2024, section 5.3"
    depends_on_times: ClassVar[bool] = True

    levels: tuple[str, ...]
    deadline: Time | None = None
    policy: Policy = _USUAL
    chunk: int = 256  #: tokens of a part

    def __post_init__(self) -> None:
        self.require("chunk", "from 8 to 65536 tokens", 8 <= self.chunk <= 65536)
        self.require("deadline", "from 1ms to 1h", self.deadline is None or 0.001 <= self.deadline <= 3600)
        object.__setattr__(self, "levels", tuple(self._level(text) for text in self.levels))
        self.require("levels", f"from 1 to {_MOST_LEVELS}", 1 <= len(self.levels) <= _MOST_LEVELS)
        for level in self.levels:
            if self.levels.count(level) > 1:
                raise SpecError(f"{self.name}: levels: {level!r} is listed twice")
        if set(self.levels) == {SKIP}:
            raise SpecError(f"{self.name}: levels: all would be left out; give a codec or {TEXT}, too")
        if SKIP in self.levels and self.deadline is None:
            raise SpecError(
                f"{self.name}: nothing has to be left out without a deadline, such as deadline=2s"
            )
        self.policy.check(self.levels)

    def _level(self, text: str) -> str:
        """Its canonical text. Raises SpecError."""
        if text in (TEXT, SKIP):
            return text
        try:
            codec = parse_codec(text)
        except SpecError as error:
            raise SpecError(f"{self.name}: level {clip(text)} is not {TEXT}, {SKIP} or a {error}") from None
        if codec.unfit:
            raise SpecError(f"{self.name}: level {clip(text)}: {codec.unfit}")
        return str(codec)

    @property
    def codecs(self) -> tuple[CodecSpec, ...]:
        return tuple(parse_codec(level) for level in self.levels if level not in (TEXT, SKIP))

    def codec_of(self, codec: CodecSpec) -> CodecSpec | None:
        """The best of its own, whatever the scenario lists."""
        return next(iter(self.codecs), None)

    def bound(self, model: str) -> Adaptive:
        bound = {str(codec): str(codec.bound(model)) for codec in self.codecs}
        return replace(self, levels=tuple(bound.get(level, level) for level in self.levels))

    def ladder(self, codec: str) -> tuple[str, ...]:
        """Its own levels, whatever the codec."""
        return self.levels

    def parts(self, tokens: int, layers: int) -> list[Part]:
        return cut("tokens", tokens, self.chunk)
