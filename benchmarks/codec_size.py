"""What each codec sends and what it costs: bytes and entropies against score, NLL and KL, beside the full cache.

    python -m benchmarks.codec_size [CODEC…] [--model NAME] [--tasks needle passages] [--context 256] [--examples 8] [--json]

Runs in one process, without a network: each context's cache is selected, encoded, decoded and asked, as the two sides of
a `split` placement do. Without codecs given, all registered methods are measured.

bytes and bit/el are of the whole payload, header, positions and scales included; bit/el is over the elements of the
full cache. The entropies are zeroth-order ones of each layer's keys and values, before an entropy coder: of a symbol,
of a byte of packed symbols, and of the symbols that stand for an element that was kept. `coded` is what an entropy coder
made of the symbols over what their entropy says. ΔNLL and KL are of the gold answer, against the full cache's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from benchmarks.selection_quality import Row, asked, summary
from testbed.codecs import registry
from testbed.codecs.codec import Codec
from testbed.codecs.entropy import pack
from testbed.codecs.evidence import Kept, Needs
from testbed.codecs.layout import packed_bytes
from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.tasks import Task, parse_task


def every_method() -> list[str]:
    """Codecs that between them use each registered method: each stage's beside the plain choice of the others."""
    selected = [f"{name}@{ratio}+int8" for name in registry.SELECTORS for ratio in (0.5, 0.25)]
    transformed = [
        f"{name}{options}+int4"
        for name in registry.TRANSFORMS
        for options in ("", "(rope=pre)", "(loop=open)")
    ]
    coded = [f"{quantizer}+{coder}" for quantizer in ("int8", "int4") for coder in registry.CODERS]
    more = [
        "kivi(residual=32)",
        "turbo(bits=3)",
        "turbo(outliers=0)",
        "turbo(extra=2)",
        "turbo(outliers=0.125, extra=3)",
        "turbo(bits=3, extra=2)",
        "fp16+ans",
        "int4+ans(tables=part)",
        "int2+ans",
        "delta+int4+ans",
        "cachegen(level=1)",
        "cachegen(level=3)",
        "cachegen(anchor=10)",
    ]
    # By default `mixed` asks a diagnosis that this machine may not have; these keys are the ones it finds on smollm2-135m.
    quantized = [{"mixed": "mixed(protect=K23)"}.get(name, name) for name in registry.QUANTIZERS]
    return [*quantized, *transformed, *coded, *more, *selected]


@dataclass(frozen=True)
class Entropy:
    """Zeroth-order entropies: what a coder reaches that knows the frequencies, and nothing of neighbours."""

    bits_per_symbol: float  #: at most the symbols' width
    bits_per_packed_byte: float  #: of bytes as `pack` makes them, at most 8
    bits_per_element: float  #: bits_per_symbol × symbols / elements of keys or values


def entropy(symbols: Tensor, bits: int, elements: int) -> Entropy:
    """Of a part's uint8 symbols, each of `bits` bits (1 to 8), that stand for `elements` elements."""
    flat = symbols.flatten()
    each = _bits(flat.cpu().numpy())
    packed = _bits(pack(flat, bits).cpu().numpy())
    return Entropy(each, packed, each * flat.numel() / max(elements, 1))


def _bits(values: npt.NDArray[np.uint8]) -> float:
    counts = np.bincount(values, minlength=1)
    share = counts[counts > 0] / max(len(values), 1)
    return float(-(share * np.log2(share)).sum()) if len(share) else 0.0


@dataclass(frozen=True)
class Size:
    """What one payload takes. Entropies are None for 16-bit values, which have too many symbols to count."""

    payload_bytes: float
    bits_per_element: float
    bits_per_symbol: float | None
    bits_per_packed_byte: float | None
    entropy_bits_per_element: float | None
    coded_of_entropy: float | None = None  #: the coder's bytes over the entropy's, where there is a coder
    payload_of_promise: float | None = (
        None  #: the payload over what it were with symbols in their entropy's bytes
    )


