"""What each head's keys and values cost the answer and take in bytes at each step, measured on a model, kept in a file.

file   msgpack: format, what was measured in words, the model, and for each layer and head of keys, then of values, the KL
       for each unit of squared error, and bits an element and squared error at each step
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from testbed import lookup
from testbed.codecs.kept import Kept, is_name
from testbed.errors import SpecError

if TYPE_CHECKING:
    from testbed.codecs.steps import Part

FORMAT: Literal["testbed-sensitivity-1"] = "testbed-sensitivity-1"
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_LONGEST = 170  # characters of a word of steps, of which a codec's text has two
_Number = Annotated[float, Meta(ge=0, le=1e30)]
_Steps = Annotated[list[_Number], Meta(min_length=len(ALPHABET), max_length=len(ALPHABET))]


class Place(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One head's keys or values. weight: KL for a unit of mean squared error; bits: an element's; share: of all elements."""

    weight: _Number
    share: _Number
    bits: _Steps
    errors: _Steps
    coarsest: Annotated[
        int, Meta(ge=0, lt=len(ALPHABET))
    ]  #: the last step that the weight was measured near enough to


class Sensitivities(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """All of a file. keys, values: layer by layer, head by head."""

    format: Literal["testbed-sensitivity-1"]
    of: Annotated[str, Meta(max_length=400)]
    model: Annotated[str, Meta(max_length=400)]
    keys: Annotated[list[list[Place]], Meta(min_length=1, max_length=512)]
    values: Annotated[list[list[Place]], Meta(min_length=1, max_length=512)]

    def steps(self, budget: float) -> tuple[str, str]:
        """The words of keys' and values' steps of the least KL within a budget in bits an element. Raises SpecError where the
        coarsest steps are beyond it."""
        both = [self.keys, self.values]
        together = max(sum(map(len, layers)) for layers in both) > _LONGEST
        heads = [layer for layers in both for layer in layers]
        groups = heads if together else [[place] for layer in heads for place in layer]
        chosen = allocate([_Choice.of(group) for group in groups], budget)
        half = len(chosen) // 2
        words = ["".join(ALPHABET[step] for step in part) for part in (chosen[:half], chosen[half:])]
        return words[0], words[1]


@dataclass(frozen=True)
class _Choice:
    """What each step costs of what shares one: KL, and bits of the whole cache's element."""

    kl: list[float]
    bits: list[float]

    @classmethod
    def of(cls, places: list[Place]) -> _Choice:
        most = 1 + min(place.coarsest for place in places)
        return cls(
            [sum(place.weight * place.errors[i] for place in places) for i in range(most)],
            [sum(place.share * place.bits[i] for place in places) for i in range(most)],
        )


def allocate(choices: list[_Choice], budget: float) -> list[int]:
    """Of each choice the step, so that the sum of bits is within the budget and that of KL least: those of the least
    KL + λ · bits, on the lower convex hull, with λ as small as the budget allows. Raises SpecError where none is within it.
    """
    import numpy as np

    width = max(len(choice.kl) for choice in choices)
    kl, bits = (
        np.array([[*row, *[math.inf] * (width - len(row))] for row in rows])
        for rows in ([choice.kl for choice in choices], [choice.bits for choice in choices])
    )

    def best(slope: float) -> tuple[list[int], float]:
        steps = width - 1 - (kl + slope * bits)[:, ::-1].argmin(1)  # the coarsest of equal ones
        return steps.tolist(), float(bits[np.arange(len(bits)), steps].sum())

    low, high = 1e-15, 1e15
    if best(high)[1] > budget:
        raise SpecError(
            f"{budget} bits an element are fewer than the coarsest steps take: {best(high)[1]:.2f}"
        )
    for _ in range(100):
        slope = math.sqrt(low * high)
        low, high = (low, slope) if best(slope)[1] <= budget else (slope, high)
    return best(high)[0]


def step_of(code: float) -> float:
    """What the n-th character stands for."""
    return float(2 ** (code / 2 - 11))


def of_layer(word: str, part: Part) -> list[int] | None:
    """The steps of a layer, a head each or one for all; None where a word is of another number of layers."""
    layers = part.layers or len(word)
    each, rest = divmod(len(word), layers)
    if rest or not each or (part.kv_heads not in (1, each) and each != 1):
        return None
    return [ALPHABET.index(letter) for letter in word[each * part.layer : each * (part.layer + 1)]]


def _wrong(found: Sensitivities) -> str:
    if [len(layer) for layer in found.keys] != [len(layer) for layer in found.values]:
        return "keys and values are of other numbers of heads"
    if len({len(layer) for layer in found.keys}) != 1 or not found.keys[0]:
        return "layers are of other numbers of heads"
    return ""


KEPT = Kept("sensitivities", Sensitivities, _wrong)


def look_up(word: str, model: str | None) -> Sensitivities:
    """Measurements by a file, the hash that names them, or ``auto``: the latest of a model. Raises SpecError where there are
    none, or where they are another model's.
    """
    if word == "auto":
        if model is None:
            raise SpecError("plan=auto needs to know the model; name a file of sensitivities instead")
        files = sorted(KEPT.directory().glob("*.sensitivities"), key=lambda path: path.stat().st_mtime)
        own = [found for path in files if (found := KEPT.load(path)[1]).model == model]
        if not own:
            raise SpecError(
                f"plan=auto: model {model!r} was not measured yet; run `python -m testbed.diagnosis.sensitivity {model}`"
            )
        return own[-1]
    found = KEPT.known(word) if is_name(word) else KEPT.load(Path(lookup.find(word) or word).expanduser())[1]
    if model is not None and found.model != model:
        raise SpecError(f"the sensitivities {word[:60]} are of model {found.model[:60]!r}, not of {model!r}")
    return found
