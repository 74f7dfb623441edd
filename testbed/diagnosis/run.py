"""One diagnosis, from prefill to verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from testbed.codecs.diagnosed import FORMAT, Place, write_places
from testbed.diagnosis import published
from testbed.diagnosis.choose import (
    Loss,
    Outcome,
    holds,
    interval,
    loss_of,
    smallest_set,
    surely_lost,
    verdict,
)
from testbed.diagnosis.forms import Forms
from testbed.diagnosis.request import Request
from testbed.diagnosis.variants import Outcomes, Variants
from testbed.endpoints.examples import prompted
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.tasks.task import Example, make_task

Say = Callable[[str], None]
VariantsOf = Callable[[Example], Variants]


@dataclass(frozen=True)
class _Work:
    """What a rule works with: the model, examples that rank its layers and as many that choose, and all forms."""

    model: LanguageModel
    request: Request
    variants_of: VariantsOf
    examples: list[Example]
    forms: Forms
    say: Say


def diagnose(request: Request, say: Say) -> dict[str, Any]:
    """The diagnosis, as it is written to its file. Raises TestbedError where model, task or examples cannot be had."""
    started = time.monotonic()
    model = load_model(request.model, threads=request.threads)
    work = _Work(model, request, *_prepared(model, request), Forms(request.bits), say)
    judged = (_by_published_rule if request.rule == "published" else _by_smallest_set)(work)
    table = work.forms.to_list(request.measure, request.epsilon)
    if "published" in judged:
        (own,) = (form["bits_per_element"] for form in table if form["scale"] == request.scale)
        judged["published"]["sizes"] = published.sizes(judged["published"], request.bits, own)
    return {
        "format": FORMAT,
        **asdict(request),
        "model": model.name,
        **judged,
        "forms": table,
        "seconds": round(time.monotonic() - started, 1),
    }


def _quantizing(places: Sequence[Place], bits: int) -> Callable[[Variants], Outcome]:
    """These places coarse, all others full."""
    widths = dict.fromkeys(places, bits)
    return lambda variants: variants.outcome(widths)


def _by_published_rule(work: _Work) -> dict[str, Any]:
    """Each layer alone; see `published`."""
    layers, bits = range(work.model.num_layers), work.request.bits
    every = [place for layer in layers for place in published.layer_places(layer)]
    ways = {layer: _quantizing(published.layer_places(layer), bits) for layer in layers}
    alone = Outcomes(ways | {-1: _quantizing(every, bits)})
    _rank(work, [work.forms, alone], "")
    judged = published.judge(alone.full, alone.by_way[-1], [alone.by_way[layer] for layer in layers])
    return {
        "protect": published.protected(judged),
        "verdict": published.verdict(judged, bits),
        "published": judged,
    }


def _by_smallest_set(work: _Work) -> dict[str, Any]:
    """Keys and values one at a time, and the smallest set of them that holds on as many other examples."""
    model, request = work.model, work.request
    places: list[Place] = [(kind, i) for i in range(model.num_layers) for kind in ("keys", "values")]
    ranking = Ranking(places, request.bits)
    _rank(work, [work.forms, ranking], ", and then about as long at most to choose")
    others = [work.variants_of(example) for example in work.examples[request.examples :]]
    for variants in others:
        work.forms.add(variants)
    tried: dict[frozenset[Place], Loss] = {}
    chosen, held = _smallest(ranking, others, request, tried, work.say)
    word = write_places(chosen)
    surely = surely_lost(tried[chosen], request.measure, request.epsilon)
    return {
        "protect": word,
        "verdict": verdict(chosen, held, len(places), request.bits, request.high, word, surely),
        **ranking.to_dict([model.window(layer) for layer in range(model.num_layers)]),
        "sets": [
            {"protect": write_places(protected), "size": len(protected), **loss.record()}
            for protected, loss in sorted(tried.items(), key=lambda item: len(item[0]))
        ],
    }


def _rank(work: _Work, learning: list[Outcomes[Any]], behind: str) -> None:
    """Gives each example that ranks to all that learn. Foretells how long that will take, from an outcome of the first, then
    from each."""
    started, examples = time.monotonic(), work.examples[: work.request.examples]
    for number, example in enumerate(examples, 1):
        variants = work.variants_of(example)
        if number == 1:
            prefilled = time.monotonic() - started
            variants.outcome({})
            each = time.monotonic() - started - prefilled
            whole = (prefilled + each * sum(map(len, learning))) * len(examples)
            about = f"about {duration(whole)} at least to rank{behind}"
            work.say(f"example 1 of {len(examples)} prefilled; {about}")
        for outcomes in learning:
            outcomes.add(variants)
        took = time.monotonic() - started
        left = took / number * (len(examples) - number)
        ahead = f"; about {duration(left)} more to rank{behind}" if left else ""
        work.say(f"example {number} of {len(examples)} ranked, {took:.0f} s{ahead}")


def duration(seconds: float) -> str:
    """A time to wait, for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _prepared(model: LanguageModel, request: Request) -> tuple[VariantsOf, list[Example]]:
    """What quantizes an example's cache, and the examples: those that rank layers, and as many that choose."""
    task = prompted(model, make_task(request.task, **request.parameters), request.prompt)

    def count(text: str) -> int:
        return len(model.tokenize(text))

    examples = task.examples(2 * request.examples, request.context_tokens, count, request.seed)
    ids = model.tokenize(task.prefix, start=True)
    model.expect(task.reach(examples, count, len(ids), task.max_new_tokens))
    prefix = model.prefill(ids, None).cache if ids else None
    widths = (request.bits, request.high)
    return lambda example: Variants(model, task, example, prefix, widths, request.scale), examples


