"""What a prefill in blocks costs beside one at once, and how far its cache is from that one's.

    python -m benchmarks.block_prefill [MODEL] [--tokens 1024] [--blocks 512 256 128] [--rounds 9] [--threads N]

All ways alternate, so that other load on the machine meets each; a ratio is of times of one round. Printed are medians with the
quartiles over rounds, of wall-clock seconds or, with `--cpu`, of the process's processor seconds.
"""

from __future__ import annotations

import argparse
import time

import torch

from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model


def in_blocks(model: LanguageModel, ids: list[int], size: int) -> KVCache:
    """The cache of all tokens, computed `size` at a time; each block's own is taken out, too, as it would be sent."""
    blocks = model.blocks(ids, None)
    for start in range(0, len(ids), size):
        blocks.run(min(start + size, len(ids)))
    return blocks.finish().cache


def distance(one: KVCache, other: KVCache) -> tuple[float, float]:
    """The largest between elements, in units of a 16-bit float's last place at their vector's largest; the share that differ."""
    away, differ = [], []
    for a, b in zip(one.layers, other.layers, strict=True):
        for first, second in ((a.keys.float(), b.keys.float()), (a.values.float(), b.values.float())):
            unit = torch.exp2(second.abs().amax(-1, True).log2().floor()) * torch.finfo(one.dtype).eps
            away.append(((first - second).abs() / unit).max())
            differ.append((first != second).float().mean())
    return float(torch.stack(away).max()), float(torch.stack(differ).mean())


def spread(values: list[float]) -> str:
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 256, 128])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall-clock time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    model = load_model(options.model, threads=options.threads)
    ids = torch.randint(3, 5000, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    ways = [options.tokens, *options.blocks]
    whole = model.prefill(ids, None).cache
    for size in options.blocks:
        away, share = distance(in_blocks(model, ids, size), whole)
        print(f"blocks of {size}: {share:.2%} of elements differ, by {away:.1f} units at most")

    seconds: dict[int, list[float]] = {size: [] for size in ways}
    for _ in range(options.rounds):
        for size in ways:
            began = clock()
            if size == options.tokens:
                model.prefill(ids, None)
            else:
                in_blocks(model, ids, size)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds[size].append(clock() - began)
    print(f"{options.tokens} tokens at once: {spread(seconds[options.tokens])} s, n = {options.rounds}")
    for size in options.blocks:
        pairs = zip(seconds[size], seconds[options.tokens], strict=True)
        ratios = [one / whole_s for one, whole_s in pairs]
        print(f"blocks of {size}: {spread(seconds[size])} s, {spread(ratios)} times as long")


if __name__ == "__main__":
    main()
