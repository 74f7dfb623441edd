"""The rotary position embedding of a model's layers, to be undone or averaged (Su et al., RoFormer, arXiv:2104.09864).

How an architecture pairs a head's elements and which of them it turns is not read from configs but found out: a prompt of
a single token attends to itself alone, so its queries at two positions differ by the rotation and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: How far a rotated query may be from the model's own, beside the query's largest element.
_TOLERANCE = 1e-3
#: Angles are a position times a frequency, so that far positions tell arrangements apart, but not in 16 bits.
_PROBE = 37


@dataclass(frozen=True)
class Rotation:
    """One layer's rotation: element i of a head turns with element `partner[i]`, with the sign `sign[i]`.

    rotated = x · cos + x[partner] · sign · sin; elements that the model leaves alone have cos 1 and sin 0.
    """

    angles: Callable[[Tensor], tuple[Tensor, Tensor]]  #: positions [n] -> cos and sin, float32 [n, head_dim]
    partner: Tensor  #: int64 [head_dim]
    sign: Tensor  #: float32 [head_dim]

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [heads, n, head_dim] to the positions [n]; float32."""
        cos, sin = self.angles(positions)
        x = x.float()
        return x * cos + x[..., self.partner] * (self.sign * sin)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `apply`, at the same positions; float32."""
        cos, sin = self.angles(positions)
        x = x.float()
        # Models that stretch their context may scale the rotation, so it need not have length 1.
        return (x * cos - x[..., self.partner] * (self.sign * sin)) / (cos * cos + sin * sin)

    def mean(self, positions: Tensor) -> Tensor:
        """The average of the rotation matrices at `positions`, [head_dim, head_dim]: mean rotated x = matrix @ x."""
        cos, sin = (angle.mean(0) for angle in self.angles(positions))
        matrix = torch.diag(cos)
        rows = torch.arange(len(self.partner), device=cos.device)
        matrix[rows, self.partner] += self.sign * sin
        return matrix


def unrotated(head_dim: int, device: torch.device) -> Rotation:
    """The rotation of a model without one."""

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        still = torch.zeros(len(positions), head_dim, device=device)
        return still + 1, still

    return Rotation(angles, torch.arange(head_dim, device=device), torch.zeros(head_dim, device=device))


def find_rotations(
    network: Any, layers: int, queries_at: Callable[[int], dict[int, Tensor]]
) -> list[Rotation]:
    """Each layer's rotation. `queries_at(p)`: by layer the queries [q_heads, 1, head_dim] of one token at position p.

    Raises ValueError for an embedding of another kind.
    """
    made: list[tuple[Any, dict[str, Any], Any]] = []  # what rotary modules were asked, and what they gave
    given: dict[int, Any] = {}  # which of that each layer's attention got
    hooks = []

    def asked(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        names = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        made.append((module, {key: names[key] for key in names if key != "position_ids"}, output))

    def attended(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_embeddings") is not None and isinstance(
            getattr(module, "layer_idx", None), int
        ):
            given[module.layer_idx] = kwargs["position_embeddings"]

    for module in network.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            hooks.append(module.register_forward_hook(asked, with_kwargs=True))
        elif hasattr(module, "layer_idx"):
            hooks.append(module.register_forward_pre_hook(attended, with_kwargs=True))
    try:
        far = queries_at(_PROBE)
    finally:
        for hook in hooks:
            hook.remove()
    near = queries_at(0)
    found = []
    for layer in range(layers):
        source = next(((m, k) for m, k, out in made if out is given.get(layer)), None)
        found.append(_rotation(layer, source, near[layer], far[layer]))
    return found


def _rotation(layer: int, source: tuple[Any, dict[str, Any]] | None, near: Tensor, far: Tensor) -> Rotation:
    """The arrangement that turns the query at position 0 into the one at `_PROBE`."""
    head_dim = near.shape[-1]
    here = torch.tensor([_PROBE], device=near.device)
    start = torch.zeros(1, dtype=torch.int64, device=near.device)
    for candidate in _candidates(source, head_dim, near.device):
        turned = candidate.apply(candidate.undo(near, start), here)
        if float((turned - far.float()).abs().max()) < _TOLERANCE * float(far.abs().max()):
            return candidate
    raise ValueError(f"layer {layer} embeds positions in a way that cannot be undone")


def _candidates(
    source: tuple[Any, dict[str, Any]] | None, head_dim: int, device: torch.device
) -> Iterator[Rotation]:
    """Halves or neighbours paired, at the beginning or the end of a head."""
    if source is None:
        yield unrotated(head_dim, device)
        return
    module, arguments = source
    half = _half_angles(module, arguments, torch.zeros(1, dtype=torch.int64, device=device))[0].shape[-1]
    for at in dict.fromkeys((0, head_dim - 2 * half)):
        for first in (torch.arange(half), 2 * torch.arange(half)):
            second = first + (half if first[-1] == half - 1 else 1)
            yield _arranged(module, arguments, head_dim, at + first, at + second, device)


def _arranged(
    module: Any,
    arguments: dict[str, Any],
    head_dim: int,
    first: Tensor,
    second: Tensor,
    device: torch.device,
) -> Rotation:
    partner, sign = torch.arange(head_dim), torch.zeros(head_dim)
    partner[first], partner[second] = second, first
    sign[first], sign[second] = -1.0, 1.0

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = _half_angles(module, arguments, positions)
        wide = (
            torch.ones(len(positions), head_dim, device=device),
            torch.zeros(len(positions), head_dim, device=device),
        )
        for whole, half in zip(wide, (cos, sin), strict=True):
            whole[:, first], whole[:, second] = half, half
        return wide

    return Rotation(angles, partner.to(device), sign.to(device))


@torch.no_grad()
def _half_angles(module: Any, arguments: dict[str, Any], positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair, float32 [n, pairs], from the model's own module."""
    made = module(**arguments, position_ids=positions[None].to(arguments["x"].device))
    if isinstance(made, Tensor):  # complex numbers, as DeepSeek-V2 has them
        return made[0].real.float(), made[0].imag.float()
    cos, sin = made[0][0].float(), made[1][0].float()
    pairs = cos.shape[-1] // 2
    # Models write each pair's angle twice: the row of angles repeated, or each angle beside itself.
    if torch.equal(cos[:, :pairs], cos[:, pairs:]) and torch.equal(sin[:, :pairs], sin[:, pairs:]):
        return cos[:, :pairs], sin[:, :pairs]
    return cos[:, 0::2], sin[:, 0::2]
