"""Selectors that take another's scores by its name: `by=q2c`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from testbed.codecs import registry
from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence

#: What a wrapper would leave out of the selector that it takes: only what ranks tokens, and nothing more, is taken.
_MORE = ("budgets", "allot", "choose", "select")


@dataclass(frozen=True)
class Wrapper(Selector):
    """Base of selectors that go by the scores of another, with its defaults; what that keeps always is kept first here, too."""

    by: str = "snapkv"  #: any selector that ranks tokens by a score

    def __post_init__(self) -> None:
        super().__post_init__()
        known = registry.stage_of(self.by) == "selector"
        self.require("by", f"a selector: {', '.join(registry.SELECTORS)}", known)
        kind = registry.find(self.by)
        ranks = all(getattr(kind, part) is getattr(Selector, part) for part in _MORE)
        self.require("by", "a selector that does no more than rank tokens", ranks)

    @property
    def inner(self) -> Selector:
        """The selector whose scores decide."""
        return cast(type[Selector], registry.find(self.by))(self.ratio)

    def needs(self) -> Needs:
        return self.inner.needs()

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        return self.inner.always(tokens, budget)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        return self.inner.scores(evidence, layer)
