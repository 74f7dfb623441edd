"""KVTC: principal components over a layer's heads, and as many bits for each as pay under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.entropy import pack, unpack
from testbed.codecs.entropy.zstd import Zstd
from testbed.codecs.layout import packed_bytes
from testbed.codecs.quantize import cut_side, divided, over, rounded_up, side_of
from testbed.codecs.quantize.projected import Projected
from testbed.codecs.steps import Coder, Part, Quantizer
from testbed.errors import PayloadError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    Errors = npt.NDArray[np.float64]

WIDTHS = (0, 2, 4, 8)  # bits of a coordinate; 0: it is not sent
GROUP = 16  # neighbouring coordinates that have one width
_SCALE_BITS = 16  # a token and group
_MOST_UNITS = 1 << 14  # of a budget, in dynamic programming


@dataclass(frozen=True)
class KVTC(Projected):
    """Transform coding: z = V(x − μ) in groups of 16 neighbouring components, each with 0, 2, 4 or 8 bits; zstd behind.

        q = round(z / s + L / 2),  s = 2 max|z| / L of a token and group, in 16 bits,  L = 2^bits − 1;  ẑ = (q − L / 2) s

    The widths are those of the least Σ‖ẑ − z‖² of a layer's keys (or values) that take at most `bits` an element of the cache,
    scales included, by dynamic programming over groups and budget (`allocated`). They are chosen on the context and sent, a byte
    a group; the paper chooses them on calibration data, group sizes too, and has a shift beside the scale. Its components are of
    all layers at once, here of one layer's heads that `basis` has together; keys before RoPE, as there. zstd stands for its
    DEFLATE (nvCOMP). sinks, recent: first and last tokens that are sent as they are.
    """

    name: ClassVar[str] = "kvtc"
    source: ClassVar[str] = (
        "KV Cache Transform Coding for Compact Storage in LLM Inference (arXiv:2511.01815)"
    )

    bits: float = 2.0
    sinks: int = 4
    last: int = 128

    def __post_init__(self) -> None:
        self.require("bits", "from 0.25 to 8", 0.25 <= self.bits <= 8)
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)
        self.require("last", "from 0 to 65536", 0 <= self.last <= 65536)

    @property
    def own_coder(self) -> Coder | None:
        return Zstd()

    def rank(self, width: int) -> int:
        return width

    def whole(self, part: Part) -> tuple[int, int]:
        first = min(self.sinks, part.tokens)
        return first, min(self.last, part.tokens - first)

    @cached_property
    def inner(self) -> Quantizer:
        return _Allocated(self.bits)


@dataclass(frozen=True)
class _Allocated(Quantizer):
    """Coordinates [groups of heads, tokens, components] in `bits` an element or less; what is left of them is zeros."""

    name: ClassVar[str] = "kvtc"
    source: ClassVar[str] = KVTC.source

    bits: float

    def _groups(self, part: Part) -> list[tuple[int, slice]]:
        """Head and components of each."""
        starts = range(0, part.head_dim, GROUP)
        return [
            (head, slice(start, min(start + GROUP, part.head_dim)))
            for head in range(part.kv_heads)
            for start in starts
        ]

    def _costs(self, part: Part) -> list[list[int]]:
        """Bytes of each group at each width: symbols, and scales."""
        return [
            [
                packed_bytes(part.tokens * (at.stop - at.start), width) + part.tokens * _SCALE_BITS // 8
                if width
                else 0
                for width in WIDTHS
            ]
            for _, at in self._groups(part)
        ]

    def symbol_bits(self, part: Part) -> int:
        return 8

    def symbols(self, part: Part) -> int:
        return int(self.bits * part.elements / 8)

    def side_bytes(self, part: Part) -> int:
        count = part.kv_heads * -(-part.head_dim // GROUP) if part.elements else 0
        return count + count % 2

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import numpy as np
        import torch

        budget, groups = self.symbols(part), self._groups(part)
        out = torch.zeros(budget, dtype=torch.uint8, device=values.device)
        widths = torch.zeros(self.side_bytes(part), dtype=torch.uint8, device=values.device)
        if not part.elements:
            return out, widths
        dtype = getattr(torch, part.dtype)
        coded = [[_coded(values[head, :, at], width, dtype) for width in WIDTHS] for head, at in groups]
        errors = np.array([[error for _, error in each] for each in coded])
        at = 0
        for i, choice in enumerate(allocated(errors, self._costs(part), budget)):
            data = coded[i][choice][0]
            out[at : at + len(data)] = data
            at, widths[i] = at + len(data), WIDTHS[choice]
        return out, widths

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        out = torch.zeros(part.shape, dtype=torch.float32, device=symbols.device)
        dtype, at = getattr(torch, part.dtype), 0
        for (head, where), width, costs in zip(
            self._groups(part), side.tolist(), self._costs(part), strict=False
        ):
            if width not in WIDTHS:
                raise PayloadError(f"kvtc: a coordinate of {width} bits")
            size = costs[WIDTHS.index(width)]
            if at + size > len(symbols):
                raise PayloadError("kvtc: more bits than the payload has")
            if width:
                count = where.stop - where.start
                scale = cut_side(symbols[at : at + 2 * part.tokens].clone(), ((part.tokens, 1), dtype))[0]
                q = unpack(symbols[at + 2 * part.tokens : at + size], part.tokens * count, width)
                out[head, :, where] = (
                    q.view(part.tokens, count).float() - ((1 << width) - 1) / 2
                ) * scale.float()
            at += size
        return out


def _coded(z: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """[tokens, components] -> scales and packed symbols in uint8, and the squared error that they leave."""
    if not width:
        return z.new_empty(0), float(z.double().square().sum())
    levels = (1 << width) - 1
    scale = rounded_up(divided(z.abs().amax(1, keepdim=True), levels / 2), dtype)
    q = over(z, scale).add_(levels / 2).round_().clamp_(0, levels)
    off = (q - levels / 2) * scale.float() - z
    return side_of(scale, pack(q.byte(), width)), float(off.double().square().sum())


def allocated(errors: Errors, costs: list[list[int]], budget: int) -> list[int]:
    """Of each group's choices one, so that the errors' sum is the least of all that cost at most `budget`.

    errors: [groups, choices]; costs alike, the first choice's 0. Dynamic programming over what is spent: least[b] is the least
    error of the groups so far within b, in units of which all costs are multiples, or of a 16384th of the budget.
    """
    import math

    import numpy as np

    budget = min(budget, sum(map(max, costs)))
    unit = max(math.gcd(*(cost for row in costs for cost in row)), -(-budget // _MOST_UNITS), 1)
    units, room = [[-(-cost // unit) for cost in row] for row in costs], budget // unit
    least = np.zeros(room + 1)
    chosen = np.zeros((len(costs), room + 1), dtype=np.int8)
    for i, row in enumerate(units):
        options = np.full((len(row), room + 1), np.inf)
        for choice, cost in enumerate(row):
            if cost <= room:
                options[choice, cost:] = errors[i][choice] + least[: room + 1 - cost]
        chosen[i] = options.argmin(0)
        least = options.min(0)
    picks, left = [], room
    for i in reversed(range(len(costs))):
        choice = int(chosen[i, left])
        picks.append(choice)
        left -= units[i][choice]
    return picks[::-1]
