"""How what an architecture saves of a cache and what a codec saves of it go together: bytes a token, of true payloads.

    python -m benchmarks.study_composition [--tokens 256] [--json]

Each model's cache as it is (GQA, or MLA's latent), as it were if each attending head had keys and values of its own (MHA), and,
of DeepSeek-V2-Lite, with four such heads' worth of groups. Values are stand-ins, so that coders are left out: what is left has
its size from the shape. `of product`: how much smaller than the 16-bit MHA it is, over the product of what the architecture
saves without a codec and what the codec saves without the architecture; 1: the two multiply.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from testbed.codecs.codec import Codec
from testbed.codecs.evidence import gather, prefill_for
from testbed.models.shape import ShapeModel
from testbed.models.shapes import SHAPES, Shape

#: DeepSeek-V2-Lite's own heads, by its published configuration: keys of 128 + 64 (the rotary part), values of 128.
_MLA = SHAPES["deepseek-v2-lite"]
_HEADS = replace(_MLA, kv_heads=_MLA.heads, head_dim=192, value_dim=128)
_LLAMA, _QWEN = SHAPES["llama-3.1-8b"], SHAPES["qwen2.5-7b"]
#: Each model's forms, the one in which nothing is shared first.
MODELS: dict[str, dict[str, Shape]] = {
    "deepseek-v2-lite": {"MHA": _HEADS, "GQA, 4 of 16": replace(_HEADS, kv_heads=4), "MLA": _MLA},
    "llama-3.1-8b": {"MHA": replace(_LLAMA, kv_heads=_LLAMA.heads), "GQA, 8 of 32": _LLAMA},
    "qwen2.5-7b": {"MHA": replace(_QWEN, kv_heads=_QWEN.heads), "GQA, 4 of 28": _QWEN},
}
_PUBLISHED = "q2c@0.25(scope=global, layers=last, sinks=0, pool=1)"
CODECS = (
    "fp16",
    "int8",
    "int4",
    "int4(group=0, symmetric=true)",
    f"{_PUBLISHED}+int4(group=0, symmetric=true)",
    "q2c@0.25+int4",
)
_QUESTION = "\nQuestion: Who mended the harbour clock in spring?\nAnswer:"


def payload_bytes(shape: Shape, codec: Codec, tokens: int) -> int:
    """Of a context of so many tokens."""
    model = ShapeModel(shape)
    context = prefill_for(model, codec.needs, list(range(tokens)), None)
    kept = None
    if codec.selects:
        evidence = gather(model, codec.needs, None, context, model.tokenize(_QUESTION), seed="one")
        kept = codec.select(evidence)
    return len(codec.encode(context.cache, kept))


def lines(forms: dict[str, Shape], codecs: tuple[str, ...], tokens: int) -> Iterator[dict[str, Any]]:
    """A line a form and codec, of one model; the first form is the one that shares nothing, the first codec keeps 16 bits."""
    sizes = {
        (form, text): payload_bytes(shape, Codec(text), tokens) / tokens
        for form, shape in forms.items()
        for text in codecs
    }
    whole, none = next(iter(forms)), codecs[0]
    most = sizes[whole, none]
    for (form, text), size in sizes.items():
        product = (most / sizes[form, none]) * (most / sizes[whole, text])
        yield {
            "form": form,
            "codec": text,
            "bytes_a_token": size,
            "smaller": most / size,
            "of_product": most / size / product,
        }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [
        {"model": model, **line}
        for model, forms in MODELS.items()
        for line in lines(forms, CODECS, options.tokens)
    ]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("| shape | attention | codec | bytes a token | times smaller | of product |")
    print("|---|---|---|--:|--:|--:|")
    for line in found:
        print(
            f"| {line['model']} | {line['form']} | `{line['codec']}` | {line['bytes_a_token']:,.0f} | "
            f"{line['smaller']:.1f} | {line['of_product']:.2f} |"
        )


if __name__ == "__main__":
    main()
