"""How fast codecs are: encode and decode of a whole cache, in GB/s of 16-bit input, beside a copy of the same bytes.

    python -m benchmarks.codec_speed [--shape smollm2 llama3-8b] [--tokens N] [--threads N] [--device cpu|cuda] [--json] [CODEC…]

For each shape a plain copy of the cache's bytes on the device, our codecs, and transformers' QuantizedCache with its quanto and
HQQ backends at four bits, all in one run. Each figure is the median of several repetitions; the copy runs between them, so
that what else the machine does meets both. Selection is not part of it: the codecs are given the whole cache.

On a GPU `encode` ends, and `decode` begins, with the payload in the host's memory; *on device* is what quantizing and packing
take there, without the way to the host. QuantizedCache stays on the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.quantized_cache import BACKENDS, missing, round_trip
from testbed.codecs.cache_format import Header, describe, dtype_name
from testbed.codecs.codec import Codec, decode
from testbed.codecs.fast.batch import Reader, Writer
from testbed.codecs.layout import lay_out
from testbed.models.kvcache import KVCache, KVLayer

SHAPES = {"smollm2": (30, 3, 64), "llama3-8b": (32, 8, 128)}  # layers, KV heads, head_dim
CODECS = ("fp16", "int8", "int4", "int8+zstd", "int4+zstd")


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


@dataclass(frozen=True)
class Speed:
    """Medians: GB/s of the cache's 16-bit bytes, and shares of the copy's speed within a repetition."""

    name: str
    payload_bytes: int | None
    encode_gbps: float
    decode_gbps: float
    copy_gbps: float
    encode_of_copy: float
    decode_of_copy: float


class Bench:
    """One cache on one device, and the copy that everything is compared with."""

    def __init__(self, cache: KVCache, repetitions: int, seconds: float, device: str) -> None:
        self.cache, self.repetitions, self.seconds, self.device = cache, repetitions, seconds, device
        self._source = torch.zeros(cache.nbytes, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def timed(self, action: Callable[[], Any]) -> float:
        """Seconds that one call takes, until the device has done what it was given."""
        self._wait()
        started = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def measured(
        self, name: str, size: int | None, encode: Callable[[], Any], decode: Callable[[Any], Any]
    ) -> Speed:
        """Up to `repetitions` rounds, at least three, for about `seconds`; a first one is not counted."""
        self._target.copy_(self._source)
        made = encode()
        decode(made)
        rounds: list[tuple[float, float, float]] = []
        until = time.monotonic() + self.seconds
        while len(rounds) < 3 or (len(rounds) < self.repetitions and time.monotonic() < until):
            copy = self.timed(lambda: self._target.copy_(self._source))
            rounds.append((self.timed(encode), self.timed(lambda: decode(made)), copy))
        gigabytes = self.cache.nbytes / 1e9
        encode_s, decode_s, copy_s = (statistics.median(column) for column in zip(*rounds, strict=True))
        shares = (
            statistics.median(one[2] / one[0] for one in rounds),
            statistics.median(one[2] / one[1] for one in rounds),
        )
        return Speed(name, size, gigabytes / encode_s, gigabytes / decode_s, gigabytes / copy_s, *shares)

    def codec(self, text: str) -> list[Speed]:
        """A codec's row; two on a GPU."""
        codec = Codec(text)
        size = len(codec.encode(self.cache))
        rows = [
            self.measured(
                str(codec), size, lambda: codec.encode(self.cache), lambda data: decode(data, self.device)
            )
        ]
        if self.device != "cpu":
            rows.append(self.on_device(codec))
        return rows

    def on_device(self, codec: Codec) -> Speed:
        """Quantizing and packing alone, from the device's memory to the device's memory."""
        groups, lists, _ = describe(self.cache)
        header = Header(str(codec), self.cache.length, dtype_name(self.cache), groups, lists, [], 0)
        layout = lay_out(header.parts(), codec.quantizer)
        device, every = torch.device(self.device), range(len(layout.pieces))

        def encode() -> tuple[torch.Tensor, torch.Tensor]:
            side = torch.empty(layout.side_bytes, dtype=torch.uint8, device=device)
            packed = torch.empty(layout.symbol_bytes, dtype=torch.uint8, device=device)
            Writer(codec.quantizer, self.cache, layout, side, packed).write(every)
            return side, packed

        def decode(made: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
            side, packed = made
            reader = Reader(codec.quantizer, layout, side, self.cache.dtype, device)
            reader.read_packed(every, packed)
            return reader.targets

        return self.measured(f"{codec.quantizer} on device", None, encode, decode)

    def backend(self, name: str) -> Speed:
        """A QuantizedCache backend's row."""
        return self.measured(f"QuantizedCache {name}", None, *round_trip(name, self.cache))


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one shape. `left_out`: backends that are not installed, and what they lack."""
    cache = made_cache(shape, options.tokens, options.device)
    bench = Bench(cache, options.repetitions, options.seconds, options.device)
    rows = [row for text in options.codecs for row in bench.codec(text)]
    lacking = {name: missing(name) for name in options.backends}
    backends = [bench.backend(name) for name, what in lacking.items() if not what]
    return {
        "shape": shape,
        "kv_bytes": cache.nbytes,
        "codecs": [asdict(row) for row in rows],
        "quantized_caches": [asdict(row) for row in backends],
        "left_out": {name: what for name, what in lacking.items() if what},
    }


def print_table(found: dict[str, Any]) -> None:
    """The rows of a shape as a Markdown table, which people can read, too."""
    print(f"\n{found['shape']}: {found['kv_bytes'] / 1e6:.1f} MB; GB/s of 16-bit input, share of the copy")
    print(f"| {'':<22} | {'bytes':>10} | {'encode':>13} | {'decode':>13} | copy |\n|---|--:|--:|--:|--:|")
    for row in [*found["codecs"], *found["quantized_caches"]]:
        size = "" if row["payload_bytes"] is None else str(row["payload_bytes"])
        ways = [f"{row[f'{way}_gbps']:.2f} ({row[f'{way}_of_copy']:.1%})" for way in ("encode", "decode")]
        print(f"| {row['name']:<22} | {size:>10} | {ways[0]:>13} | {ways[1]:>13} | {row['copy_gbps']:.1f} |")
    for name, what in found["left_out"].items():
        print(f"QuantizedCache {name}: {what}")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description="Encode and decode speed of codecs, in GB/s of 16-bit input."
    )
    parser.add_argument("codecs", nargs="*", default=CODECS, metavar="CODEC")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=25, help="of each row, at most")
    parser.add_argument("--seconds", type=float, default=4, help="for each row, about")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = [measure(shape, options) for shape in options.shape]
    cuda = options.device != "cpu"
    settings = {
        "device": torch.cuda.get_device_name(options.device) if cuda else platform.processor() or "cpu",
        "threads": options.threads,
        "tokens": options.tokens,
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps({**settings, "shapes": found}))
        return
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    for one in found:
        print_table(one)


if __name__ == "__main__":
    main()
