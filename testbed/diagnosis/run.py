"""One diagnosis, from prefill to verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from testbed.codecs.quantize.protection import FORMAT, Place, write_places
from testbed.diagnosis.choose import Loss, holds, interval, smallest_set, surely_lost, verdict
from testbed.diagnosis.measure import Outcome, Probe, damage, rescue
from testbed.diagnosis.settings import Settings
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.tasks.prompt import Prompted, choose_prompt
from testbed.tasks.task import Example, make_task


def diagnose(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis, as it is written to its file. Raises TestbedError where model, task or examples cannot be had."""
    started = time.monotonic()
    model = load_model(settings.model, threads=settings.threads)
    probe_of, examples = _probes(model, settings)
    places: list[Place] = [(kind, i) for i in range(model.num_layers) for kind in ("keys", "values")]
    ranking = Ranking(places, settings.bits)
    for number, example in enumerate(examples[: settings.examples]):
        ranking.add(probe_of(example))
        say(f"example {number + 1} of {settings.examples} ranked, {time.monotonic() - started:.0f} s")
    others = [probe_of(example) for example in examples[settings.examples :]]
    tried: dict[frozenset[Place], Loss] = {}
    chosen, held = _smallest(ranking, others, settings, tried, say)
    word = write_places(chosen)
    surely = surely_lost(tried[chosen], settings.measure, settings.epsilon)
    return {
        "format": FORMAT,
        **asdict(settings),
        "model": model.name,
        "protect": word,
        "verdict": verdict(chosen, held, len(places), settings.bits, settings.high, word, surely),
        **ranking.to_dict([model.window(layer) for layer in range(model.num_layers)]),
        "sets": [
            {
                "protect": write_places(protected),
                "size": len(protected),
                "nll": asdict(interval(loss.nll)),
                "score": asdict(interval(loss.score)),
            }
            for protected, loss in sorted(tried.items(), key=lambda item: len(item[0]))
        ],
        "seconds": round(time.monotonic() - started, 1),
    }


def _probes(model: LanguageModel, settings: Settings) -> tuple[Callable[[Example], Probe], list[Example]]:
    """What probes an example, and the examples: those that rank layers, and as many that choose."""
    prompt = choose_prompt("auto", model.name)
    template = model.chat_template() if prompt.layout == "chat" else None
    task = Prompted(make_task(settings.task, **settings.parameters), prompt, template)
    examples = task.examples(
        2 * settings.examples, settings.context_tokens, lambda text: len(model.tokenize(text)), settings.seed
    )
    model.expect(
        task.reach(examples, lambda text: len(model.tokenize(text, start=True)), task.max_new_tokens)
    )
    ids = model.tokenize(task.prefix, start=True)
    prefix = model.prefill(ids, None).cache if ids else None
    widths = (settings.bits, settings.high)
    return lambda example: Probe(model, task, example, prefix, widths, settings.scale), examples


class Ranking:
    """What quantizing each place alone does to examples, and what sparing it alone wins back."""

    def __init__(self, places: list[Place], bits: int) -> None:
        self.places, self._bits = places, bits
        self._full: list[Outcome] = []
        self._everything: list[Outcome] = []
        self._found: list[dict[str, list[Outcome]]] = [{"damage": [], "rescue": []} for _ in places]

    def add(self, probe: Probe) -> None:
        """One more example: two outcomes a place."""
        self._full.append(probe.full)
        self._everything.append(probe.outcome(dict.fromkeys(self.places, self._bits)))
        for place, found in zip(self.places, self._found, strict=True):
            found["damage"].append(probe.outcome(damage(self.places, place, self._bits)))
            found["rescue"].append(probe.outcome(rescue(self.places, place, self._bits)))

    def ranked(self) -> list[Place]:
        """The places, from the most damaging on."""
        harm = [_mean([outcome.kl for outcome in found["damage"]]) for found in self._found]
        return [self.places[i] for i in sorted(range(len(self.places)), key=lambda i: -harm[i])]

    def to_dict(self, windows: list[int | None]) -> dict[str, Any]:
        """Its part of the file; `windows`: each layer's."""
        return {
            "full": {
                "score": _mean([o.score for o in self._full]),
                "nll": _mean([o.nll for o in self._full]),
            },
            "all_quantized": _summary(self._full, self._everything),
            "places": [
                {
                    "layer": layer,
                    "kind": kind,
                    "window": windows[layer],
                    **{name: _summary(self._full, found[name]) for name in ("damage", "rescue")},
                    "won": asdict(
                        interval(
                            [a.kl - b.kl for a, b in zip(self._everything, found["rescue"], strict=True)]
                        )
                    ),
                }
                for (kind, layer), found in zip(self.places, self._found, strict=True)
            ],
        }


def _smallest(
    ranking: Ranking,
    probes: list[Probe],
    settings: Settings,
    tried: dict[frozenset[Place], Loss],
    say: Callable[[str], None],
) -> tuple[frozenset[Place], bool]:
    """The smallest set of places whose protection holds on `probes`, and whether it does; `tried` gets each set's loss."""

    def loss_of(protected: frozenset[Place]) -> Loss:
        if protected not in tried:
            mixture = {
                place: settings.high if place in protected else settings.bits for place in ranking.places
            }
            tried[protected] = _loss(
                [probe.full for probe in probes], [probe.outcome(mixture) for probe in probes]
            )
            say(f"{write_places(protected)}: loses {_told(tried[protected])}")
        return tried[protected]

    return smallest_set(
        ranking.ranked(), loss_of, lambda loss: holds(loss, settings.measure, settings.epsilon)
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _loss(full: list[Outcome], found: list[Outcome]) -> Loss:
    pairs = list(zip(full, found, strict=True))
    return Loss(
        tuple(b.nll - a.nll for a, b in pairs),
        tuple(a.score - b.score for a, b in pairs),
    )


def _summary(full: list[Outcome], found: list[Outcome]) -> dict[str, Any]:
    """Mean KL with its interval, and what is lost of likelihood and score."""
    loss = _loss(full, found)
    return {
        "kl": asdict(interval([outcome.kl for outcome in found])),
        "nll": asdict(interval(loss.nll)),
        "score": asdict(interval(loss.score)),
    }


def _told(loss: Loss) -> str:
    nll, score = interval(loss.nll), interval(loss.score)
    return f"{nll.mean:+.4f} [{nll.low:+.4f}, {nll.high:+.4f}] nats a token, {score.mean:+.3f} of the score"
