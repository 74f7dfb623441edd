"""Fits the components of `lowrank(basis=…)` and `kvtc(basis=…)`: principal components of keys before RoPE and of values, over a
task's contexts.

    python -m testbed.diagnosis.basis MODEL [--together 1] [--rank N] [--task needle] [--examples 8] [--context-tokens 512]
        [--seed 1] [--prompt auto] [--out FILE]

Prints their name, which both sides must know them by, their file, and how much of the variance half of the components hold. Runs
take seed 0: other examples than those that are fitted here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed import files
from testbed.codecs.kept import LARGEST_FILE
from testbed.codecs.quantize.fp16 import FP16
from testbed.codecs.transform import basis
from testbed.codecs.transform.basis import Moments
from testbed.codecs.transform.unrotated import Unrotated
from testbed.diagnosis.tables import prefilled, with_contexts
from testbed.errors import TestbedError, UsageError
from testbed.models.kvcache import KVCache


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Fit the components of lowrank(basis=FILE) and kvtc(basis=FILE)."
    )
    parser.add_argument("model")
    parser.add_argument(
        "--together", type=int, default=1, help="KV heads that share components; 0: a layer's"
    )
    parser.add_argument("--rank", type=int, default=0, help="components that are kept; 0: all")
    with_contexts(parser)
    options = parser.parse_args(arguments)
    try:
        name, path, half = fitted(options)
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"basis {name}\nfile  {path}\ncodec lowrank(basis={name})\nhalf  {half:.3f} of the variance")
    return 0


def moments(cache: KVCache, together: int) -> list[Moments]:
    """Of keys before RoPE and values of each layer. together: heads that share components; 0: all. Raises UsageError."""
    found = []
    for layer in Unrotated().encode(cache, FP16())[0].layers:
        heads = together or layer.kv_heads
        if heads < 0 or layer.kv_heads % heads:
            raise UsageError(
                f"--together {together}: {layer.kv_heads} KV heads do not make groups of {together}"
            )
        found += [Moments.of(x, layer.kv_heads // heads) for x in (layer.keys, layer.values)]
    return found


def fitted(options: argparse.Namespace) -> tuple[str, Path, float]:
    """Prefills each context, adds up moments, and keeps the components: their name, their file, and the share of the variance
    that the first half of them holds, on average over layers and heads.
    """
    model, of, contexts = prefilled(options, queries=0)
    sums: list[Moments] = []
    heads: list[int] = []
    for context in contexts:
        own = moments(model.knowing_ropes(context.cache), options.together)
        sums = [a + b for a, b in zip(sums, own, strict=True)] if sums else own
        heads = [layer.kv_heads for layer in context.cache.layers for _ in range(2)]
    if not sums or options.rank < 0:
        raise UsageError("a basis needs an example at least, and a rank from 0")
    axes = [each.axes(options.rank or each.sums.shape[1]) for each in sums]
    size = sum(2 * each.components.numel() + 4 * each.mean.numel() for each, _ in axes)
    if size > LARGEST_FILE - (1 << 16):
        raise UsageError(
            f"a basis of {size >> 20} MiB is more than a file holds: smaller groups by --together, or a --rank"
        )
    half = statistics.fmean(
        float(share[:, : -(-each.mean.shape[1] // 2)].sum(1).mean()) for each, share in axes
    )
    kept = basis.made(of, [(count, each) for count, (each, _) in zip(heads, axes, strict=True)])
    name, path = basis.KEPT.save(kept)
    if options.out:
        files.replace(options.out, path.read_bytes())
    return name, options.out or path, half


if __name__ == "__main__":
    sys.exit(main())
