"""The rotary position embedding of a model's layers, to be undone, averaged or told in numbers (RoFormer,
arXiv:2104.09864).

How an architecture pairs a head's elements and which of them it turns is not read from configs but found out: a prompt of
a single token attends to itself alone, so its queries at two positions differ by the rotation and by nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.errors import UsageError
from testbed.models.rope import Rope

#: How far a rotated query may be from the model's own, beside the query's largest element; more where the model's format is
#: coarser: the query, cosine and sine, their products and the sum of these are each rounded to it.
_TOLERANCE, _ROUNDINGS = 1e-3, 4
#: Angles are a position times a frequency, so that far positions tell arrangements apart, but not in 16 bits.
_PROBE = 37


#: Where a pair's angle is looked at to find its frequency: each position refines it, near enough to count whole turns.
_REFINING = (1, 16, 256, 2048)
_CHECK = 3000  #: a position at which the frequencies must give the model's angle


@dataclass(frozen=True)
class Rotation:
    """One layer's rotation: each element of `first` turns with the one of `second` at the same place; others stay.

    (a, b) -> (a cos - b sin, a sin + b cos). Models that stretch their context may scale cosine and sine alike.
    """

    angles: Callable[[Tensor], tuple[Tensor, Tensor]]  #: positions [n] -> cos and sin, float32 [n, pairs]
    first: slice
    second: slice
    head_dim: int

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [heads, n, head_dim] to the positions [n]; float32."""
        cos, sin = self.angles(positions)
        return self._turned(x, cos, sin)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `apply`, at the same positions; float32."""
        cos, sin = self.angles(positions)
        length = cos * cos + sin * sin
        return self._turned(x, cos / length, -sin / length)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = x.to(torch.float32, copy=True)
        a, b = x[..., self.first].float(), x[..., self.second].float()
        torch.sub(a * cos, b * sin, out=turned[..., self.first])
        torch.add(a * sin, b * cos, out=turned[..., self.second])
        return turned

    def mean(self, positions: Tensor) -> Tensor:
        """The average of the rotation matrices at `positions`, [head_dim, head_dim]: mean rotated x = matrix @ x."""
        cos, sin = (angle.mean(0) for angle in self.angles(positions))
        matrix = torch.eye(self.head_dim, device=cos.device)
        elements = torch.arange(self.head_dim, device=cos.device)
        first, second = elements[self.first], elements[self.second]
        matrix[first, first] = matrix[second, second] = cos
        matrix[second, first], matrix[first, second] = sin, -sin
        return matrix

    @property
    def turns(self) -> bool:
        """Whether there is anything to undo."""
        return bool(range(self.head_dim)[self.first])

    def rope(self, longest: int = 2**31) -> Rope | None:
        """The same in plain numbers, but for its scale; None where nothing turns, or by no steady frequencies.

        longest: tokens of the prompts that it is asked of; what turns keys further away is not looked at.
        """
        pairs = tuple(range(self.head_dim)[self.first])
        if not pairs:
            return None
        near = [position for position in _REFINING if position < longest]
        last = min(_CHECK, longest - 1)
        *refining, check = (self._angle(position) for position in (*near, last))
        frequency = torch.zeros(len(pairs), dtype=torch.float64)
        for position, measured in zip(near, refining, strict=True):
            whole = torch.round((frequency * position - measured) / (2 * torch.pi)) if position > 1 else 0
            frequency = (measured + 2 * torch.pi * whole) / position
        off = torch.remainder(frequency * last - check + torch.pi, 2 * torch.pi) - torch.pi
        if float(off.abs().max()) > _TOLERANCE:
            return None
        apart = range(self.head_dim)[self.second][0] - pairs[0]
        return Rope(tuple(frequency.float().tolist()), pairs, apart)

    def _angle(self, position: int) -> Tensor:
        """Each pair's angle at a position, within half a turn either way: float64 [pairs], on the CPU."""
        cos, sin = self.angles(torch.tensor([position]))
        return torch.atan2(sin[0].double(), cos[0].double()).cpu()


