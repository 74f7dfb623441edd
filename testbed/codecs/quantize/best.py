"""Steps that a budget buys: each layer's and head's as coarse as what it costs the answer says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs import CodecError
from testbed.codecs.entropy.ans import ANS
from testbed.codecs.quantize import cut_side, over, rounded_up, sensitivity, side_of
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.steps import Coder

_MOST, _FURTHEST = 127, 32767  #: of a symbol from its channel's middle, and of a middle from 0, in steps


@dataclass(frozen=True)
class Best(Quantizer):
    """Uniform steps for each layer's and KV head's keys and values, chosen by measured sensitivity; then `ans`.

        q = round(x / s) - m,  m = round(mean of the channel / s);   x̂ = (q + m) · s;   |x̂ - x| ≤ s / 2, and x̂'s own rounding

    The steps are those that make Σ w · e least while Σ b is within the budget, over all heads' keys and values: e and b the mean
    squared error and the true bits at a step, w the KL of the answer for each unit of e, all measured on other texts
    (``python -m testbed.diagnosis.sensitivity MODEL``). Where errors are small that is one w · s² for all.

    bits: the budget, bits an element of the whole cache, all bytes counted. plan: the measurements, as a file, the hash that
    names them, or ``auto``, the model's own; ``none``: every head's step is 2^(2-bits) of its deviation. keys, values: the
    steps that were chosen, a character for each head of each layer or for each layer: 2^(n/2 - 11) for n of 0-9a-z. A payload
    has those, and its decoder needs nothing else.
    """

    name: ClassVar[str] = "best"
    source: ClassVar[str] = (
        "reverse water-filling (Berger, Rate Distortion Theory, 1971); Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988"
    )

    bits: float = 4.0
    plan: str = "auto"
    keys: str = "none"
    values: str = "none"

    def __post_init__(self) -> None:
        self.require("bits", "from 0.5 to 12", 0.5 <= self.bits <= 12)
        for name in ("keys", "values"):
            word = getattr(self, name)
            self.require(name, "characters 0-9a-z, or none", set(word) <= set(sensitivity.ALPHABET))

    @property
    def refers(self) -> bool:
        return self.plan != "none"

    def bound(self, model: str | None) -> Best:
        if not self.refers:
            return self
        keys, values = sensitivity.look_up(self.plan, model).steps(self.bits)
        return replace(self, plan="none", keys=keys, values=values)

    @property
    def own_coder(self) -> Coder | None:
        return ANS()

    def symbol_bits(self, part: Part) -> int:
        return 8

    def side_bytes(self, part: Part) -> int:
        return 2 * part.kv_heads * (1 + part.head_dim)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if not part.elements:
            return values.new_empty(0, dtype=torch.uint8), values.new_zeros(self.side_bytes(part)).byte()
        self.require_finite(part, values)
        x = values.float()
        mean = (x / part.tokens).sum(1, keepdim=True)
        away = x / 2 - mean / 2  # halves: a difference may overflow
        wanted = self._wanted(part, away)
        furthest = torch.maximum(
            away.abs().amax((1, 2)) * (2 / (_MOST - 1)), mean.abs().amax((1, 2)) / (_FURTHEST - 1)
        )
        dtype = getattr(torch, part.dtype)
        step = rounded_up(torch.maximum(wanted, furthest).clamp(max=torch.finfo(dtype).max), dtype)
        middle = over(mean, step[:, None, None]).round_()
        q = over(x, step[:, None, None]).round_().sub_(middle).clamp_(-_MOST, _MOST).add_(_MOST)
        return q.to(torch.uint8), side_of(step, middle.to(torch.int16))

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        dtype = getattr(torch, part.dtype)
        step, middle = cut_side(
            side, ((part.kv_heads, 1, 1), dtype), ((part.kv_heads, 1, part.head_dim), torch.int16)
        )
        limit = torch.finfo(dtype).max
        x = symbols.view(part.shape).float().add_(middle.float() - _MOST)
        return x.mul_(step.float()).clamp_(-limit, limit)

    def _wanted(self, part: Part, away: Tensor) -> Tensor:
        """Each head's step. away: half of how far elements are from their channel's mean, [kv_heads, tokens, head_dim]."""
        import torch

        word = self.keys if part.kind == "keys" else self.values
        if word == "none":
            largest = away.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            spread = (away / largest).square().mean((1, 2)).sqrt() * largest.flatten()
            return spread * 2 ** (3 - self.bits)
        codes = sensitivity.of_layer(word, part)
        if codes is None:
            raise CodecError(f"{self.name}: steps of {len(word)} heads or layers are not this cache's")
        # Heads that lie one behind the other, as where they hold different numbers of tokens, share a step.
        own = codes if len(codes) == part.kv_heads else [sum(codes) / len(codes)]
        return torch.tensor([sensitivity.step_of(code) for code in own], device=away.device).expand(
            part.kv_heads
        )
