"""A device profile of the machine that this runs on: passes and generated tokens, timed as a side computes them."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from testbed.errors import UsageError
from testbed.hosts.processes import processor_share, scheduled
from testbed.speed.times import Points

if TYPE_CHECKING:
    from testbed.models.kvcache import KVCache
    from testbed.models.language import LanguageModel

#: Tokens of the passes that are timed, as far as the model goes: from a question's to a document's.
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: Generated behind each context; the first is a pass over the token before it, and no part of what is timed.
_GENERATED = 9
_TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps. "


class Measured(NamedTuple):
    """What `DeviceTimes` has of a device. share: of the time in which a processor was wanted that there was one, where known."""

    prefill: Points
    decode: Points
    share: float | None


def measure(
    model: LanguageModel, tokens: Sequence[int], repeats: int, within_s: float, say: Callable[[str], None]
) -> Measured:
    """Medians of `repeats` passes from nothing over each number of tokens, and of the tokens generated behind them.

    within_s: what one repetition may take; where one takes longer, no larger number is tried. Raises UsageError where the
    model takes none of the numbers, or generates nothing.
    """
    longest = model.max_positions - _GENERATED - 1
    wanted = [count for count in sorted(set(tokens)) if count <= longest]
    if not wanted:
        raise UsageError(
            f"model {model.name!r} takes at most {longest} tokens, fewer than any that was asked for"
        )
    ids = (model.tokenize(_TEXT) * (wanted[-1] // len(model.tokenize(_TEXT)) + 1))[: wanted[-1]]
    _once(model, ids[: wanted[0]])  # thread pools and lazy kernels are no pass's own
    prefill, decode = [], []
    before = scheduled()
    for count in wanted:
        began = time.monotonic()
        timed = [_once(model, ids[:count]) for _ in range(repeats)]
        prefill.append((count, _told(median(took for took, _ in timed))))
        if generated := [token for _, each in timed for token in each]:
            decode.append((count, _told(median(generated))))
        say(
            f"{count} tokens: {prefill[-1][1]:.4g} s, {decode[-1][1] if generated else float('nan'):.4g} s a token"
        )
        if (time.monotonic() - began) / repeats > within_s:
            break
    if not decode:
        raise UsageError(f"model {model.name!r} ends every text at once, so its decoding cannot be timed")
    return Measured(tuple(prefill), tuple(decode), processor_share(before))


def _once(model: LanguageModel, ids: list[int]) -> tuple[float, list[float]]:
    """Seconds of a pass over these tokens, and of each token generated behind them."""
    gc.collect()
    started = _now(model.device)
    cache: KVCache = model.prefill(ids, None).cache
    took = _now(model.device) - started
    times: list[float] = []
    model.generate(ids[-1:], cache, _GENERATED, None, lambda index, token: times.append(_now(model.device)))
    return took, [after - before for before, after in itertools.pairwise(times)]


def _told(seconds: float) -> float:
    """To four digits, which is more than a machine keeps to."""
    return float(f"{seconds:.4g}")


def _now(device: torch.device) -> float:
    if device.type == "cuda":  # what it was given is not done when the call returns
        torch.cuda.synchronize(device)
    return time.monotonic()
