"""What integer codecs take from a device's memory to the same device's memory, beside a copy of the same bytes there.

    python -m benchmarks.device_codecs [--device cpu|cuda] [--shape smollm2 llama3-8b] [--tokens N] [--always] [--json] [CODEC…]

*as shipped* is what an endpoint does: on a GPU torch's operations on all parts together, on a processor the compiled loops.
*torch* is the same arithmetic in torch's operations on either. *torch.compile* is that, compiled: tried where *torch* encodes or
decodes at less than 30 % of the copy's speed (or `--always`), and only worth a thought where it gives the same bytes and values,
which is looked at. The way to the host's memory is no part of it; `benchmarks.codec_speed` has that.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.codec_speed import SHAPES, Bench, Speed, made_cache
from testbed.codecs.codec import Codec
from testbed.codecs.entropy import pack_rows, unpack
from testbed.codecs.quantize.integer import Integer, _quantized
from testbed.codecs.steps import Part

#: Of a copy's speed: what is slower is compiled, too.
ENOUGH = 0.3
CODECS = ("int8", "int4")

Made = tuple[Tensor, Tensor]  #: packed symbols and side information


def encode(quantizer: Integer, x: Tensor) -> Made:
    """[heads, tokens, head_dim] in 16 bits, quantized token by token."""
    grid = quantizer._grid
    groups = x.shape[-1] // (quantizer.group or x.shape[-1])
    q, side = _quantized(x.unflatten(-1, (groups, -1)), grid, x.dtype)
    symbols = (q + grid.offset).to(torch.int8).view(torch.uint8)
    return pack_rows(symbols.view(len(x), -1), quantizer.width), side


def decode(quantizer: Integer, part: Part, made: Made) -> Tensor:
    """The values, in their 16 bits."""
    packed, side = made
    symbols = unpack(packed, part.tokens * part.head_dim, quantizer.width).flatten()
    values = quantizer.decode(part, symbols, side.contiguous().flatten().view(torch.uint8))
    return values.to(getattr(torch, part.dtype))


def same(one: Made, other: Made) -> bool:
    """Whether these are the same bytes."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Rows:
    """A codec's rows for one cache. `said`: of *torch.compile*, whether it gave the same, or why it was not tried."""

    def __init__(self, text: str, bench: Bench, always: bool) -> None:
        codec = Codec(text)
        quantizer = codec.quantizer
        if not isinstance(quantizer, Integer) or codec.coder or codec.selector or codec.transform:
            raise SystemExit(f"{text}: is no plain integer codec; name int8, int4, int3 or int2")
        layers = bench.cache.layers
        if layers[0].keys.shape[-1] % (quantizer.group or 1) or not quantizer.by_token:
            raise SystemExit(f"{text}: is not quantized token by token in equal groups")
        x = torch.cat([values for layer in layers for values in (layer.keys, layer.values)])
        part = Part(0, "keys", *x.shape, str(x.dtype).removeprefix("torch."))
        ways = partial(encode, quantizer, x), partial(decode, quantizer, part)
        eager = bench.measured(f"{codec}, torch", None, *ways)
        self.rows = [as_shipped(codec, bench), eager]
        if min(eager.encode_of_copy, eager.decode_of_copy) >= ENOUGH and not always:
            self.said = f"{codec}: torch reaches {ENOUGH:.0%} of a copy, so nothing is compiled"
            return
        try:
            row, alike = compiled(f"{codec}, torch.compile", bench, *ways)
        except Exception as error:  # whatever a compiler that is not there raises
            self.said = f"{codec}: torch.compile cannot: {(str(error).splitlines() or [type(error).__name__])[0][:160]}"
            return
        self.rows.append(row)
        self.said = f"{codec}: torch.compile gives {'the same bytes and values' if alike else 'OTHER bytes or values'}"


def as_shipped(codec: Codec, bench: Bench) -> Speed:
    """What an endpoint's device does."""
    row = bench.on_device(codec)
    return Speed(**{**asdict(row), "name": f"{codec}, as shipped"})


def compiled(
    name: str, bench: Bench, encode: Callable[[], Made], decode: Callable[[Made], Tensor]
) -> tuple[Speed, bool]:
    """The compiled ways' row, and whether they give what the others give."""
    torch._dynamo.reset()
    fast_encode, fast_decode = torch.compile(encode), torch.compile(decode)
    made = encode()
    alike = same(made, fast_encode()) and torch.equal(decode(made), fast_decode(made))
    return bench.measured(name, None, fast_encode, fast_decode), alike


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one shape."""
    cache = made_cache(shape, options.tokens, options.device)
    bench = Bench(cache, options.repetitions, options.seconds, options.device)
    found = [Rows(text, bench, options.always) for text in options.codecs]
    return {
        "shape": shape,
        "kv_bytes": cache.nbytes,
        "rows": [asdict(row) for one in found for row in one.rows],
        "compile": [one.said for one in found],
    }


def print_table(found: dict[str, Any]) -> None:
    """A shape's rows as a Markdown table, which people can read, too."""
    print(
        f"\n{found['shape']}: {found['kv_bytes'] / 1e6:.1f} MB; GB/s of 16-bit input, share of a copy on the device"
    )
    print(f"| {'':<20} | {'encode':>14} | {'decode':>14} | copy |\n|---|--:|--:|--:|")
    for row in found["rows"]:
        ways = [f"{row[f'{way}_gbps']:.2f} ({row[f'{way}_of_copy']:.1%})" for way in ("encode", "decode")]
        print(f"| {row['name']:<20} | {ways[0]:>14} | {ways[1]:>14} | {row['copy_gbps']:.1f} |")
    for line in found["compile"]:
        print(line)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description="Integer codecs on a device against a copy there.")
    parser.add_argument("codecs", nargs="*", default=CODECS, metavar="CODEC")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=25, help="of each row, at most")
    parser.add_argument("--seconds", type=float, default=2, help="for each row, about")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--always", action="store_true", help="compile also what is fast enough")
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
