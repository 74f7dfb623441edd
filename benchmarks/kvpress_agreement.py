"""Do our selectors keep the tokens that kvpress's presses keep, with the same parameters? Runs where kvpress is installed.

    python -m benchmarks.kvpress_agreement [--model smollm2-135m] [--tokens 1024] [--examples 3] [--ratio 0.25] [--json]

kvpress prunes the cache of transformers' own model while that prefills a prompt; which tokens it kept is read off the keys
that are left. Ours are what arrives of a payload. Both in float32, on the same prompts: of the task `passages`, and random
tokens on tiny random models of several families. *same* is the share of places (layer, KV head, token) at which both keep or
both drop, *common* the share of kept tokens that both keep, over all prompts; *press* is *same* for the press itself as our
codec (`kvpress:SnapKV@0.25`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Needs, gather, prefill_for
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.prefill import Prefill
from testbed.models.sources import resolve
from testbed.tasks.task import make_task

#: ours, with kvpress's parameters -> its press
PAIRS = {
    "snapkv@{}(window=64, kernel=5, pool=mean)": "SnapKV",
    "expected@{}(future=512, sinks=4)": "ExpectedAttention",
    "tova@{}": "TOVA",
    "keynorm@{}": "Knorm",
    "keydiff@{}": "KeyDiff",
}
FAMILIES = ("llama", "llama multi-query", "qwen2", "qwen3", "phi3", "gemma3")


@dataclass
class Agreement:
    """Places and kept tokens, counted."""

    places: int = 0
    same: int = 0
    kept: int = 0
    common: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Two boolean tensors [kv_heads, tokens] of a layer: which tokens are kept."""
        self.places += ours.numel()
        self.same += int((ours == theirs).sum())
        self.kept += int(theirs.sum())
        self.common += int((ours & theirs).sum())


def whole_cache(network: Any, ids: list[int]) -> Any:
    """What transformers' own model caches of a prompt."""
    from transformers import DynamicCache

    whole = DynamicCache()
    with torch.no_grad():
        network(torch.tensor([ids], device=network.device), past_key_values=whole, logits_to_keep=1)
    return whole


def kept_by_kvpress(network: Any, name: str, ratio: float, ids: list[int], whole: Any) -> list[Tensor]:
    """Which tokens a press leaves, by layer bool [kv_heads, tokens]: those of `whole` whose keys are still in the cache."""
    import kvpress
    from transformers import DynamicCache

    batch, pruned = torch.tensor([ids], device=network.device), DynamicCache()
    with torch.no_grad(), getattr(kvpress, f"{name}Press")(compression_ratio=1 - ratio)(network):
        network(batch, past_key_values=pruned, logits_to_keep=1)
    kept = []
    for full, left in zip(whole.layers, pruned.layers, strict=True):
        rows = []
        for keys, remaining in zip(full.keys[0], left.keys[0], strict=True):
            there = {row.numpy().tobytes() for row in remaining.cpu()}
            rows.append(torch.tensor([row.numpy().tobytes() in there for row in keys.cpu()]))
        kept.append(torch.stack(rows))
    return kept


def kept_by_codec(model: LanguageModel, text: str, ids: list[int], prefilled: Prefill) -> list[Tensor | None]:
    """Which tokens arrive, by layer bool [kv_heads, tokens]; None for layers that are not pruned."""
    codec = Codec(text)
    evidence = gather(model, codec.needs, None, prefilled, ())
    arrived = decode(codec.encode(prefilled.cache.to(dtype=torch.float16), codec.select(evidence)))
    kept: list[Tensor | None] = [None] * len(arrived.layers)
    for layer in evidence.prunable:
        held = arrived.layers[layer]
        mask = torch.zeros(held.kv_heads, len(ids), dtype=torch.bool)
        kept[layer] = mask.scatter_(1, held.positions.expand(held.kv_heads, -1), True)
    return kept


def compare(location: str, prompts: list[list[int]], ratio: float) -> list[dict[str, Any]]:
    """A row a pair, over all prompts."""
    from transformers import AutoModelForCausalLM

    model = load_model(location, device="cpu", dtype="float32", cache_dtype=torch.float32)
    network = AutoModelForCausalLM.from_pretrained(resolve(location).location, dtype=torch.float32).eval()
    pairs = [(text.format(ratio), press, f"kvpress:{press}@{ratio}") for text, press in PAIRS.items()]
    needs = Needs.of_all(Codec(text).needs for pair in pairs for text in (pair[0], pair[2]))
    prefilled = [prefill_for(model, needs, ids, None) for ids in prompts]
    whole = [whole_cache(network, ids) for ids in prompts]
    rows = []
    for ours, press, through in pairs:
        by_selector, by_press = Agreement(), Agreement()
        row: dict[str, Any] = {"ours": ours, "press": press}
        try:
            for ids, prefill, cache in zip(prompts, prefilled, whole, strict=True):
                theirs = kept_by_kvpress(network, press, ratio, ids, cache)
                for codec, count in ((ours, by_selector), (through, by_press)):
                    for mine, other in zip(kept_by_codec(model, codec, ids, prefill), theirs, strict=True):
                        if mine is not None:
                            count.add(mine, other)
        except Exception as error:  # what a press does not take, it says in its own way
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            row |= {
                "same": by_selector.same / by_selector.places,
                "common": by_selector.common / by_selector.kept,
            }
            row |= {"through": by_press.same / by_press.places, "places": by_selector.places}
        rows.append(row)
    return rows


def uneven_norms(path: Path) -> None:
    """Gives a model's norms weights that differ: keys that a plain norm leaves are all of one length, and rank by rounding."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if "norm" in name:
                weights.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    network.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m", help="none: the tiny ones alone")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--families", nargs="*", default=FAMILIES, help="of tiny random models")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    if options.model != "none":
        model, task = load_model(options.model, device="cpu"), make_task("passages")
        count = lambda text: len(model.tokenize(text))  # noqa: E731
        contexts = map(task.context_text, task.examples(options.examples, options.tokens, count, 0))
        # Whole budgets, for kvpress rounds them down and we round to the nearest.
        prompts = [ids[: len(ids) // 20 * 20] for ids in map(model.tokenize, contexts)]
        found[f"{options.model}, {len(prompts)} prompts of {len(prompts[0])} tokens"] = compare(
            options.model, prompts, options.ratio
        )
    with TemporaryDirectory() as folder:
        from tests.tiny_models import tiny_model_directory

        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(5, 380, (400,), generator=generator).tolist() for _ in range(options.examples)
        ]
        for family in options.families:
            path = tiny_model_directory(family, Path(folder) / family)
            uneven_norms(path)
            found[f"tiny {family}, {len(prompts)} prompts of 400 tokens"] = compare(
                str(path), prompts, options.ratio
            )
    if options.json:
        print(json.dumps(found))
        return
    for name, rows in found.items():
        print(name)
        for row in rows:
            figures = row.get("error") or (
                f"same {row['same']:.4%}  common {row['common']:.4%}  press {row['through']:.4%}  of {row['places']} places"
            )
            print(f"  {row['ours']:46} {row['press']:18} {figures}")


if __name__ == "__main__":
    main()
