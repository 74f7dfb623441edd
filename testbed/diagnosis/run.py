"""One diagnosis, from prefill to verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from testbed.codecs.quantize.protection import FORMAT, Place, write_places
from testbed.diagnosis.choose import Loss, holds, interval, smallest_set, verdict
from testbed.diagnosis.measure import Outcome, Probe, damage, rescue
from testbed.diagnosis.settings import Settings
from testbed.models.language import load_model
from testbed.tasks.prompt import Prompted, choose_prompt
from testbed.tasks.task import make_task


def diagnose(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis, as it is written to its file. Raises TestbedError where model, task or examples cannot be had."""
    started = time.monotonic()
    model = load_model(settings.model, threads=settings.threads)
    prompt = choose_prompt("auto", model.name)
    template = model.chat_template() if prompt.layout == "chat" else None
    task = Prompted(make_task(settings.task, **settings.parameters), prompt, template)
    examples = task.examples(
        2 * settings.examples, settings.context_tokens, lambda text: len(model.tokenize(text)), settings.seed
    )
    ids = model.tokenize(task.prefix, start=True)
    prefix = model.prefill(ids, None).cache if ids else None
    places: list[Place] = [(kind, i) for i in range(model.num_layers) for kind in ("keys", "values")]
    widths = (settings.bits, settings.high)

    ranking: list[dict[str, list[Outcome]]] = [{"damage": [], "rescue": []} for _ in places]
    everything, probed = [], []
    for number, example in enumerate(examples[: settings.examples]):
        probe = Probe(model, task, example, prefix, widths, settings.scale)
        probed.append(probe.full)
        everything.append(probe.outcome(dict.fromkeys(places, settings.bits)))
        for place, found in zip(places, ranking, strict=True):
            found["damage"].append(probe.outcome(damage(places, place, settings.bits)))
            found["rescue"].append(probe.outcome(rescue(places, place, settings.bits)))
        say(f"example {number + 1} of {settings.examples} ranked, {time.monotonic() - started:.0f} s")
    by_damage = sorted(range(len(places)), key=lambda i: -_mean([o.kl for o in ranking[i]["damage"]]))
    ranked = [places[i] for i in by_damage]

    probes = [
        Probe(model, task, example, prefix, widths, settings.scale)
        for example in examples[settings.examples :]
    ]
    tried: dict[frozenset[Place], Loss] = {}

    def loss_of(protected: frozenset[Place]) -> Loss:
        if protected not in tried:
            mixture = {place: settings.high if place in protected else settings.bits for place in places}
            tried[protected] = _loss(
                [probe.full for probe in probes], [probe.outcome(mixture) for probe in probes]
            )
            say(f"{write_places(protected)}: loses {_told(tried[protected])}")
        return tried[protected]

    chosen, held = smallest_set(ranked, loss_of, lambda loss: holds(loss, settings.measure, settings.epsilon))
    word = write_places(chosen)
    return {
        "format": FORMAT,
        **asdict(settings),
        "model": model.name,
        "protect": word,
        "verdict": verdict(chosen, held, len(places), settings.bits, settings.high, word),
        "full": {"score": _mean([o.score for o in probed]), "nll": _mean([o.nll for o in probed])},
        "all_quantized": _summary(probed, everything),
        "places": [
            {
                "layer": layer,
                "kind": kind,
                "window": model.window(layer),
                **{name: _summary(probed, found[name]) for name in ("damage", "rescue")},
                "won": asdict(
                    interval([a.kl - b.kl for a, b in zip(everything, found["rescue"], strict=True)])
                ),
            }
            for (kind, layer), found in zip(places, ranking, strict=True)
        ],
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
