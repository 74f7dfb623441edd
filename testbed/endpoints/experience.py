"""What an edge has seen requests take, by which it forecasts the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import linear_regression

from testbed.delivery.delivery import Part
from testbed.delivery.policies.margin import Margin
from testbed.endpoints.spans import CLOUD, EDGE, Span

_LAST = 16  # passes


@dataclass
class Passes:
    """What a pass over tokens takes at the cloud: so long, and so long more for each token; a line through the last passes.
    before: one as this host makes it, until the cloud has told.
    """

    before: tuple[int, float]
    told: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_LAST))

    def line(self) -> tuple[float, float]:
        """Seconds of a pass, and of each token in it."""
        passes = [*self.told] if len({tokens for tokens, _ in self.told}) > 1 else [self.before, *self.told]
        sizes, seconds = zip(*passes, strict=True)
        if len(set(sizes)) > 1:
            each, fixed = linear_regression(sizes, seconds)
            if each > 0 and fixed > 0:
                return fixed, each
        recent = self.told or passes
        return 0.0, sum(took for _, took in recent) / sum(tokens for tokens, _ in recent)


@dataclass
class Experience:
    """How long things took of late, in seconds a token; what was never done takes no time."""

    passes: Passes  #: of texts that the cloud prefills
    asked_s: float = 0.0  #: the question's pass here, until the cloud has told
    gather_s: float = 0.0  #: what selectors choose by, in seconds a request
    select_s: dict[str, float] = field(default_factory=dict)  #: by level, in seconds a request
    encode_s: dict[str, float] = field(default_factory=dict)  #: by level
    decode_s: dict[str, float] = field(default_factory=dict)
    told_rest_s: float | None = None
    margins: dict[tuple[str, str], Margin] = field(default_factory=dict)  #: by delivery and link

    def margin(self, delivery: str, link: str) -> Margin:
        """That of a delivery's requests over a link."""
        return self.margins.setdefault((delivery, link), Margin())

    def rest_s(self, delay_s: float) -> float:
        """From when all chunks are rebuilt to the first token at the edge, a way of so long included."""
        return self.asked_s + delay_s if self.told_rest_s is None else self.told_rest_s

    def learn(self, parts: Sequence[Part], levels: Sequence[str], spans: Sequence[Span]) -> None:
        """What a request's spans tell of chunks that went at these levels. A chunk waits for what the cloud does with it; what is
        joined at the end waits for nothing, and is called by the last chunk's number, which may never have come.
        """
        waited_for = set[int]()
        joined_at: float | None = None
        for span in spans:
            if span.chunk >= len(levels):
                continue
            tokens = parts[span.chunk].stop - parts[span.chunk].start
            level, seconds = levels[span.chunk], span.end - span.start
            if span.side == EDGE and span.stage == "encode":
                self.encode_s[level] = seconds / tokens
            elif span.side == CLOUD and span.stage == "queue":
                waited_for.add(span.chunk)
            elif span.side == CLOUD and span.stage in ("decode", "prefill"):
                if span.chunk not in waited_for:
                    joined_at = span.start
                elif span.stage == "prefill":
                    self.passes.told.append((span.bytes, seconds))
                else:
                    self.decode_s[level] = seconds / tokens
                waited_for.discard(span.chunk)
        first_tokens = [span.end for span in spans if span.stage == "first_token"]
        if first_tokens and joined_at is not None:
            self.told_rest_s = max(0.0, first_tokens[-1] - joined_at)
