"""The forms of coarse integers, each judged by what it loses and by its true bytes: which wins is a model's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from testbed.codecs.quantize.mixed import SCALES, coarse
from testbed.codecs.steps import Part
from testbed.diagnosis.choose import Loss, holds, interval, loss_of
from testbed.diagnosis.measure import Outcome, Probe


class Forms:
    """What examples lose under each form, all keys and values quantized."""

    def __init__(self, bits: int) -> None:
        self._methods = {scale: coarse(bits, scale) for scale in SCALES}
        self._bits: dict[str, float] = {}
        self._full: list[Outcome] = []
        self._found: dict[str, list[Outcome]] = {scale: [] for scale in SCALES}

    @property
    def outcomes(self) -> int:
        """How many an example takes."""
        return len(self._methods)

    def add(self, probe: Probe) -> None:
        """One more example: an outcome a form."""
        self._full.append(probe.full)
        for scale, method in self._methods.items():
            self._found[scale].append(probe.everywhere(method))
            self._bits[scale] = _bits_per_element(scale, method, probe)

    def to_list(self, measure: str, epsilon: float) -> list[dict[str, Any]]:
        """The forms for the diagnosis' file, the smallest first."""
        table = []
        for scale in sorted(SCALES, key=lambda one: self._bits[one]):
            loss: Loss = loss_of(self._full, self._found[scale])
            table.append(
                {
                    "scale": scale,
                    "codec": str(self._methods[scale]),
                    "bits_per_element": round(self._bits[scale], 3),
                    "nll": asdict(interval(loss.nll)),
                    "score": asdict(interval(loss.score)),
                    "holds": holds(loss, measure, epsilon),
                }
            )
        return table


def _bits_per_element(scale: str, method: Any, probe: Probe) -> float:
    """Symbols and scales, of all keys and values together."""
    bits = elements = 0
    for number, (heads, tokens, width) in enumerate(probe.elements()):
        part = Part(number // 2, "values" if number % 2 else "keys", heads, tokens, width, "float16")
        bits += part.elements * method.symbol_bits(part) + 8 * method.side_bytes(part)
        elements += part.elements
    return bits / max(elements, 1)
