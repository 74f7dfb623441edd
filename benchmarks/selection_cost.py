"""What each selector adds to the prefill of a context, in one process: seconds and shares of the plain prefill.

    OMP_NUM_THREADS=2 python -m benchmarks.selection_cost [--model NAME] [--tokens 1024] [--rounds 7] [CODEC…]

Three things are added: keeping what the selector looks at (queries, sums of attention) while the context is prefilled,
running the question behind the context where it looks at that (the edge has no other use for it), and the selection itself.
Everything is timed anew in each round, in turn, so that other load meets all alike; medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Needs, gather, prefill_for
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.prefill import Prefill

CODECS = [
    "q2c@0.25", "q2c@0.25(pool=1, scope=global)", "snapkv@0.25", "snapkv@0.25(question=true)", "h2o@0.25",
    "h2o@0.25(normalised=true)", "tova@0.25", "expected@0.25", "pyramid@0.25", "adaptive@0.25", "adaptive@0.25(by=q2c)",
    "keynorm@0.25", "window@0.25", "random@0.25",
]  # fmt: skip
QUESTION = "\nQuestion: Who mended the harbour clock in spring?\nAnswer:"
T = TypeVar("T")


class Clock:
    """Seconds of named stages, an entry a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, stage: str, run: Callable[[], T]) -> T:
        """Runs and notes how long it took."""
        began = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[stage].append(time.perf_counter() - began)
        return result


def measure(model: LanguageModel, ids: list[int], codecs: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row a codec: median seconds of its three parts, and their sum's share of the plain prefill's median."""
    question, clock = model.tokenize(QUESTION), Clock()
    made = {text: Codec(text) for text in codecs}
    kept_of = {
        text: replace(codec.needs, question=False) for text, codec in made.items()
    }  # of the prefill alone
    for _ in range(rounds + 1):  # the first warms up
        prefills: dict[Needs, Prefill] = {}
        for needs in dict.fromkeys([Needs(), *kept_of.values()]):
            prefills[needs] = clock.time(str(needs), lambda needs=needs: prefill_for(model, needs, ids, None))
        plainly = prefills[Needs()]
        clock.time("question", lambda run=plainly: gather(model, Needs(question=True), None, run, question))
        for text, codec in made.items():
            evidence = gather(model, codec.needs, None, prefills[kept_of[text]], question, seed="one")
            clock.time(text, lambda codec=codec, evidence=evidence: codec.select(evidence))
    median = {stage: statistics.median(seconds[1:]) for stage, seconds in clock.seconds.items()}
    plain = clock.seconds[str(Needs())][1:]
    rows: list[dict[str, Any]] = []
    for text, codec in made.items():
        keeping = clock.seconds[str(kept_of[text])][1:]
        # Each round's two prefills stand beside each other; the difference of medians would have both's noise.
        kept = statistics.median(b - a for a, b in zip(plain, keeping, strict=True))
        asked = median["question"] if codec.needs.question else 0.0
        added, prefill = kept + asked + median[text], median[str(Needs())]
        rows.append(
            {
                "codec": text,
                "prefill_s": prefill,
                "kept_s": kept,
                "question_s": asked,
                "select_s": median[text],
                "share": added / prefill,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("codecs", nargs="*", default=CODECS, metavar="CODEC")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = load_model(options.model)
    ids = torch.randint(3, 5000, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = measure(model, ids, options.codecs, options.rounds)
    if options.json:
        print(
            json.dumps(
                {
                    "model": model.name,
                    "tokens": options.tokens,
                    "threads": torch.get_num_threads(),
                    "rows": rows,
                }
            )
        )
        return
    print(
        f"prefill of {options.tokens} tokens, {torch.get_num_threads()} threads: {rows[0]['prefill_s']:.3f} s"
    )
    print(f"{'codec':32} {'keeping':>8} {'question':>8} {'select':>8} {'share':>7}")
    for row in rows:
        print(
            f"{row['codec']:32} {row['kept_s'] * 1e3:6.0f} ms {row['question_s'] * 1e3:5.0f} ms "
            f"{row['select_s'] * 1e3:5.0f} ms {row['share']:7.1%}"
        )


if __name__ == "__main__":
    main()
