"""How fast codecs are: encode and decode of a whole cache, in GB/s of 16-bit input, beside a copy of the same bytes.

    python benchmarks/codec_speed.py [--shape smollm2|llama3-8b] [--tokens N] [--threads N] [--json] [CODEC…]

Each figure is the median of several repetitions; the copy runs between them, so that what else the machine does meets
both. Selection is not part of it: the codecs are given the whole cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from testbed.codecs.codec import Codec, decode
from testbed.models.kvcache import KVCache, KVLayer

SHAPES = {"smollm2": (30, 3, 64), "llama3-8b": (32, 8, 128)}  # layers, KV heads, head_dim
CODECS = ("fp16", "int8", "int4", "fp16+zstd", "int8+zstd", "int4+zstd")


def made_cache(shape: str, tokens: int, device: str) -> KVCache:
    """A cache of that shape in fp16: Gaussian, with per-channel offsets and scales as keys have."""
    layers, heads, head_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(tokens)

    def values() -> torch.Tensor:
        spread = torch.rand(heads, 1, head_dim, generator=generator) + 0.1
        offset = torch.randn(heads, 1, head_dim, generator=generator)
        noise = torch.randn(heads, tokens, head_dim, generator=generator)
        return (noise * spread + offset).half().to(device)

    return KVCache([KVLayer(values(), values(), positions, None) for _ in range(layers)], tokens)


def timed(action: Callable[[], Any], device: str) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(text: str, cache: KVCache, repetitions: int, device: str) -> dict[str, Any]:
    """One row: sizes, medians of encode, decode and copy, and the medians of their ratios within a repetition."""
    codec = Codec(text)
    source = torch.empty(cache.nbytes, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    payload = codec.encode(cache)
    decode(payload, device)
    runs = []
    for _ in range(repetitions):
        copy = timed(lambda: target.copy_(source), device)
        runs.append(
            (timed(lambda: codec.encode(cache), device), timed(lambda: decode(payload, device), device), copy)
        )
    encode_s, decode_s, copy_s = (statistics.median(column) for column in zip(*runs, strict=True))
    return {
        "codec": str(codec),
        "payload_bytes": len(payload),
        "bits_per_element": 8 * len(payload) / (cache.nbytes / 2),
        "encode_gbps": cache.nbytes / encode_s / 1e9,
        "decode_gbps": cache.nbytes / decode_s / 1e9,
        "copy_gbps": cache.nbytes / copy_s / 1e9,
        "encode_of_copy": copy_s / encode_s,
        "decode_of_copy": copy_s / decode_s,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, for people."""
    print(
        f"{'codec':<14}{'bytes':>12}{'bits':>7}{'encode':>9}{'decode':>9}{'copy':>8}   encode, decode / copy"
    )
    for row in rows:
        speeds = f"{row['encode_gbps']:>9.2f}{row['decode_gbps']:>9.2f}{row['copy_gbps']:>8.1f}"
        shares = f"{row['encode_of_copy']:>7.1%}{row['decode_of_copy']:>8.1%}"
        print(
            f"{row['codec']:<14}{row['payload_bytes']:>12}{row['bits_per_element']:>7.2f}{speeds}   {shares}"
        )


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description="Encode and decode speed of codecs, in GB/s of 16-bit input."
    )
    parser.add_argument("codecs", nargs="*", default=CODECS, metavar="CODEC")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache = made_cache(arguments.shape, arguments.tokens, arguments.device)
    rows = [measure(text, cache, arguments.repetitions, arguments.device) for text in arguments.codecs]
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("shape", "tokens", "threads", "device")}
        print(json.dumps({**settings, "kv_bytes": cache.nbytes, "codecs": rows}))
    else:
        print(
            f"{arguments.shape}, {arguments.tokens} tokens, {cache.nbytes / 1e6:.1f} MB, GB/s of fp16 input"
        )
        print_table(rows)


if __name__ == "__main__":
    main()
