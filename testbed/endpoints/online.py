"""Selection while the context still arrives: the question is asked anew behind each chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from testbed.codecs.evidence import Evidence, Needs
from testbed.endpoints.gathering import gather
from testbed.models.language import Prefill

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.kept import Kept
    from testbed.codecs.select import Selector
    from testbed.models.kvcache import KVCache
    from testbed.models.language import LanguageModel


class OnlineSelection:
    """A question-aware selector over a context that comes in chunks, such as online Q2C.

    After a chunk the question's tokens, few beside a chunk's, run behind all that has arrived. So what is known then is what
    the selector says of a context that ends there, and behind the last chunk it is what it says of the whole.
    """

    def __init__(
        self, model: LanguageModel, selector: Selector, prefix: KVCache | None, question_ids: Sequence[int]
    ) -> None:
        self._model, self._selector = model, selector
        self._prefix, self._question = prefix, question_ids
        self._arrived: KVCache | None = None
        self._evidence: Evidence | None = None

    def arrive(self, chunk: KVCache) -> Kept:
        """Take in the cache of the next chunk's tokens; returns what to keep of all that has arrived."""
        import torch

        self._arrived = chunk if self._arrived is None else self._model.join(self._arrived, chunk)
        context = Prefill(self._arrived, [], torch.arange(0), None)
        needs = Needs(question=True)
        self._evidence = gather(self._model, needs, self._prefix, context, self._question)
        return self._selector.select(self._evidence)

    def scores(self, layer: int) -> Tensor:
        """What each token that has arrived is worth to the selector, float32 [kv_heads, tokens]."""
        if self._evidence is None:
            raise ValueError("no chunk has arrived")
        return self._selector.scores(self._evidence, layer)
