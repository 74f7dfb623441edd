"""What a model can still answer from the tokens that a selector kept: task score, NLL and KL, beside the full cache.

    python -m benchmarks.selection_quality [--model NAME] [--task needle] [--context 512] [--examples 10] CODEC…
    python -m benchmarks.selection_quality --grid --no-answers --examples 30        every selector at three ratios

Runs in one process, without a network. For each codec the context's cache is selected, encoded, decoded and asked, as the
two sides of a `split` placement do. `found` is the share of the answer's tokens in the context (its last occurrence there)
that were kept, over layers and heads; ΔNLL and KL are of the gold answer, against the full cache's; `exact` is the share of
examples in which greedy decoding writes the gold answer's tokens (each is the likeliest behind the true ones), which needs no
decoding. Brackets are 95 % bootstrap intervals of the mean over examples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field

import torch

from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Kept, Needs, gather, prefill_for
from testbed.diagnosis.choose import interval
from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.likelihood import mean_kl, mean_nll
from testbed.models.loading import load_model
from testbed.tasks.task import Example, Task, make_task

CODECS = [
    "fp16", "oracle@0.25", "q2c@0.25", "q2c@0.25(pool=1)", "snapkv@0.25(question=true)", "snapkv@0.25", "tova@0.25",
    "expected@0.25", "h2o@0.25", "h2o@0.25(normalised=true)", "keynorm@0.25", "pyramid@0.25", "adaptive@0.25",
    "adaptive@0.25(by=q2c)", "window@0.25", "random@0.25", "keydiff@0.25", "lagkv@0.25", "leverage@0.25", "compactor@0.25",
    "simlayer@0.25", "qfilters@0.25", "kvzip@0.25", "perhead@0.25(by=kvzip, floor=0)", "finch@0.25", "chunk@0.25(by=q2c)",
    "critical@0.25(by=q2c)", "perlayer@0.25(by=q2c)", "think", "lossless", "lowrank", "kvtc",
    "gear",
]  # fmt: skip
GRID = [
    f"{name}@{ratio}{settings}"
    for name, settings in [
        ("oracle", ""), ("q2c", ""), ("q2c", "(pool=1, scope=global)"), ("snapkv", "(question=true)"),
        ("adaptive", "(by=q2c)"), ("snapkv", ""), ("tova", ""), ("expected", ""), ("h2o", ""), ("h2o", "(normalised=true)"),
        ("pyramid", ""), ("adaptive", ""), ("keynorm", ""), ("window", ""), ("random", ""),
    ]
    for ratio in (0.1, 0.25, 0.5)
]  # fmt: skip


@dataclass
class Figures:
    """One codec's figures, an entry an example."""

    exact: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    more_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    payload_bytes: list[float] = field(default_factory=list)
    bits_per_element: list[float] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Each figure's mean; NaN where there is none."""
        return {
            name: statistics.fmean(values) if values else float("nan") for name, values in vars(self).items()
        }


def answer_tokens(model: LanguageModel, context: str, answer: str) -> list[int]:
    """Indices of the context's tokens that spell the answer where it stands last; none where it does not stand."""
    at = context.rfind(answer)
    before, through = (len(model.tokenize(context[:end])) for end in (at, at + len(answer)))
    return list(range(before, through)) if at >= 0 else []


def share_found(kept: Kept, wanted: list[int]) -> float:
    """The share of `wanted` that the pruned layers' heads kept."""
    index = torch.tensor(wanted)
    rows = [
        row
        for layer in kept.layers
        if layer is not None
        for row in (layer if layer.dim() == 2 else layer[None])
    ]
    return statistics.fmean(float(torch.isin(index, row).float().mean()) for row in rows) if rows else 1.0


