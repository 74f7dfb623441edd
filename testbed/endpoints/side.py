"""What both sides share: a model and its pace, the prefixes that both know, and the messages that set them up."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed import kinds
from testbed.delivery.delivery import DELIVERIES
from testbed.endpoints.protocol import Compute, Computed, Greeting, Hello, Learn, Load, Loaded
from testbed.endpoints.room import within_memory
from testbed.hosts.channel import Channel
from testbed.hosts.processes import processor_share, scheduled
from testbed.speed.times import DeviceTimes
from testbed.speed.words import HERE, Speed, Work

if TYPE_CHECKING:
    import torch

    from testbed.models.arriving import ArrivingCache
    from testbed.models.kvcache import KVCache
    from testbed.models.language import LanguageModel
    from testbed.models.trail import Trail

Handlers = Mapping[type, Callable[[Any], Any]]

#: What sides are compared by: a prefill of so many tokens of a text of ours.
_TOKENS = 128
_TEXT = "The quick brown fox jumps over the lazy dog. "
#: A shorter time is made by chance as much as by the machine, and the kernel counts in ticks.
_LEAST_S = 0.05


def wait_until(moment: float) -> None:
    """Sleep to a moment of the monotonic clock; one that has passed waits for nothing."""
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)


class Pace:
    """An emulated slower machine: how many times slower than this host an endpoint computes, passes over many tokens and
    generated ones each by a factor of their own. 1 waits for nothing.

    The wait is part of the measured path: it stands where the slower machine would still compute, so that what follows
    (a transmission, the next token) begins as late as it would there. Only compute is stretched, never the link.

    device: where it computes. A GPU is waited for, as what it was given is not done when the call that gave it returns.
    times: of a device that is not here, which are waited for in place of computing; what is computed all the same, such as a
    cache's coding, takes what it takes here. waits: else its clock is put forward instead: off the request's clock nobody has to
    wait for a slower machine to know how long it takes.
    """

    def __init__(
        self,
        speed: Speed = HERE,
        device: torch.device | None = None,
        times: DeviceTimes | None = None,
        waits: bool = True,
    ) -> None:
        self.speed, self.device, self.times, self.waits = speed, device, times, waits
        self._since, self._ahead = time.monotonic(), 0.0

    def another(self, waits: bool = True) -> Pace:
        """The same machine's, for another thread, or off the clock."""
        return Pace(self.speed, self.device, self.times, waits)

    def begin(self) -> float:
        """A stretch of computing begins; returns the time, in seconds of the monotonic clock."""
        self._since = time.monotonic()
        return self._since + self._ahead

    def hold(self, work: Work = "prefill", tokens: int = 0, past: int = 0, share: float = 1.0) -> float:
        """Wait for what the computing since `begin` (or the last `hold`), of that kind, would have taken longer; returns the
        time.

        tokens: of a pass; past: those before it, or before a generated token; share: of the pass that this was. A device's
        times depend on them; it raises SpecError past what was measured there.
        """
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        if (took := self.takes(work, tokens, past, share)) is not None:
            self._come_to(self._since + took)
        elif self.times is None and (factor := self.speed.factor(work)) > 1.0:
            computed = time.monotonic() - self._since
            self._come_to(self._since + computed * factor)
        return self.begin()

    def _come_to(self, moment: float) -> None:
        if self.waits:
            wait_until(moment)
        else:
            self._ahead += moment - time.monotonic()

    def takes(self, work: Work, tokens: int = 0, past: int = 0, share: float = 1.0) -> float | None:
        """Seconds for which `hold` would wait, whatever is computed meanwhile; None where that takes what it takes."""
        if self.times is None or work == "codec":
            return None
        if work == "prefill":
            return share * self.times.pass_s(tokens, past)
        return self.times.token_s(past) if self.times.decode else 0.0  # else it is off every clock


def measure(model: LanguageModel) -> Computed:
    """A prefill of `_TOKENS` tokens, by this machine's own pace: `seconds`, the mean of as many as take a while, and `share`, of
    the time in which its threads had something to do, that they were given a processor; None where the kernel does not count it.
    """
    ids = model.tokenize(_TEXT * _TOKENS)[: min(_TOKENS, model.max_positions)]
    clock = Pace(device=model.device)  # waits for a GPU, and stretches nothing
    before = scheduled()
    started = clock.begin()
    count, ended = 0, started
    while ended - started < _LEAST_S:
        model.prefill(ids, None)
        count, ended = count + 1, clock.hold()
    return Computed(len(ids), (ended - started) / count, processor_share(before))


@dataclass
class Prefix:
    """The instructions and demonstrations of a task, prefilled: known to both sides, never sent."""

    digest: str
    cache: KVCache | None  #: None for an empty prefix of a model without a start token
    closing: str = ""  #: what the prompt's layout has behind a question
    reach: int | None = None  #: tokens of the longest prompt behind it; None: the model does not depend on it


def digest(*pieces: bytes | bytearray | memoryview) -> str:
    """BLAKE2b of some bytes, one piece behind the other, as 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def per_token(times: Sequence[float]) -> float | None:
    """The mean time of a token behind the first, from when each was known; None where there is none."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


@dataclass
class Pass:
    """One over so many tokens behind others; when it began, or went on (monotonic seconds)."""

    tokens: int = 0
    past: int = 0
    began: float = 0.0


