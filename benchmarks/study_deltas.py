"""How much less differences between tokens vary than keys and values themselves: what a delta before a quantizer rests on.

    python -m benchmarks.study_deltas [--model NAME…] [--task passages] [--context 256] [--examples 16] [--json]

Published (Cheng and Liao): keys' variance falls 523 to 735 times, values' rises 1.4 to 1.7 times. Of whom and over what is not
said, so there are two readings: the variance of all elements of a layer's keys (or values), in which what all tokens share
counts, and the mean of its channels' variances over the tokens, in which it does not. Ratios of the tokens' variance to that of
their differences, the groups' first tokens left out: above 1 differences vary less. Each layer's is the mean over contexts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor

from testbed.codecs.quantize.fp16 import FP16
from testbed.codecs.transform.delta import Delta
from testbed.endpoints.examples import prompted
from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.tasks import parse_task

#: The study's forms, and the anchors' with keys turned back from their positions. Without reset: the longest group.
FORMS = {
    "anchor, g = 10": Delta(loop="open"),
    "anchor, g = 4": Delta(anchor=4, loop="open"),
    "sequential, g = 10": Delta(loop="open", order="consecutive"),
    "sequential, g = 4": Delta(anchor=4, loop="open", order="consecutive"),
    "sequential, no reset": Delta(anchor=4096, loop="open", order="consecutive"),
    "anchor, g = 10, before RoPE": Delta(loop="open", rope="pre"),
}


def contexts(
    model: LanguageModel,
    task: str | Mapping[str, Any],
    tokens: int | None,
    count: int,
    seed: int,
    prompt: str = "auto",
) -> Iterator[KVCache]:
    """The caches of a task's contexts, as a run's edge has them before it sends."""
    asked = prompted(model, parse_task(task), prompt)
    ids = model.tokenize(asked.prefix, start=True)
    prefix = model.prefill(ids, None).cache if ids else None
    for example in asked.examples(count, tokens, lambda text: len(model.tokenize(text)), seed):
        cache = model.prefill(model.tokenize(asked.context_text(example)), prefix).cache
        yield model.knowing_ropes(cache)


@dataclass(frozen=True)
class Ratio:
    """The variance of tokens over that of their differences, in the middle of all layers, least and greatest."""

    middle: float
    least: float
    greatest: float

    def text(self) -> str:
        """For a table."""
        return f"{self.middle:.3g} [{self.least:.3g}, {self.greatest:.3g}]"


def variances(x: Tensor) -> tuple[float, float]:
    """[heads, tokens, dim] -> of all elements, and the mean of the channels' over the tokens."""
    x = x.double()
    return float(x.var(correction=0)), float(x.var(dim=1, correction=0).mean())


def ratios(caches: list[KVCache], form: Delta) -> dict[str, tuple[Ratio, Ratio]]:
    """Of keys and of values: the ratio by all elements, and by channels."""
    by_kind: dict[str, list[tuple[float, float]]] = {"keys": [], "values": []}
    for layer in range(len(caches[0].layers)):
        for kind, found in by_kind.items():
            each = [_ratio(cache, form, layer, kind) for cache in caches]
            whole, channels = (geometric_mean(column) for column in zip(*each, strict=True))
            found.append((whole, channels))
    return {
        kind: (_spread([whole for whole, _ in found]), _spread([own for _, own in found]))
        for kind, found in by_kind.items()
    }


def _ratio(cache: KVCache, form: Delta, layer: int, kind: str) -> tuple[float, float]:
    one = KVCache([cache.layers[layer]], cache.length)
    tokens = getattr(one.layers[0], kind).float()
    differences = getattr(form.encode(one, FP16())[0].layers[0], kind)
    behind = torch.arange(tokens.shape[1]) % form.anchor != 0
    before, after = variances(tokens), variances(differences[:, behind])
    return before[0] / after[0], before[1] / after[1]


def _spread(values: list[float]) -> Ratio:
    return Ratio(median(values), min(values), max(values))


def measure(name: str, task: str, tokens: int, count: int, seed: int) -> list[dict[str, Any]]:
    """A line a form: the four ratios."""
    model = load_model(name)
    caches = list(contexts(model, task, tokens, count, seed))
    lines = []
    for label, form in FORMS.items():
        found = ratios(caches, form)
        columns = {
            f"{kind}_{reading}": asdict(ratio)
            for kind, both in found.items()
            for reading, ratio in zip(("elements", "channels"), both, strict=True)
        }
        lines.append({"model": name, "n": len(caches), "form": label, **columns})
    return lines


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--task", default="passages")
    parser.add_argument("--context", type=int, default=256, help="tokens")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = [
        line
        for name in options.model
        for line in measure(name, options.task, options.context, options.examples, options.seed)
    ]
    if options.json:
        print(json.dumps(lines, indent=1))
        return
    columns = ("keys_elements", "values_elements", "keys_channels", "values_channels")
    print("| model | n | difference | keys, all elements | values | keys, by channel | values |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for line in lines:
        cells = " | ".join(Ratio(**line[column]).text() for column in columns)
        print(f"| `{line['model']}` | {line['n']} | {line['form']} | {cells} |")


if __name__ == "__main__":
    main()