def size_of(codec: Codec, cache: KVCache, kept: Kept | None, payload_bytes: int) -> Size:
    """The figures of a payload that `codec` made of these tokens of the cache."""
    bits = packed_bits = 0.0
    symbols_sum = elements = symbol_bytes = 0
    for piece, symbols in codec.symbols(cache, kept):
        part, width = piece.part, piece.bits
        elements += part.elements
        symbols_sum += symbols.numel()
        symbol_bytes += packed_bytes(symbols.numel(), width)
        if width == 16:
            bits = float("nan")
            continue
        own = entropy(symbols, width, part.elements)
        bits += own.bits_per_symbol * symbols.numel()
        packed_bits += own.bits_per_packed_byte * packed_bytes(symbols.numel(), width)
    whole = Size(payload_bytes, 16 * payload_bytes / cache.nbytes, None, None, None)
    if bits != bits or not bits:
        return whole
    whole = replace(
        whole,
        bits_per_symbol=bits / symbols_sum,
        bits_per_packed_byte=packed_bits / symbol_bytes,
        entropy_bits_per_element=bits / elements,
    )
    if codec.coder is None or codec.quantizer.planes:
        return whole
    packed = Codec(codec.spec)
    packed.coder = None  # not even the one that the quantizer brings with it
    beside = len(packed.encode(cache, kept)) - symbol_bytes
    return replace(
        whole,
        coded_of_entropy=(payload_bytes - beside) / (bits / 8),
        payload_of_promise=payload_bytes / (beside + bits / 8),
    )


def measure(
    model: LanguageModel, tasks: list[Task], codecs: list[str], context: int, count: int, seed: int
) -> list[dict[str, Any]]:
    """A row a codec: mean sizes over all examples, and quality task by task with 95 % intervals."""
    made = [Codec(text, model.name) for text in codecs]
    needs = Needs.of_all(codec.needs for codec in made)
    sizes: dict[str, list[Size]] = {text: [] for text in codecs}
    rows: list[Row] = []
    for task in tasks:
        for example, prefill in asked(model, task, context, count, seed, needs, True):
            held = prefill()
            for text, codec in zip(codecs, made, strict=True):
                row = held.row(codec)
                kept = codec.select(held.evidence) if codec.selects else None
                sizes[text].append(size_of(codec, held.cache, kept, row["bytes"]))
                place = {"model": model.name, "task": task.label, "example": example, "asked": text}
                rows.append({**place, "full_score": held.full_score, **row})
    quality = {(row["task"], row["codec"]): row for row in summary(rows)}
    return [
        {
            "codec": str(codec),
            **_means(sizes[text]),
            "tasks": {task.label: quality[task.label, text] for task in tasks},
        }
        for text, codec in zip(codecs, made, strict=True)
    ]


def _means(sizes: list[Size]) -> dict[str, float | None]:
    columns = {name: [getattr(size, name) for size in sizes] for name in Size.__dataclass_fields__}
    return {
        name: None if any(value is None for value in values) else statistics.fmean(values)
        for name, values in columns.items()
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as a Markdown table, which people can read, too."""
    tasks = list(rows[0]["tasks"])
    heads = ["codec", "bytes", "bit/el", "bit/symbol", "bit/byte", "entropy bit/el", "coded"]
    heads += [f"{task} {what}" for task in tasks for what in ("score", "ΔNLL", "KL")]
    wide = max(len(row["codec"]) for row in rows) + 2
    print("| " + " | ".join([heads[0].ljust(wide), *heads[1:]]) + " |")
    print("|" + "---|" + "--:|" * (len(heads) - 1))
    for row in rows:
        shown = [
            f"`{row['codec']}`".ljust(wide),
            f"{row['payload_bytes']:.0f}",
            f"{row['bits_per_element']:.2f}",
        ]
        for name in ("bits_per_symbol", "bits_per_packed_byte", "entropy_bits_per_element"):
            shown.append("" if row[name] is None else f"{row[name]:.2f}")
        shown.append("" if row["coded_of_entropy"] is None else f"{row['coded_of_entropy']:.3f}")
        for own in row["tasks"].values():
            shown += [
                f"{own['score'].mean:.2f}",
                f"{own['more_nll'].mean:+.3f}",
                f"{own['kl'].mean:.4f}",
            ]
        print("| " + " | ".join(shown) + " |")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description="Bytes and entropies of codecs against the answers' quality."
    )
    parser.add_argument("codecs", nargs="*", metavar="CODEC")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["needle", "passages"])
    parser.add_argument("--context", type=int, default=256, help="tokens")
    parser.add_argument("--examples", type=int, default=8, help="of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    started = time.monotonic()
    tasks = [parse_task(text) for text in options.tasks]
    rows = measure(
        load_model(options.model),
        tasks,
        options.codecs or every_method(),
        options.context,
        options.examples,
        options.seed,
    )
    settings = {name: getattr(options, name) for name in ("model", "context", "examples", "seed")}
    settings |= {"tasks": [task.label for task in tasks], "seconds": round(time.monotonic() - started, 1)}
    if options.json:
        print(json.dumps({**settings, "codecs": rows}, default=vars))
        return
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    for task, own in rows[0]["tasks"].items():
        print(f"full cache, {task}: score {own['full_score'].mean:.2f}, n = {own['n']}")
    print_table(rows)


if __name__ == "__main__":
    main()