def measure(
    model: LanguageModel, task: Task, examples: list[Example], codecs: list[str], generate: bool = True
) -> dict[str, Figures]:
    """Each codec's figures over these examples."""
    prefix_ids = model.tokenize(task.prefix, start=True)
    prefix = model.prefill(prefix_ids, None).cache if prefix_ids else None
    needs = Needs.of_all(Codec(text).needs for text in codecs)
    figures = {text: Figures() for text in codecs}
    for example in examples:
        context, question = task.context_text(example), model.tokenize(task.question_text(example))
        gold = model.tokenize(task.answer_text(example))
        prefilled = prefill_for(model, needs, model.tokenize(context), prefix)
        reference = model.likelihood(question, gold, behind(prefix, prefilled.cache))
        standing = answer_tokens(model, context, example.answers[0])
        evidence = gather(
            model, needs, prefix, prefilled, question, gold, example.id
        )  # of which each takes its own
        for text in codecs:
            codec, mine = Codec(text), figures[text]
            kept = codec.select(evidence)
            known = model.knowing_ropes(prefilled.cache) if codec.undoes_rope else prefilled.cache
            payload = codec.encode(known, kept)
            past = behind(prefix, decode(payload))
            found = model.likelihood(question, gold, past)
            mine.more_nll.append(mean_nll(found, gold) - mean_nll(reference, gold))
            mine.kl.append(mean_kl(reference, found))
            mine.exact.append(float(found.argmax(-1).tolist() == gold))
            mine.payload_bytes.append(len(payload))
            mine.bits_per_element.append(len(payload) * 16 / prefilled.cache.nbytes)
            if standing:
                mine.found.append(share_found(kept, standing))
            if generate:
                ids = model.generate(question, past, task.max_new_tokens, task.stop)
                mine.score.append(task.score(model.text(ids, task.stop), example)["score"])
    return figures


def behind(prefix: KVCache | None, cache: KVCache) -> KVCache:
    """The cache as the cloud has it, behind the prefix's."""
    from testbed.models.kvcache import join

    return cache if prefix is None else join(prefix, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("codecs", nargs="*", default=CODECS, metavar="CODEC")
    parser.add_argument("--grid", action="store_true", help="every selector at 0.1, 0.25 and 0.5 instead")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="needle")
    parser.add_argument("--path", help="of the task qa: a file of JSON lines")
    parser.add_argument("--context", type=int, default=512, help="tokens; 0: as long as they are")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-answers", action="store_true", help="NLL and KL alone, which are faster")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = load_model(options.model)
    task = make_task(options.task, **({"path": options.path} if options.path else {}))
    examples = task.examples(
        options.examples, options.context or None, lambda text: len(model.tokenize(text)), options.seed
    )
    codecs = GRID if options.grid else options.codecs
    figures = measure(model, task, examples, codecs, not options.no_answers)
    means = {text: each.means() for text, each in figures.items()}
    print(
        f"{model.name}, {task.name}, contexts of {options.context} tokens, {len(examples)} examples",
        file=sys.stderr,
    )
    if options.json:
        intervals = {
            text: {name: asdict(interval(values)) for name, values in vars(each).items() if values}
            for text, each in figures.items()
        }
        said = {"model": model.name, "task": task.name, "examples": len(examples), "context": options.context}
        print(json.dumps({**said, "codecs": means, "intervals": intervals}))
        return
    print(
        f"{'codec':36} {'score':>6} {'exact':>18} {'ΔNLL':>7} {'KL':>22} {'found':>6} {'bytes':>10} {'bit/el':>7}"
    )
    for text, mean in means.items():
        exact, kl = (spread(values) for values in (figures[text].exact, figures[text].kl))
        print(
            f"{text:36} {mean['score']:6.3f} {exact:>18} {mean['more_nll']:7.3f} {kl:>22} {mean['found']:6.2f} "
            f"{mean['payload_bytes']:10.0f} {mean['bits_per_element']:7.3f}"
        )


def spread(values: list[float]) -> str:
    """A mean and its 95 % interval."""
    found = interval(values)
    return f"{found.mean:.3f} [{found.low:.2f} {found.high:.2f}]"


if __name__ == "__main__":
    main()
