"""Incremental Q2C: what is lost where each chunk of a context is chosen from when it arrives, and the choice never taken back.

    python -m benchmarks.study_incremental [--model NAME] [--task passages] [--context 256] [--examples 50] [--chunk 32 64 …]

The question runs behind all that has arrived (`OnlineSelection`), and its attention then chooses the selector's share of the
newest chunk. Beside it the choice that waits for the whole context, on the same examples: the share of tokens that both keep,
and the difference of the gold answer's NLL (nats a token, positive: waiting was better).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.selection_quality import Asked
from testbed import stats
from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Kept, Needs, gather
from testbed.codecs.select import OnlineSelection, Selector, highest
from testbed.endpoints.examples import prompted
from testbed.models.kvcache import KVCache
from testbed.models.loading import load_model
from testbed.tasks import parse_task

FORMS = ("q2c@0.25", "q2c@0.25(scope=global, layers=last, sinks=0, pool=1)")


def committed(online: OnlineSelection, selector: Selector, context: KVCache, chunk: int) -> Kept:
    """What is kept where each chunk's choice is made as it arrives: of every chunk the selector's share, the fractions of a token
    made up for by later ones. Sliding-window layers are whole, as ever.
    """
    prunable = [i for i, layer in enumerate(context.layers) if layer.window is None]
    places = context.layers[prunable[0]].positions
    tokens = len(places)
    chosen: dict[int, list[Tensor]] = {layer: [] for layer in prunable}
    taken = 0
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        first, end = int(places[start]), int(places[stop - 1]) + 1
        online.arrive(KVCache([layer.between(first, end) for layer in context.layers], end))
        budget = round(selector.ratio * stop) - taken
        always = [index for index in selector.always(tokens, budget) if start <= index < stop][:budget]
        forced = torch.tensor(always, dtype=torch.int64) - start
        for layer, scores in _ranking(online, selector, prunable, slice(start, stop)).items():
            chosen[layer].append(highest(scores, forced, budget) + start)
        taken += budget
    whole = {layer: torch.cat(parts, dim=-1) for layer, parts in chosen.items()}
    return Kept(tuple(whole.get(layer) for layer in range(len(context.layers))), tokens)


def _ranking(
    online: OnlineSelection, selector: Selector, prunable: list[int], part: slice
) -> dict[int, Tensor]:
    """Each layer's scores of the newest chunk, as the selector's scope has them: a list for each head, layer, or for all."""
    if selector.scope == "global":
        asked = prunable[-1:] if selector.layers == "last" else prunable
        total = torch.stack([online.scores(layer)[:, part].mean(0) for layer in asked]).mean(0)
        return dict.fromkeys(prunable, total)
    own = {layer: online.scores(layer)[:, part] for layer in prunable}
    return own if selector.scope == "head" else {layer: scores.mean(0) for layer, scores in own.items()}


def shared(ours: Kept, theirs: Kept) -> float:
    """The share of the tokens kept by one that the other keeps as well, over layers and heads."""
    both = kept = 0
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        if a is None or b is None:
            continue
        heads = max(len(x) if x.dim() == 2 else 1 for x in (a, b))
        lists = ([set(row.tolist()) for row in x.expand(heads, -1)] for x in (a, b))
        for mine, others in zip(*lists, strict=True):
            both, kept = both + len(mine & others), kept + len(mine)
    return both / kept


def measure(
    name: str, task: str, tokens: int, count: int, seed: int, chunks: Sequence[int], forms: Sequence[str]
) -> list[dict[str, Any]]:
    """A line a form and chunk."""
    model = load_model(name)
    asked_as = prompted(model, parse_task(task), "auto")
    ids = model.tokenize(asked_as.prefix, start=True)
    prefix = model.prefill(ids, None).cache if ids else None
    codecs = {form: Codec(form) for form in forms}
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {
        (form, chunk): [] for form in forms for chunk in chunks
    }
    for example in asked_as.examples(count, tokens, lambda text: len(model.tokenize(text)), seed):
        asked = Asked(
            model, asked_as, example, prefix, Needs.of_all(codec.needs for codec in codecs.values())
        )
        for form, codec in codecs.items():
            selector = codec.selector
            assert selector is not None
            evidence = gather(model, codec.needs, prefix, asked.context, asked.question, seed=example.id)
            waited = selector.select(evidence)
            before = asked.quality(waited.apply(asked.cache))
            for chunk in chunks:
                online = OnlineSelection(model, selector, prefix, asked.question)
                kept = committed(online, selector, asked.context.cache, chunk)
                after = asked.quality(kept.apply(asked.cache))
                both = shared(kept, waited)
                assert before.score is not None and after.score is not None
                found[form, chunk].append(
                    (both, after.more_nll - before.more_nll, after.score - before.score)
                )
    return [_line(name, form, chunk, own) for (form, chunk), own in found.items()]


def _line(name: str, form: str, chunk: int, own: list[tuple[float, float, float]]) -> dict[str, Any]:
    columns = dict(zip(("shared", "nll", "score"), zip(*own, strict=True), strict=True))
    return {
        "model": name,
        "setting": form,
        "chunk": chunk,
        "n": len(own),
        **{what: asdict(stats.mean(list(values))) for what, values in columns.items()},
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="passages")
    parser.add_argument("--context", type=int, default=256, help="tokens")
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = measure(
        options.model,
        options.task,
        options.context,
        options.examples,
        options.seed,
        options.chunk,
        FORMS,
    )
    if options.json:
        print(json.dumps(lines, indent=1))
        return
    print("| model | setting | chunk | n | chosen alike | ΔNLL | Δscore |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for line in lines:
        share, nll, score = (stats.Estimate(**line[what]) for what in ("shared", "nll", "score"))
        print(
            f"| `{line['model']}` | `{line['setting']}` | {line['chunk']} | {line['n']} | {share.text()} | "
            f"{nll.text(3, '+')} | {score.text(3, '+')} |"
        )


if __name__ == "__main__":
    main()
