"""Contexts of one token, and of a token less or more than a chunk: by every delivery the answer is the whole cache's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from testbed.endpoints import meeting
from testbed.endpoints.protocol import TrialResult
from testbed.tasks.padding import CountTokens
from testbed.tasks.task import TASKS, Example, ExtractiveTask
from tests.endpoints.pair import Pair, in_this_process

CHUNK = 16
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1)
#: Full attention, sliding windows and latents.
FAMILIES = ("llama", "gemma3", "deepseek v2")
ALL, SOME, PLANES = "fp16", "q2c@0.25", "planes"


@dataclass(frozen=True)
class Exact(ExtractiveTask):
    """Contexts of just so many tokens, whatever is asked for."""

    name: ClassVar[str] = "exact"
    demonstrations: ClassVar[tuple[Example, ...]] = (Example("shown", "A red door.", "Which?", ("red",)),)

    def context_text(self, example: Example) -> str:
        return example.context

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        text = "The keeper wrote the code 4821 on a blue card, and the bell rang 7 times. " * 2
        by_length = {count_tokens(text[:end]): text[:end] for end in range(len(text), 0, -1)}
        return [Example(f"{n} tokens", by_length[n], "What is written?", ("a code",)) for n in LENGTHS]


@pytest.fixture
def pair(tiny_model: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setitem(TASKS, "exact", f"{__name__}:Exact")
    return in_this_process(tiny_model(family), task="exact")


@pytest.fixture
def all_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the cloud of `meet` begin when every chunk has come, so that what a selector keeps is all that is there."""
    original = meeting._Meeting.come_together

    def come_together(self: meeting._Meeting) -> None:
        while self._look() > 0:
            time.sleep(0.001)
        original(self)

    monkeypatch.setattr(meeting._Meeting, "come_together", come_together)


def told(result: TrialResult) -> tuple[str, int]:
    return result.answer, result.answer_tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["split", "store"])
@pytest.mark.parametrize("codec", [ALL, SOME])
@pytest.mark.parametrize(
    "delivery",
    [
        f"stream(chunk={CHUNK})",
        "stream(by=layers, chunk=1)",
        f"meet(chunk={CHUNK})",
        f"adaptive(levels=[CODEC], policy=fixed, chunk={CHUNK})",
    ],
)
def test_around_a_chunks_length_parts_give_the_answer_and_keep_the_tokens_of_the_whole(
    pair: Pair, all_came: None, placement: str, codec: str, delivery: str
) -> None:
    for example, tokens in enumerate(LENGTHS):
        whole = pair.ask(codec, example, placement=placement)
        kept = pair.outcome(whole, example)
        assert 1 <= kept.tokens_kept <= tokens
        parts = pair.ask(codec, example, placement=placement, delivery=delivery.replace("CODEC", codec))
        came = pair.outcome(parts, example)
        assert told(parts) == told(whole) and parts.tokens_left_out == 0, tokens
        assert (came.tokens_kept, came.kept_digest) == (kept.tokens_kept, kept.kept_digest), tokens
        count = 3 if "layers" in delivery else (-(-tokens // CHUNK)) + delivery.startswith("meet")
        assert parts.chunks == count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", [PLANES, f"{SOME}+planes"])
def test_around_a_chunks_length_texts_choices_and_planes_give_the_answer_of_the_whole(
    pair: Pair, codec: str
) -> None:
    for example in range(len(LENGTHS)):
        full = pair.reference(example).answer
        assert pair.ask("edge", example).answer == full == pair.ask("cloud", example).answer
        texts = f"adaptive(levels=[fp16, text], policy=fixed(level=1), chunk={CHUNK})"
        assert pair.ask("fp16", example, delivery=texts).answer == full
        assert pair.ask("random@1", example, placement="scout").answer == full
        chosen = pair.ask("random@0.5", example, placement="scout")
        assert 1 <= pair.outcome(chosen, example).tokens_kept <= LENGTHS[example]
        for placement in ("split", "store"):
            whole = pair.ask(codec, example, placement=placement)
            ahead = pair.ask(codec, example, placement=placement, delivery="progressive(planes=2)")
            assert ahead.verified_answer == whole.answer
