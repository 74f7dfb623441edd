"""Measures what `best(bits=…)` goes by: what each head's keys and values cost the answer and take in bytes, step by step.

    python -m testbed.diagnosis.sensitivity MODEL [--task passages] [--examples 6] [--context-tokens 256] [--seed 1]
        [--by head] [--prompt auto] [--out FILE]

Quantizes one head's keys or values at a time, in steps of about their deviation, and has of the gold answer's KL from the full
cache's how much a unit of squared error costs; with --by layer all heads of a layer at once, which takes less time and gives them
one cost. Prints the measurements' name, their file and the codec that uses them. Runs
take seed 0: other examples than those that are measured here.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from testbed import files
from testbed.codecs.diagnosed import Kind
from testbed.codecs.entropy.ans import entropy_bits
from testbed.codecs.quantize import sensitivity, side_of
from testbed.codecs.quantize.best import Best
from testbed.codecs.quantize.sensitivity import ALPHABET, FORMAT, Place, Sensitivities, step_of
from testbed.codecs.steps import Part
from testbed.diagnosis.run import duration
from testbed.diagnosis.tables import prepared, with_contexts
from testbed.errors import TestbedError
from testbed.models.kvcache import KVCache, join
from testbed.models.likelihood import mean_kl

_BEYOND = 2  #: half octaves by which a step may exceed what the cost was measured at


class Head:
    """One head's keys or values over the examples: sums of KL and of the error that it is of, and of bits and squared error at
    each step. code: the step nearest to their deviation.
    """

    def __init__(self, deviation: float) -> None:
        self.kl = self.error = 0.0
        self.elements = 0
        exact = 2 * math.log2(max(deviation, 1e-30) / step_of(0))
        self.code = min(max(round(exact), 0), len(ALPHABET) - 1)
        self.bits = [0.0] * len(ALPHABET)
        self.errors = [0.0] * len(ALPHABET)

    def place(self, of: int, examples: int) -> Place:
        """What is kept of it. of: all heads' elements."""
        weight = max(self.kl, 1e-12) / max(self.error, 1e-30)
        return Place(
            weight * self.elements / examples,
            self.elements / of,
            [bits / self.elements for bits in self.bits],
            [error / self.elements for error in self.errors],
            min(self.code + _BEYOND, len(ALPHABET) - 1),
        )


def coded(code: int, part: Part, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A part at one step for all its heads: x̂, each head's bits with all that belongs to them, and its sum of squared errors."""
    word = ALPHABET[code] * (part.layers or 1)
    method = Best(plan="none", keys=word, values=word)
    symbols, side = method.encode(part, x)
    assert side is not None
    decoded = method.decode(part, symbols.flatten(), side_of(side)).to(x.dtype)
    own = 8 * method.side_bytes(part) / part.kv_heads
    bits = torch.tensor([entropy_bits(row.flatten().numpy()) + own for row in symbols.cpu()])
    return decoded, bits, (decoded.float() - x.float()).square().sum((1, 2))


def _deviation(x: Tensor) -> float:
    """A head's, from its channels' means: x [tokens, head_dim]."""
    return float((x.float() - x.float().mean(0)).square().mean().sqrt())


def measured(options: argparse.Namespace) -> tuple[str, Path]:
    """Prefills each context, quantizes head by head, and keeps what that came to: its name and file."""
    model, task, prefix, examples, of = prepared(options)
    heads: dict[tuple[int, Kind, int], Head] = {}
    started = time.monotonic()
    for number, example in enumerate(examples, 1):
        question = model.tokenize(task.question_text(example), closing=task.closing)
        gold = model.tokenize(task.answer_text(example))
        context = model.prefill(model.tokenize(task.context_text(example)), prefix).cache

        def answer(cache: KVCache, question: list[int] = question, gold: list[int] = gold) -> Tensor:
            return model.likelihood(question, gold, cache if prefix is None else join(prefix, cache))

        full = answer(context)
        for i, layer in enumerate(context.layers):
            both: tuple[tuple[Kind, Tensor], ...] = (("keys", layer.keys), ("values", layer.values))
            for kind, x in both:
                kv_heads, tokens, width = x.shape
                dtype = str(x.dtype).removeprefix("torch.")
                part = Part(i, kind, kv_heads, tokens, width, dtype, len(context.layers))
                own = [heads.setdefault((i, kind, h), Head(_deviation(x[h]))) for h in range(part.kv_heads)]
                tried = _every_step(own, part, x)
                every = range(part.kv_heads)
                for group in [list(every)] if options.by == "layer" else [[h] for h in every]:
                    changed = x.clone()
                    for h in group:
                        changed[h] = tried[own[h].code][0][h]
                    layers = [*context.layers]
                    keys, values = (changed, layer.values) if kind == "keys" else (layer.keys, changed)
                    layers[i] = replace(layer, keys=keys, values=values)
                    kl = mean_kl(full, answer(KVCache(layers, context.length)))
                    error = sum(float(tried[own[h].code][1][h]) for h in group)
                    for h in group:
                        own[h].kl += kl
                        own[h].error += error
        took = time.monotonic() - started
        left = duration(took / number * (options.examples - number))
        print(f"example {number} of {options.examples} in {took:.0f} s; about {left} more", file=sys.stderr)
    elements = sum(head.elements for head in heads.values())

    def table(kind: str) -> list[list[Place]]:
        layers = range(model.num_layers)
        return [
            [
                head.place(elements, options.examples)
                for (i, k, _), head in heads.items()
                if (i, k) == (layer, kind)
            ]
            for layer in layers
        ]

    name, path = sensitivity.KEPT.save(
        Sensitivities(FORMAT, of[:400], model.name, table("keys"), table("values"))
    )
    if options.out:
        files.replace(options.out, path.read_bytes())
    return name, options.out or path


def _every_step(heads: list[Head], part: Part, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Adds bits and errors at each step; returns x̂ and the errors of each."""
    tried = []
    for code in range(len(ALPHABET)):
        decoded, bits, errors = coded(code, part, x)
        for h, head in enumerate(heads):
            head.bits[code] += float(bits[h])
            head.errors[code] += float(errors[h])
        tried.append((decoded, errors))
    for head in heads:
        head.elements += part.tokens * part.head_dim
    return tried


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Measure what best(bits=…) goes by.")
    parser.add_argument("model")
    with_contexts(parser)
    parser.add_argument("--by", choices=["head", "layer"], default="head")
    parser.set_defaults(task="passages", examples=6, context_tokens=256)
    options: Any = parser.parse_args(arguments)
    try:
        name, path = measured(options)
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"sensitivities {name}\nfile          {path}\ncodec         best(bits=3, plan={name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
