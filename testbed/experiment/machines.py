"""How long a side will compute, for forecasts: a device's measured times, or else what its model's size lets assume."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from testbed.errors import SpecError
from testbed.experiment.scenario import Plan
from testbed.speed.times import DeviceTimes
from testbed.speed.words import Speed

#: Multiply-adds a second that a plain two-core machine reaches in a long pass, and in one of a few tokens; only for the forecast.
_PREFILL_MACS, _SHORT_MACS = 8e10, 1.6e10
#: Bytes of a cache in 16 bits that it encodes, or decodes, in a second.
_CODING_BYTES = 1e9
_FEW_TOKENS = 64


@dataclass(frozen=True)
class Machine:
    """A side. parameters: its model's."""

    speed: Speed
    parameters: float
    times: DeviceTimes | None = None

    @classmethod
    def of(cls, plan: Plan, side: str, parameters: float) -> Machine:
        device = plan.devices.get(side)
        return cls(getattr(plan.scenario.compute, side), parameters, device.times if device else None)

    @property
    def decodes(self) -> bool:
        """Whether it can generate tokens."""
        return self.speed.decode is not None

    def pass_s(self, tokens: int, past: int = 0) -> float:
        """Seconds of a pass over so many tokens behind others."""
        if self.times is not None:
            with contextlib.suppress(SpecError):  # past what was measured: a trial will say so
                return self.times.pass_s(tokens, past)
        macs = _SHORT_MACS if tokens <= _FEW_TOKENS else _PREFILL_MACS
        return self.speed.factor("prefill") * self.parameters * tokens / macs

    def generating_s(self, tokens: int, past: int) -> float:
        """Seconds of so many tokens, one by one, the first of them behind `past` others."""
        if self.times is not None and self.times.decode:
            with contextlib.suppress(SpecError):
                return sum(self.times.token_s(past + token) for token in range(tokens))
        return self.speed.factor("decode") * self.parameters * tokens / _SHORT_MACS

    def coding_s(self, cache_bytes: float) -> float:
        """Seconds of encoding, or decoding, so much of a cache, whose codecs run on this host."""
        return self.speed.factor("codec") * cache_bytes / _CODING_BYTES
