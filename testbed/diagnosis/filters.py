"""Fits the directions of `qfilters(filters=…)`: what each head's queries have in common, over a task's contexts.

    python -m testbed.diagnosis.filters MODEL [--task needle] [--examples 8] [--context-tokens 512] [--seed 1]
        [--prompt auto] [--out FILE]

Prints their name, by which codecs call them, and their file. Runs take seed 0: other examples than those that are fitted here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from testbed import files
from testbed.codecs.select import filters
from testbed.codecs.select.qfilters import gram, main_direction
from testbed.diagnosis.tables import prefilled, with_contexts
from testbed.errors import TestbedError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Fit the directions of qfilters(filters=FILE).")
    parser.add_argument("model")
    with_contexts(parser)
    options = parser.parse_args(arguments)
    try:
        name, path = fitted(options)
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"filters {name}\nfile    {path}\ncodec   qfilters@0.25(filters={name})")
    return 0


def fitted(options: argparse.Namespace) -> tuple[str, Path]:
    """Prefills each context, adds up what its queries have in common, and keeps the directions: their name and file."""
    model, of, contexts = prefilled(options, queries=None)
    grams: list[Tensor] = []
    sums: list[Tensor] = []
    heads: list[int] = []
    for context in contexts:
        own = [gram(queries) for queries in context.queries], [q.double().sum(1) for q in context.queries]
        grams = [a + b for a, b in zip(grams, own[0], strict=True)] if grams else own[0]
        sums = [a + b for a, b in zip(sums, own[1], strict=True)] if sums else own[1]
        heads = [len(model.attended(i, layer)[0]) for i, layer in enumerate(context.cache.layers)]
    directions = [main_direction(*each) for each in zip(grams, sums, heads, strict=True)]
    name, path = filters.KEPT.save(filters.made(of, directions))
    if options.out:
        files.replace(options.out, path.read_bytes())
    return name, options.out or path


if __name__ == "__main__":
    sys.exit(main())
