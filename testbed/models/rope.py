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


def default_rope(
    head_dim: int, theta: float = 10000.0, turned: int | None = None, interleaved: bool = False
) -> Rope:
    """The usual frequencies theta^(-2i/d) over the first `turned` elements (None: all) of a head."""
    turned = head_dim if turned is None else turned
    pairs = turned // 2
    frequencies = tuple(theta ** (-2 * i / turned) for i in range(pairs))
    first = tuple(2 * i if interleaved else i for i in range(pairs))
    return Rope(frequencies, first, 1 if interleaved else pairs)


#: Where a lone token's keys are looked at: each far enough to refine the angle, near enough to count its whole turns.
PROBES = (0, 1, 16, 256, 2048)
_CHECK = 2  #: of `PROBES`: where the arrangement that was found must give the model's own keys


def find_rope(keys: list[Tensor]) -> Rope | None:
    """The embedding that tells apart a lone token's keys [kv_heads, 1, head_dim] at the positions `PROBES`.

    A token that sees itself alone has the same key everywhere, but for the turn. None where nothing turns (a latent is
    cached), or where no arrangement of pairs gives the keys, to the rounding of 16 bits.
    """
    head_dim = keys[0].shape[-1]
    if all(bool((key == keys[0]).all()) for key in keys):
        return None
    turned = head_dim - head_dim % 2
    while turned >= 2:
        for interleaved in (False, True):
            usual = default_rope(head_dim, turned=turned, interleaved=interleaved)
            rope = Rope(_frequencies(keys, usual), usual.first, usual.apart)
            there = keys[_CHECK].float()
            error = (rope.turn(keys[0], _tensor(PROBES[_CHECK])) - there).abs().max()
            if float(error) <= 2e-2 * float(there.abs().max()):
                return rope
        turned = turned // 2 - turned // 2 % 2
    return None


def _frequencies(keys: list[Tensor], pairs: Rope) -> tuple[float, ...]:
    """What each pair turns by a position, from its angle at nearer and farther ones."""
    import torch

    first = torch.tensor(pairs.first)
    points = [
        torch.complex(key[:, 0, first].double(), key[:, 0, first + pairs.apart].double()) for key in keys
    ]
    frequency = torch.zeros(len(first), dtype=torch.float64)
    for position, there in zip(PROBES[1:], points[1:], strict=True):
        measured = (points[0].conj() * there).sum(0).angle()
        whole = torch.round((frequency * position - measured) / (2 * torch.pi)) if position > 1 else 0
        frequency = (measured + 2 * torch.pi * whole) / position
    return tuple(frequency.float().tolist())


def _tensor(position: int) -> Tensor:
    import torch

    return torch.tensor([position])