class Rotations:
    """The rotations of a model's layers, found when they are first asked for."""

    def __init__(
        self,
        name: str,
        network: Any,
        layers: int,
        queries_at: Callable[[int], dict[int, Tensor]],
        longest: int,
    ) -> None:
        self._longest = longest
        self._name, self._network, self._layers, self._queries_at = name, network, layers, queries_at
        self._found: list[Rotation] | None = None
        self._ropes: list[Rope | None] | None = None

    def of(self, layer: int) -> Rotation:
        """The layer's. Raises UsageError where the model's are of a kind that cannot be undone."""
        if self._found is None:
            try:
                self._found = find_rotations(self._network, self._layers, self._queries_at)
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"model {self._name!r}: {error}") from error
        return self._found[layer]

    def ropes(self, latent: Container[int]) -> list[Rope | None]:
        """Each layer's in plain numbers; None where nothing turns, and for the layers `latent`, whose cache is unrotated.

        Raises UsageError for an embedding that no plain numbers describe: keys that stay turned would be taken for others.
        """
        if self._ropes is None:
            layers = range(self._layers)
            self._ropes = [None if layer in latent else self._rope(layer) for layer in layers]
        return self._ropes

    def _rope(self, layer: int) -> Rope | None:
        rotation = self.of(layer)
        rope = rotation.rope(self._longest)
        if rope is None and rotation.turns:
            raise UsageError(
                f"model {self._name!r}: layer {layer} turns its keys by no steady frequencies, so that no payload can tell "
                "how to turn them back; choose a codec that takes keys as they are cached"
            )
        return rope


def unrotated(head_dim: int, device: torch.device) -> Rotation:
    """The rotation of a model without one."""

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.empty(len(positions), 0, device=device)
        return nothing, nothing

    return Rotation(angles, slice(0, 0), slice(0, 0), head_dim)


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
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(far.dtype).eps) * float(far.abs().max())
    for candidate in _candidates(source, head_dim, near.device):
        turned = candidate.apply(candidate.undo(near, start), here)
        if float((turned - far.float()).abs().max()) < tolerance:
            return candidate
    raise ValueError(f"layer {layer} embeds positions in a way that cannot be undone")


def _candidates(
    source: tuple[Any, dict[str, Any]] | None, head_dim: int, device: torch.device
) -> Iterator[Rotation]:
    """Halves or neighbours paired, at the beginning or the end of a head."""
    if source is None:
        yield unrotated(head_dim, device)
        return
    angles = functools.partial(_half_angles, *source)
    half = angles(torch.zeros(1, dtype=torch.int64, device=device))[0].shape[-1]
    for at in dict.fromkeys((0, head_dim - 2 * half)):
        end = at + 2 * half
        yield Rotation(angles, slice(at, at + half), slice(at + half, end), head_dim)
        yield Rotation(angles, slice(at, end, 2), slice(at + 1, end, 2), head_dim)
    yield unrotated(head_dim, device)  # every layer is given angles, and some make no use of them (Llama 4)


@torch.no_grad()
def _half_angles(module: Any, arguments: dict[str, Any], positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair, float32 [n, pairs], from the model's own module."""
    x = arguments["x"].float()  # its format is the one that cos and sin are rounded to, and of no other use
    asked = torch.cat([positions, positions.new_tensor([_PROBE])])  # where angles can be told from each other
    made = module(**arguments | {"x": x}, position_ids=asked[None].to(x.device))
    if isinstance(made, Tensor):  # complex numbers, as DeepSeek-V2 has them
        return made[0, :-1].real.float(), made[0, :-1].imag.float()
    both = torch.stack([made[0][0].float(), made[1][0].float()])
    pairs, (*_, probed) = both.shape[-1] // 2, both.unbind(1)
    # Most models write each pair's angle twice: the row of angles repeated, or each angle beside itself.
    if torch.equal(probed[:, :pairs], probed[:, pairs:]):
        both = both[..., :pairs]
    elif torch.equal(probed[:, 0::2], probed[:, 1::2]):
        both = both[..., 0::2]
    return both[0, :-1], both[1, :-1]
