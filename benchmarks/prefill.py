"""How fast a model prefills and decodes under the testbed, beside transformers' own sdpa path in the same process.

    python -m benchmarks.prefill [MODEL] [--tokens 1024] [--threads N]

The two alternate, so that other load on the machine meets both; medians are printed, of wall-clock seconds or, with
`--cpu`, of the process's processor seconds, which say more on a machine that computes other things too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.sources import resolve

Timed = dict[str, Callable[[], object]]


def alternate(ways: Timed, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each way, by `clock`."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall-clock time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter

    from transformers import AutoModelForCausalLM

    began = clock()
    model: LanguageModel = load_model(options.model, threads=options.threads)
    print(f"load, first in a process: {clock() - began:.2f} s")
    began = clock()
    model = load_model(options.model)
    print(f"load, again: {clock() - began:.2f} s")
    plain = AutoModelForCausalLM.from_pretrained(
        resolve(options.model).location, dtype=model.dtype, attn_implementation="sdpa"
    ).to(model.device)
    ids = torch.randint(3, 5000, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = torch.tensor([ids], device=model.device)

    def theirs() -> None:
        with torch.inference_mode():
            plain(batch, use_cache=True, logits_to_keep=1)

    prefills: Timed = {
        "sdpa": theirs,
        "testbed": lambda: model.prefill(ids, None),
        "testbed, last 32 queries": lambda: model.prefill(ids, None, queries=32),
    }
    for name, seconds in alternate(prefills, options.rounds, clock).items():
        print(f"prefill of {options.tokens} tokens, {name}: {seconds:.3f} s")

    past = model.prefill(ids[:-8], None).cache
    ends = plain.generation_config
    ends.eos_token_id = None
    model._tokens.ends = frozenset()  # both shall decode the full number

    def generated(new: int) -> Callable[[], object]:
        return lambda: plain.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, do_sample=False, pad_token_id=0
        )

    decodes: Timed = {
        "theirs short": generated(1),
        "theirs long": generated(1 + options.new),
        "ours short": lambda: model.generate(ids[-8:], past, 1, None),
        "ours long": lambda: model.generate(ids[-8:], past, 1 + options.new, None),
    }
    found = alternate(decodes, options.rounds, clock)
    for who, name in (("transformers' generate", "theirs"), ("testbed", "ours")):
        each = (found[f"{name} long"] - found[f"{name} short"]) / options.new
        print(
            f"a decoded token behind {options.tokens}, {who}: {each * 1e3:.1f} ms ({1 / each:.1f} tokens/s)"
        )


if __name__ == "__main__":
    main()