def held(*caches: KVCache | None) -> int:
    """Tokens that a layer of these holds, on average."""
    return sum(
        round(sum(layer.tokens for layer in cache.layers) / len(cache.layers))
        for cache in caches
        if cache is not None
    )


class InferenceSide:
    """A loaded model and its prefixes; the part of an endpoint that is the same on both sides."""

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self.prefixes: dict[str, Prefix] = {}
        self.pace = Pace()

    @property
    def model(self) -> LanguageModel:
        """The model; `load` comes first."""
        if self._model is None:
            raise RuntimeError("no model is loaded")
        return self._model

    def handlers(self) -> Handlers:
        """What this side does for the orchestrator, by message."""
        own: Handlers = {Load: self.load, Compute: self.compute, Learn: self.learn}
        return {Hello: lambda message: Greeting(), **own}

    def load(self, message: Load) -> Loaded:
        """Load the model and run it once, so that the first trial does not pay for thread pools and lazy kernels; integers'
        compiled loops, too, which take more than half a second to be loaded.
        """
        import torch

        from testbed.codecs.codec import Codec, decode
        from testbed.codecs.quantize.integer import Int4, Int8
        from testbed.codecs.spec import CodecSpec
        from testbed.models.loading import load_model

        for target in DELIVERIES.values():
            kinds.load(target)
        model = load_model(message.model, device=message.device, dtype=message.dtype, threads=message.threads)
        self._model, self.pace = model, Pace(message.speed, model.device, message.times)
        warm = model.tokenize("The quick brown fox jumps over the lazy dog. " * 12)
        prefilled = model.prefill(warm, None)
        model.generate(warm[:8], prefilled.cache, 4, "")
        for integer in (Int8(), Int4()):
            decode(Codec(CodecSpec(None, None, integer, None)).encode(prefilled.cache))
        return Loaded(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            layers=model.num_layers,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            max_positions=model.max_positions,
            kv_bytes_per_token=model.kv_bytes_per_token,
            speed=message.speed,
            threads=torch.get_num_threads(),
            tokenizer=model.tokenizer,
        )

    def share(self, other: InferenceSide) -> None:
        """Take the model and the prefixes that another side of this process has loaded."""
        self._model, self.prefixes = other.model, other.prefixes
        self.pace = other.pace.another()

    def compute(self, message: Compute) -> Computed:
        """How long a fixed piece of compute takes this side, before anything is stretched."""
        return measure(self.model)

    def learn(self, prefix: Learn) -> str:
        """Prefill a task's prefix once. Where a model turns keys by a prompt's length, a prefix is another one for each."""
        reach = prefix.reach if self.model.stretches else None
        known_by = [prefix.text, *filter(None, [prefix.closing, str(reach or "")])]
        name = digest("\0".join(known_by).encode())
        if name not in self.prefixes:
            self.model.expect(reach)
            ids = self.model.tokenize(prefix.text, start=True)
            cache = self.model.prefill(ids, None).cache if ids else None
            self.prefixes[name] = Prefix(name, cache, prefix.closing, reach)
        return name

    def under(self, name: str) -> Prefix:
        """The prefix of that digest, the model told how long prompts behind it get. Raises KeyError."""
        prefix = self.prefixes[name]
        self.model.expect(prefix.reach)
        return prefix

    def answer(
        self,
        question_ids: list[int],
        past: KVCache | ArrivingCache | None,
        max_new_tokens: int,
        stop: str,
        choices: Sequence[str],
        on_token: Callable[[int, int], None],
        draft: Sequence[int] = (),
        trail: Trail | None = None,
    ) -> list[int]:
        """The answer's tokens: decoded greedily, or the likeliest per token of the choices, where there are any.

        draft: what a free answer may be, which is then read with the question; trail: is told how a free one was decoded (see
        `LanguageModel.generate`).
        """
        if not choices:
            return self.model.generate(question_ids, past, max_new_tokens, stop, on_token, draft, trail)
        options = [self.model.tokenize(choice) for choice in choices]
        nlls = self.model.option_nlls(question_ids, options, past)
        best = options[min(range(len(options)), key=nlls.__getitem__)]
        on_token(0, best[0])  # with the choice, all of its tokens are known
        return best

    def end_of_answer(self, tokens: int, most: int, past: int) -> float:
        """The answer has so many tokens; below `most`, one more pass has found its end. past: tokens before it.

        Returns the time."""
        if 0 < tokens < most:
            return self.pace.hold("decode", 1, past + tokens)
        return self.pace.hold("codec")

    def behind(self, prefix: Prefix, cache: KVCache | None) -> KVCache | None:
        """The prefix's cache with `cache` behind it."""
        parts = [part for part in (prefix.cache, cache) if part is not None]
        if not parts:
            return None
        return self.model.join(*parts) if len(parts) > 1 else parts[0]


def _in_memory(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda message: within_memory(lambda: handler(message))


def main(make_handlers: Callable[[], Handlers]) -> None:
    """An endpoint process: answer the orchestrator, which asks over standard input and output, until it goes away."""
    channel = Channel.of_this_process()
    channel.serve({kind: _in_memory(handler) for kind, handler in make_handlers().items()})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # an interpreter with torch in it takes a second of a processor, and more, to be taken apart
