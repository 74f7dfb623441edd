"""What of the tokens that a selector drops goes into those that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.kvcache import KVLayer


@dataclass(frozen=True)
class Merged:
    """Of one layer: context token `of` goes into the kept token at place `into`, both int64 [kv_heads, n].

    keys, values: by which it is multiplied, float32 [kv_heads, n]. Kept keys are the sums of what goes into them; None: as they
    were. So are kept values, or, where `reach` is not 0, each sum is added to so many kept tokens from that place on.
    """

    into: Tensor
    of: Tensor
    values: Tensor
    keys: Tensor | None = None
    reach: int = 0

    def apply(self, whole: KVLayer, kept: KVLayer) -> KVLayer:
        """A layer's kept tokens with what goes into them, in the layer's format."""
        values = self._sums(whole.values, self.values, kept.tokens)
        if self.reach:
            values = kept.values.float() + _spread(values, self.reach)
        keys = kept.keys if self.keys is None else self._sums(whole.keys, self.keys, kept.tokens)
        return replace(kept, keys=keys.to(kept.keys.dtype), values=values.to(kept.values.dtype))

    def _sums(self, states: Tensor, weights: Tensor, places: int) -> Tensor:
        device, width = states.device, states.shape[2]
        of, into = (index.to(device)[..., None].expand(-1, -1, width) for index in (self.of, self.into))
        taken = states.float().gather(1, of) * weights.to(device)[..., None]
        return taken.new_zeros(len(states), places, width).scatter_add_(1, into, taken)


def _spread(sums: Tensor, reach: int) -> Tensor:
    """Each place's sum, and those of the `reach` - 1 places before it."""
    total = sums.clone()
    for back in range(1, min(reach, sums.shape[1])):
        total[:, back:] += sums[:, :-back]
    return total
