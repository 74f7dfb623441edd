"""Contexts of the length that was asked for: how many pieces fit, and where the evidence stands among them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from testbed.errors import UsageError
from testbed.tasks.filler import SHORT, filler

Depth = float | Literal["random"] | tuple[float, ...]
CountTokens = Callable[[str], int]

_MOST_TOKENS = 10_000_000
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])|(?<=[\u3002\uff01\uff1f\uff61])\s*(?=\S)")


def sentences(text: str) -> list[str]:
    """`text` cut behind each full stop, question or exclamation mark that a capital or a digit follows; an ideographic one
    needs neither a space nor a capital behind it.
    """
    return [piece for piece in _SENTENCE_END.split(text.strip()) if piece]


def most_that_fit(
    build: Callable[[int], str], limit: int, target: int, count_tokens: CountTokens
) -> int | None:
    """The largest n in 0..limit for which ``build(n)`` has at most `target` tokens; None where ``build(0)`` has more.

    ``build(n)`` must grow with n. Interpolates between lengths already counted, so that a long text is tokenised some five
    times and not once for each of its pieces.
    """
    low, low_tokens = 0, count_tokens(build(0))
    if low_tokens > target:
        return None
    high = min(limit, 4)
    while (high_tokens := count_tokens(build(high))) <= target:
        if high == limit:
            return limit
        per_piece = max(1.0, (high_tokens - low_tokens) / max(1, high - low))
        low, low_tokens = high, high_tokens
        high = min(limit, high + max(1, round(1.05 * (target - low_tokens) / per_piece)))
    while high - low > 1:
        share = (target - low_tokens) / (high_tokens - low_tokens)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        tokens = count_tokens(build(middle))
        if tokens <= target:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low


def check_depth(task: str, depth: object) -> Depth:
    """A depth as people write it: 0..1, ``random``, or a list of depths that the examples take in turn. Raises UsageError."""
    if depth == "random":
        return "random"
    if isinstance(depth, list | tuple) and depth:
        return tuple(_one_depth(task, each) for each in depth)
    return _one_depth(task, depth)


def _one_depth(task: str, depth: object) -> float:
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        raise UsageError(
            f"task {task}: depth {depth!r} is not a number from 0 (first) to 1 (last), a list of them, or 'random'"
        )
    return float(depth)


def depth_of(depth: Depth, index: int, rng: random.Random) -> float:
    """The depth of the example with this index."""
    drawn = (
        rng.random()
    )  # always drawn, so that a given depth leaves everything else about the example as it was
    if isinstance(depth, tuple):
        return depth[index % len(depth)]
    return drawn if depth == "random" else float(depth)


def insert_at_depth(pieces: Sequence[str], inserted: Sequence[tuple[float, str]]) -> list[str]:
    """`pieces` with each text of `inserted` at its depth: the share of the pieces' characters that stands before it."""
    total = sum(map(len, pieces))
    waiting = sorted(inserted, key=lambda item: item[0])
    result: list[str] = []
    passed = 0
    for piece in pieces:
        while waiting and waiting[0][0] * total <= passed + len(piece) / 2 and waiting[0][0] < 1:
            result.append(waiting.pop(0)[1])
        result.append(piece)
        passed += len(piece)
    return result + [text for _, text in waiting]


def among_distractors(
    evidence: str,
    distractors: Sequence[str],
    depth: float,
    target: int,
    count_tokens: CountTokens,
    rng: random.Random,
) -> str | None:
    """`evidence` at `depth` among paragraphs of at most `target` tokens in all, one paragraph a line.

    The paragraphs are `distractors` in their order, and filler text when these are used up; the last is cut behind a sentence.
    None where the evidence alone has more tokens.
    """
    return evidence_among([(depth, evidence)], distractors, target, count_tokens, rng)


