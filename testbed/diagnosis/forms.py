"""The forms of coarse integers, each judged by what it loses and by its true bytes: which wins is a model's own."""

from __future__ import annotations

from functools import partial
from typing import Any

from testbed.codecs.quantize.mixed import SCALES, coarse
from testbed.codecs.steps import Part, Quantizer
from testbed.diagnosis.choose import Outcome, holds, loss_of
from testbed.diagnosis.variants import Outcomes, Variants


class Forms(Outcomes[str]):
    """What examples lose under each form, all keys and values quantized."""

    def __init__(self, bits: int) -> None:
        self._methods: dict[str, Quantizer] = {scale: coarse(bits, scale) for scale in SCALES}
        self._bits: dict[str, float] = {}
        super().__init__({scale: partial(self._outcome, scale) for scale in SCALES})

    def _outcome(self, scale: str, variants: Variants) -> Outcome:
        method = self._methods[scale]
        self._bits[scale] = _bits_per_element(method, variants)
        return variants.everywhere(method)

    def to_list(self, measure: str, epsilon: float) -> list[dict[str, Any]]:
        """The forms for the diagnosis' file, the smallest first."""
        table = []
        for scale in sorted(SCALES, key=self._bits.__getitem__):
            loss = loss_of(self.full, self.by_way[scale])
            table.append(
                {
                    "scale": scale,
                    "codec": str(self._methods[scale]),
                    "bits_per_element": round(self._bits[scale], 3),
                    **loss.record(),
                    "holds": holds(loss, measure, epsilon),
                }
            )
        return table


def _bits_per_element(method: Quantizer, variants: Variants) -> float:
    """Symbols and scales, of all keys and values together."""
    bits = elements = 0
    for number, (heads, tokens, width) in enumerate(variants.elements()):
        part = Part(number // 2, "values" if number % 2 else "keys", heads, tokens, width, "float16")
        bits += part.elements * method.symbol_bits(part) + 8 * method.side_bytes(part)
        elements += part.elements
    return bits / max(elements, 1)