class Ranking(Outcomes[tuple[str, Place] | str]):
    """What quantizing each place alone does to examples ("damage"), and all but it ("rescue"): what sparing it wins back."""

    def __init__(self, places: list[Place], bits: int) -> None:
        self.places = places
        rest = {place: [other for other in places if other != place] for place in places}
        super().__init__(
            {"all": _quantizing(places, bits)}
            | {("damage", place): _quantizing([place], bits) for place in places}
            | {("rescue", place): _quantizing(rest[place], bits) for place in places}
        )

    def ranked(self) -> list[Place]:
        """The places, from the most damaging on."""
        harm = {place: _mean([o.kl for o in self.by_way["damage", place]]) for place in self.places}
        return sorted(self.places, key=lambda place: -harm[place])

    def to_dict(self, windows: list[int | None]) -> dict[str, Any]:
        """Its part of the file; `windows`: each layer's."""
        everything = self.by_way["all"]
        places = []
        for kind, layer in self.places:
            damage, rescue = (self.by_way[what, (kind, layer)] for what in ("damage", "rescue"))
            won = interval([a.kl - b.kl for a, b in zip(everything, rescue, strict=True)])
            places.append(
                {
                    "layer": layer,
                    "kind": kind,
                    "window": windows[layer],
                    "damage": _summary(self.full, damage),
                    "rescue": _summary(self.full, rescue),
                    "won": asdict(won),
                }
            )
        full = {"score": _mean([o.score for o in self.full]), "nll": _mean([o.nll for o in self.full])}
        return {"full": full, "all_quantized": _summary(self.full, everything), "places": places}


def _smallest(
    ranking: Ranking,
    examples: list[Variants],
    request: Request,
    tried: dict[frozenset[Place], Loss],
    say: Say,
) -> tuple[frozenset[Place], bool]:
    """The smallest set of places whose protection holds on `examples`, and whether it does; `tried` gets each set's loss."""

    def lost(protected: frozenset[Place]) -> Loss:
        if protected not in tried:
            mixture = {
                place: request.high if place in protected else request.bits for place in ranking.places
            }
            tried[protected] = loss = loss_of(
                [e.full for e in examples], [e.outcome(mixture) for e in examples]
            )
            nll, score = interval(loss.nll), interval(loss.score)
            say(
                f"{write_places(protected)}: loses {nll.mean:+.4f} [{nll.low:+.4f}, {nll.high:+.4f}] nats a token, "
                f"{score.mean:+.3f} of the score"
            )
        return tried[protected]

    return smallest_set(ranking.ranked(), lost, lambda loss: holds(loss, request.measure, request.epsilon))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _summary(full: list[Outcome], quantized: list[Outcome]) -> dict[str, Any]:
    """Mean KL with its interval, and what is lost of likelihood and score."""
    kl = asdict(interval([outcome.kl for outcome in quantized]))
    return {"kl": kl, **loss_of(full, quantized).record()}