def evidence_among(
    evidence: Sequence[tuple[float, str]],
    distractors: Sequence[str],
    target: int,
    count_tokens: CountTokens,
    rng: random.Random,
) -> str | None:
    """As `among_distractors`, for several pieces of evidence, each at a depth; those at one place keep their order."""
    more = _sentences_of(distractors, random.Random(rng.random()))
    drawn: list[tuple[int, str]] = []

    def build(n: int) -> str:
        drawn.extend(itertools.islice(more, max(0, n - len(drawn))))
        paragraphs = [
            " ".join(sentence for _, sentence in group)
            for _, group in itertools.groupby(drawn[:n], key=lambda item: item[0])
        ]
        room = len(paragraphs)
        # From the end, so that what was put in moves no place that is still to come.
        placed = sorted(
            ((min(room, int(depth * (room + 1))), number) for number, (depth, _) in enumerate(evidence)),
            reverse=True,
        )
        for before, number in placed:
            paragraphs.insert(before, evidence[number][1])
        return "\n".join(paragraphs)

    n = most_that_fit(build, max(target, 0), target, count_tokens)
    return None if n is None else build(n)


def _sentences_of(distractors: Sequence[str], rng: random.Random) -> Iterator[tuple[int, str]]:
    """(number of the paragraph, sentence), without end."""
    number = 0
    for text in distractors:
        for line in text.split("\n"):  # and at no other of Unicode's line ends: they are the text's own
            for sentence in sentences(line):
                yield number, sentence
            number += 1
    for i, sentence in enumerate(filler(rng)):
        yield number + i // 6, sentence


def around(
    pieces: Sequence[str], kept: Sequence[int], joint: str, target: int, count_tokens: CountTokens
) -> str | None:
    """The pieces numbered `kept` and as many of those nearest to them as fit into `target` tokens, in their order.

    None where the kept ones alone have more tokens.
    """
    others = sorted(set(range(len(pieces))) - set(kept), key=lambda i: min(abs(i - k) for k in kept))

    def build(n: int) -> str:
        return joint.join(pieces[i] for i in sorted([*kept, *others[:n]]))

    n = most_that_fit(build, len(others), target, count_tokens)
    return None if n is None else build(n)


def check_count(task: str, what: str, value: object, least: int, most: int) -> None:
    """Raises UsageError where a parameter is not a whole number in this range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"task {task}: {what} {value!r} is not a whole number from {least} to {most}")


def check_length(task: str, context_tokens: int | None) -> int:
    """The asked length of a text that has none of its own. Raises UsageError where none was asked, or an absurd one."""
    if context_tokens is None:
        raise UsageError(f"task {task}: its text has no length of its own; give context_tokens, such as 512")
    if not 1 <= context_tokens <= _MOST_TOKENS:
        raise UsageError(f"task {task}: context_tokens {context_tokens} lies outside 1..{_MOST_TOKENS}")
    return context_tokens


def hide(
    label: str,
    hidden: Sequence[tuple[float, str]],
    target: int,
    count_tokens: CountTokens,
    rng: random.Random,
) -> str:
    """Filler text of at most `target` tokens, and few fewer, with each sentence of `hidden` at its depth.

    `label`: the task, for the UsageError that is raised where the sentences alone have more tokens.
    """
    drawn: list[str] = []
    more = filler(random.Random(rng.random()))

    def build(n: int, extra: Sequence[str] = ()) -> str:
        drawn.extend(itertools.islice(more, max(0, n - len(drawn))))
        return " ".join(insert_at_depth([*drawn[:n], *extra], hidden))

    n = most_that_fit(build, target, target, count_tokens)
    if n is None:
        raise UsageError(
            f"task {label.partition('(')[0]}: {label} needs a context of at least {count_tokens(build(0))} tokens; "
            f"{target} were asked"
        )
    extra: list[str] = []
    left = target - count_tokens(build(n))
    empty = count_tokens("x")
    for short in rng.sample(SHORT, len(SHORT)):
        size = count_tokens(f"x {short}") - empty
        if size <= left:
            extra.append(short)
            left -= size
    while extra and count_tokens(build(n, extra)) > target:  # a tokeniser whose counts do not add up
        extra.pop()
    return build(n, extra)
