"""What the measurements say: the smallest protected set that holds the quality, or that there is no bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from testbed.codecs.diagnosed import Place

#: A set of more than this share of all keys and values is no bottleneck any more: the damage is everywhere.
LARGEST_BOTTLENECK = 0.15


@dataclass(frozen=True)
class Outcome:
    """One example under one setting. kl: of the gold answer's next-token distributions from the full cache's, nats a token; nll:
    of that answer, nats a token; score: the task's, 0 to 1.
    """

    kl: float
    nll: float
    score: float


@dataclass(frozen=True)
class Loss:
    """What a setting loses against the full cache, per example: nats a token of the gold answer, and points of the score."""

    nll: tuple[float, ...]
    score: tuple[float, ...]

    def of(self, measure: str) -> tuple[float, ...]:
        """`measure`: "nll" or "score"."""
        return self.nll if measure == "nll" else self.score

    def record(self) -> dict[str, Any]:
        """Both with their intervals, for JSON."""
        return {"nll": asdict(interval(self.nll)), "score": asdict(interval(self.score))}


@dataclass(frozen=True)
class Interval:
    """A mean over examples and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def loss_of(full: Sequence[Outcome], quantized: Sequence[Outcome]) -> Loss:
    """What outcomes lose against the full cache's of the same examples."""
    pairs = list(zip(full, quantized, strict=True))
    return Loss(tuple(b.nll - a.nll for a, b in pairs), tuple(a.score - b.score for a, b in pairs))


def interval(values: Sequence[float]) -> Interval:
    """Paired bootstrap: the values are differences from the same example's full cache."""
    from testbed import stats

    estimate = stats.mean(list(values))
    return Interval(estimate.value, estimate.low, estimate.high)


def holds(loss: Loss, measure: str, epsilon: float) -> bool:
    """Whether the loss is within epsilon: the far end of its 95 % interval, not its mean."""
    return interval(loss.of(measure)).high <= epsilon


def surely_lost(loss: Loss, measure: str, epsilon: float) -> bool:
    """Whether the loss is beyond epsilon: the near end of its 95 % interval. Few examples leave it open."""
    return interval(loss.of(measure)).low > epsilon


def smallest_set(
    ranked: Sequence[Place], loss_of: Callable[[frozenset[Place]], Loss], within: Callable[[Loss], bool]
) -> tuple[frozenset[Place], bool]:
    """The smallest set found that holds the quality, and whether any did (else all places are returned).

    ranked: the most fragile first. Sizes are doubled until one holds and then halved in between, so that few are tried; from
    what remains each place is dropped that is not needed, the least fragile first.
    """
    failing, size = -1, 0
    while not within(loss_of(frozenset(ranked[:size]))):
        failing = size
        if size == len(ranked):
            return frozenset(ranked), False
        size = min(max(1, 2 * size), len(ranked))
    while size - failing > 1:
        middle = (size + failing) // 2
        if within(loss_of(frozenset(ranked[:middle]))):
            size = middle
        else:
            failing = middle
    chosen = list(ranked[:size])
    if len(chosen) <= 16:
        for place in reversed(chosen[:-1]):
            fewer = [other for other in chosen if other != place]
            if within(loss_of(frozenset(fewer))):
                chosen = fewer
    return frozenset(chosen), True


def verdict(
    protected: frozenset[Place], held: bool, places: int, low: int, high: int, word: str, surely: bool = True
) -> str:
    """One sentence for people. surely: whether what does not hold is beyond epsilon for certain."""
    if held and not protected:
        return f"no bottleneck: int{low} everywhere holds the full cache's quality"
    if not held and not surely:
        return (
            f"undecided: these examples are too few to show that even {high} bits everywhere hold the quality"
        )
    if not held:
        return f"no set holds the quality: even with {high} bits everywhere the loss is beyond epsilon"
    share = len(protected) / places
    if share > LARGEST_BOTTLENECK:
        return f"no bottleneck: the loss is spread; {len(protected)} of {places} keys and values need {high} bits ({word})"
    return f"bottleneck: {word} ({len(protected)} of {places} keys and values); the others stand int{low}"


def best_form(forms: list[dict[str, Any]]) -> str:
    """Which form to take: the smallest that holds; for people."""
    best = next((form for form in forms if form["holds"]), None)
    if best is None:
        return (
            "no form holds by itself; the smallest loss has "
            + min(forms, key=lambda form: form["nll"]["mean"])["codec"]
        )
    return f"the smallest form that holds: {best['codec']} ({best['bits_per_element']:.2f} bits an element)"
