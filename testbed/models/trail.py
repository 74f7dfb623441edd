"""What decoding an answer leaves: how likely a text is that begins as the answer does is then known without reading all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from testbed.models.live import LiveCache

#: A pass over ids behind a live cache: the logits of the last `keep` of them.
Forward = Callable[[LiveCache, Sequence[int], int], Tensor]


class Trail:
    """Of one answer, behind one question and past: the passes that were made for it, a token's behind another's."""

    def __init__(self) -> None:
        self._live: LiveCache | None = None
        self._question = 0  #: tokens of it
        self._read: list[int] = []  #: those behind it
        self._logits: list[Tensor] = []  #: behind the question, and behind each of these, [1, vocabulary]

    def __bool__(self) -> bool:
        """Whether there was a pass."""
        return self._live is not None

    def add(self, live: LiveCache, ids: Sequence[int], logits: Tensor) -> None:
        """A pass: what it read behind what `live` held, the question first; the last token's logits."""
        if self._live is None:
            self._live, self._question = live, len(ids)
        else:
            self._read += ids
        self._logits.append(logits)

    def along(self, answer: Sequence[int], forward: Forward) -> Tensor:
        """The logits at each token of another answer, [tokens, vocabulary], behind the true ones. What is read for it takes the
        place of what was."""
        if self._live is None:
            raise ValueError("a trail needs a pass")
        taught = list(answer[:-1])
        both = zip(self._read, taught, strict=False)
        same = next(
            (n for n, (read, own) in enumerate(both) if read != own), min(len(self._read), len(taught))
        )
        logits, rest = self._logits[: same + 1], taught[same:]
        if rest:
            self._live.rewind(self._question + same)
            logits += forward(self._live, rest, len(rest)).split(1)
            self._read, self._logits = taught, logits
        return torch.cat(logits)
