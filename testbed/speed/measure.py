"""A device profile of the machine that this runs on: passes and generated tokens, timed as a side computes them; what coding a
cache takes, and copying it.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from testbed.errors import UsageError
from testbed.hosts.processes import processor_share, scheduled
from testbed.speed.files import CodecTimes
from testbed.speed.times import Points

if TYPE_CHECKING:
    from testbed.models.kvcache import KVCache
    from testbed.models.language import LanguageModel

#: Tokens of the passes that are timed, as far as the model goes: from a question's to a document's.
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: Generated behind each context; the first is a pass over the token before it, and no part of what is timed.
_GENERATED = 9
#: Coded caches: of these, and of the model's own text.
CODECS = ("fp16", "int8", "int4")
_COPIED = 64 << 20  #: bytes
_TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps. "


class Measured(NamedTuple):
    """What `DeviceTimes` has of a device. share: of the time in which a processor was wanted that there was one, where known."""

    prefill: Points
    decode: Points
    share: float | None
    codecs: tuple[CodecTimes, ...] = ()
    copies: tuple[tuple[str, float], ...] = ()


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
    share = processor_share(before)
    codecs = measure_codecs(model, ids, [count for count, _ in prefill], repeats)
    for codec, encode, coded in codecs:
        say(f"{codec}, {encode[-1][0]} tokens: encode {encode[-1][1]:.4g} s, decode {coded[-1][1]:.4g} s")
    return Measured(tuple(prefill), tuple(decode), share, codecs, measure_copies(model.device, repeats))


def measure_codecs(
    model: LanguageModel, ids: list[int], counts: Sequence[int], repeats: int
) -> tuple[CodecTimes, ...]:
    """Medians of `repeats` encodings and decodings of the cache of the first so many tokens. A GPU's payload is made in the
    host's memory, and read from there."""
    from testbed.codecs.codec import Codec, decode

    points: dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]]]] = {}
    for count in counts:
        cache = model.prefill(ids[:count], None).cache
        for codec in map(Codec, CODECS):
            payload = codec.encode(cache)  # compiled loops and memory are no codec's own
            decode(payload, model.device)
            encode = partial(codec.encode, cache)
            timed = [
                (_took(model.device, encode), _took(model.device, partial(decode, payload, model.device)))
                for _ in range(repeats)
            ]
            for own, each in zip(
                points.setdefault(str(codec.spec), ([], [])), zip(*timed, strict=True), strict=True
            ):
                own.append((count, _told(median(each))))
    return tuple(CodecTimes(codec, tuple(one), tuple(other)) for codec, (one, other) in points.items())


def measure_copies(device: torch.device, repeats: int) -> tuple[tuple[str, float], ...]:
    """Bits a second of a copy of 64 MiB within the device's memory; of a GPU also to and from the host's, pageable (which
    payloads are copied to) and pinned.
    """
    here, there = (torch.zeros(_COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    ways = {"within": (there, here)}
    if device.type != "cpu":
        host = torch.zeros(_COPIED, dtype=torch.uint8)
        pinned = torch.zeros(_COPIED, dtype=torch.uint8, pin_memory=True)
        ways |= {"to_host": (host, here), "from_host": (here, host)}
        ways |= {"to_pinned": (pinned, here), "from_pinned": (here, pinned)}
    found = []
    for way, (target, source) in ways.items():
        target.copy_(source)
        took = median(_took(device, partial(target.copy_, source)) for _ in range(repeats))
        found.append((way, _told(8 * _COPIED / took)))
    return tuple(found)


def _took(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    started = _now(device)
    work()
    return _now(device) - started


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
