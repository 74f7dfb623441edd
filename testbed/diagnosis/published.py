"""The published rule: which layers alone cost more than 3 % of the score, asked where INT4 as a whole costs more than 5 %.

After "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM Inference": each layer's keys and values together
are quantized alone, and what that costs of the task's score decides; a bottleneck layer is then kept at 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from testbed.codecs.diagnosed import Place, write_places
from testbed.diagnosis.choose import Outcome, interval, loss_of

WHOLE_COSTS = 0.05  #: of the full cache's score: INT4 everywhere is robust below
LAYER_COSTS = 0.03  #: a layer alone that costs more is a bottleneck
ROBUST, CONCENTRATED, DISTRIBUTED = "robust", "concentrated", "distributed"


def layer_places(layer: int) -> list[Place]:
    """A layer's keys and values."""
    return [("keys", layer), ("values", layer)]


def judge(
    full: Sequence[Outcome], whole: Sequence[Outcome], alone: Sequence[Sequence[Outcome]]
) -> dict[str, Any]:
    """What the rule says of outcomes, example by example: of the full cache, of INT4 everywhere, of each layer alone.

    A share is of the full cache's mean score, which must be above 0, else nothing costs anything.
    """
    reference = sum(outcome.score for outcome in full) / len(full)

    def cost(quantized: Sequence[Outcome]) -> float:
        lost = sum(loss_of(full, quantized).score) / len(full)
        return lost / reference if reference else 0.0

    costs = [cost(own) for own in alone]
    layers = [layer for layer, share in enumerate(costs) if share > LAYER_COSTS]
    damage = ROBUST if cost(whole) <= WHOLE_COSTS else CONCENTRATED if layers else DISTRIBUTED
    harm = [sum(outcome.kl for outcome in own) / len(own) for own in alone]
    worst = max(range(len(alone)), key=lambda layer: (costs[layer], harm[layer]))
    return {
        "damage": damage,
        "layers": layers if damage == CONCENTRATED else [],
        "worst": worst,
        "whole_costs": cost(whole),
        "each": [
            {
                "layer": layer,
                "costs": costs[layer],
                "kl": harm[layer],
                "nll": asdict(interval(loss_of(full, own).nll)),
            }
            for layer, own in enumerate(alone)
        ],
    }


def sizes(judged: dict[str, Any], bits: int, true_bits: float) -> dict[str, float]:
    """What is left of 16 bits with the bottleneck layers at 16: without scales, as published (one layer of 28: 27.7 %), and with
    them. true_bits: of an element of the others, scales counted.
    """
    kept, layers = len(judged["layers"]), len(judged["each"])
    share = {"without_scales": float(bits), "with_scales": true_bits}
    return {name: (kept * 16 + (layers - kept) * each) / layers / 16 for name, each in share.items()}


def protected(judged: dict[str, Any]) -> str:
    """The word for `mixed`: the bottleneck layers, or none."""
    return write_places(place for layer in judged["layers"] for place in layer_places(layer))


def verdict(judged: dict[str, Any], bits: int) -> str:
    """One sentence for people."""
    whole = f"int{bits} everywhere costs {judged['whole_costs']:.1%} of the score"
    if judged["damage"] == ROBUST:
        return f"robust: {whole}, not more than {WHOLE_COSTS:.0%}"
    worst = judged["each"][judged["worst"]]
    if judged["damage"] == DISTRIBUTED:
        most = f"the most layer {worst['layer']}, {worst['costs']:.1%}"
        return f"distributed: {whole}, and no layer alone more than {LAYER_COSTS:.0%} ({most})"
    return (
        f"bottleneck: {whole}, and each of the layers {protected(judged)} alone more than {LAYER_COSTS:.0%}"
    )
