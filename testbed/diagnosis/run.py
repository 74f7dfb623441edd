"""One diagnosis, from prefill to verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from testbed.codecs.diagnosed import FORMAT, Place, write_places
from testbed.diagnosis import published
from testbed.diagnosis.choose import Loss, holds, interval, smallest_set, surely_lost, verdict
from testbed.diagnosis.choose import loss_of as loss_of_pairs
from testbed.diagnosis.forms import Forms
from testbed.diagnosis.measure import Outcome, Probe, damage, rescue
from testbed.diagnosis.settings import Settings
from testbed.endpoints.examples import prompted
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.tasks.task import Example, make_task


def diagnose(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis, as it is written to its file. Raises TestbedError where model, task or examples cannot be had."""
    started = time.monotonic()
    model = load_model(settings.model, threads=settings.threads)
    probe_of, examples = _probes(model, settings)
    forms = Forms(settings.bits)
    method = _by_published_rule if settings.rule == "published" else _by_smallest_set
    found = method(model, settings, probe_of, examples, forms, say)
    table = forms.to_list(settings.measure, settings.epsilon)
    if "published" in found:
        (own,) = (form["bits_per_element"] for form in table if form["scale"] == settings.scale)
        found["published"]["sizes"] = published.sizes(found["published"], settings.bits, own)
    return {
        "format": FORMAT,
        **asdict(settings),
        "model": model.name,
        **found,
        "forms": table,
        "seconds": round(time.monotonic() - started, 1),
    }


Probes = Callable[[Example], Probe]


def _by_published_rule(
    model: LanguageModel,
    settings: Settings,
    probe_of: Probes,
    examples: list[Example],
    forms: Forms,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Each layer alone; see `published`."""
    alone = published.Alone(model.num_layers, settings.bits)
    _rank(probe_of, examples[: settings.examples], [forms, alone], "", say)
    found = alone.judged()
    return {
        "protect": published.protected(found),
        "verdict": published.verdict(found, settings.bits),
        "published": found,
    }


def _by_smallest_set(
    model: LanguageModel,
    settings: Settings,
    probe_of: Probes,
    examples: list[Example],
    forms: Forms,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Keys and values one at a time, and the smallest set of them that holds on as many other examples."""
    places: list[Place] = [(kind, i) for i in range(model.num_layers) for kind in ("keys", "values")]
    ranking = Ranking(places, settings.bits)
    behind = ", and then about as long at most to choose"
    _rank(probe_of, examples[: settings.examples], [forms, ranking], behind, say)
    others = [probe_of(example) for example in examples[settings.examples :]]
    for probe in others:
        forms.add(probe)
    tried: dict[frozenset[Place], Loss] = {}
    chosen, held = _smallest(ranking, others, settings, tried, say)
    word = write_places(chosen)
    surely = surely_lost(tried[chosen], settings.measure, settings.epsilon)
    return {
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
    }


class Adds(Protocol):
    """What learns from examples one by one."""

    @property
    def outcomes(self) -> int:
        """How many an example takes."""

    def add(self, probe: Probe) -> None:
        """One more."""


def _rank(
    probe_of: Probes, examples: list[Example], learning: list[Adds], behind: str, say: Callable[[str], None]
) -> None:
    """Gives each example to all that learn. Foretells how long that will take, from an outcome of the first, then from each."""
    started = time.monotonic()
    for number, example in enumerate(examples, 1):
        probe = probe_of(example)
        if number == 1:
            made = time.monotonic() - started
            probe.outcome({})
            each = time.monotonic() - started - made
            whole = (made + each * sum(one.outcomes for one in learning)) * len(examples)
            say(f"example 1 of {len(examples)} prefilled; about {duration(whole)} at least to rank{behind}")
        for one in learning:
            one.add(probe)
        took = time.monotonic() - started
        left = took / number * (len(examples) - number)
        ahead = f"; about {duration(left)} more to rank{behind}" if left else ""
        say(f"example {number} of {len(examples)} ranked, {took:.0f} s{ahead}")


def duration(seconds: float) -> str:
    """A time to wait, for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _probes(model: LanguageModel, settings: Settings) -> tuple[Probes, list[Example]]:
    """What probes an example, and the examples: those that rank layers, and as many that choose."""
    task = prompted(model, make_task(settings.task, **settings.parameters), settings.prompt)
    examples = task.examples(
        2 * settings.examples, settings.context_tokens, lambda text: len(model.tokenize(text)), settings.seed
    )
    ids = model.tokenize(task.prefix, start=True)
    model.expect(task.reach(examples, lambda text: len(model.tokenize(text)), len(ids), task.max_new_tokens))
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

    @property
    def outcomes(self) -> int:
        """How many an example takes."""
        return 2 * len(self.places) + 1

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
            tried[protected] = loss_of_pairs(
                [probe.full for probe in probes], [probe.outcome(mixture) for probe in probes]
            )
            say(f"{write_places(protected)}: loses {_told(tried[protected])}")
        return tried[protected]

    return smallest_set(
        ranking.ranked(), loss_of, lambda loss: holds(loss, settings.measure, settings.epsilon)
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _summary(full: list[Outcome], found: list[Outcome]) -> dict[str, Any]:
    """Mean KL with its interval, and what is lost of likelihood and score."""
    loss = loss_of_pairs(full, found)
    return {
        "kl": asdict(interval([outcome.kl for outcome in found])),
        "nll": asdict(interval(loss.nll)),
        "score": asdict(interval(loss.score)),
    }


def _told(loss: Loss) -> str:
    nll, score = interval(loss.nll), interval(loss.score)
    return f"{nll.mean:+.4f} [{nll.low:+.4f}, {nll.high:+.4f}] nats a token, {score.mean:+.3f} of the score"
