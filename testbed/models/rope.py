"""A layer's rotary position embedding as plain numbers, which a payload can carry (Su et al., RoFormer, arXiv:2104.09864).

The module imports without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Pairs of elements of a head that turn together: pair i by position × `frequencies[i]` radians.

    first: the index of each pair's first element. apart: how far behind it the second one lies (half of the turned
    elements where halves are paired, 1 where neighbours are). Elements in no pair stay as they are.
    """

    frequencies: tuple[float, ...]
    first: tuple[int, ...]
    apart: int

    def turn(self, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """x [heads, n, head_dim] turned to its positions ([n] or [heads, n]), or back from them; float32.

        (a, b) -> (a cos - b sin, a sin + b cos), angles computed in float32 as models do. `back` is its exact inverse, up to
        the rounding of float32.
        """
        import torch

        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=x.device)
        angles = positions.to(x.device)[..., None].float() * frequencies
        cos, sin = angles.cos(), -angles.sin() if back else angles.sin()
        first = torch.tensor(self.first, device=x.device)
        turned = x.float().clone()
        a, b = turned[..., first], turned[..., first + self.apart]
        turned[..., first], turned[..., first + self.apart] = a * cos - b * sin, a * sin + b * cos
        return turned

    def fits(self, head_dim: int) -> bool:
        """Whether every pair lies within a head of that many elements, and no element in two pairs."""
        turned = [*self.first, *(index + self.apart for index in self.first)]
        return (
            len(self.first) == len(self.frequencies)
            and len(set(turned)) == len(turned)
            and all(0 <= index < head_dim for index in turned)
        )
