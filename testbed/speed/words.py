"""What a scenario says of a side's speed: ``4``, ``{prefill: 2, decode: 8}``, ``{prefill: 4, decode: no}``, ``device:NAME``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from testbed.errors import SpecError
from testbed.strict_yaml import did_you_mean

DEVICE = "device:"
_MOST = 1000.0

#: What a side computes. prefill: many tokens in one pass, a question's too; codec: select, encode, decode a cache; decode: an
#: answer's tokens, one by one.
Work = Literal["prefill", "codec", "decode"]

Factor = Annotated[float, Meta(ge=1, le=_MOST)]


@dataclass(frozen=True)
class Speed:
    """How a side computes: so many times slower than this host, or, with a `device`, as long as was measured there.

    prefill: the factor of all that is computed in passes over many tokens, a cache's coding included. decode: that of generated
    tokens; None: this side cannot generate any.
    """

    prefill: Factor = 1.0
    decode: Factor | None = 1.0
    device: str = ""  #: a device profile's name, as `speed.files` finds it

    def factor(self, work: Work) -> float:
        """How many times longer than here; 1 for what cannot be done, which is computed off the clock alone."""
        return (self.decode or 1.0) if work == "decode" else self.prefill

    def written(self) -> Any:
        """As a scenario says it."""
        decode: Any = False if self.decode is None else self.decode
        if self.device:
            return f"{DEVICE}{self.device}" if decode else {"device": self.device, "decode": False}
        return self.prefill if decode == self.prefill else {"prefill": self.prefill, "decode": decode}


#: As this host computes.
HERE = Speed()


def parse(value: Any) -> Speed:
    """What a scenario says of one side. Raises SpecError."""
    if isinstance(value, Speed):
        return value
    if isinstance(value, str):
        return Speed(device=_device(value))
    if isinstance(value, Mapping):
        return _parts(value)
    factor = _factor(value)
    return Speed(factor, factor)


def _parts(value: Mapping[str, Any]) -> Speed:
    known = ["decode", "device", "prefill"]
    for key in value:
        if key not in known:
            raise SpecError(f"unknown key {str(key)[:40]!r}{did_you_mean(str(key), known)}")
    if not value:
        raise SpecError(f"is empty; it has {', '.join(known)}")
    cannot = value.get("decode") is False
    if "device" in value:
        if "prefill" in value or ("decode" in value and not cannot):
            raise SpecError("a device has times of its own: beside `device`, only `decode: no` is understood")
        name = str(value["device"])
        return Speed(decode=None if cannot else 1.0, device=_device(DEVICE + name.removeprefix(DEVICE)))
    decode = None if cannot else _at("decode", value)
    return Speed(_at("prefill", value), decode)


def _at(key: str, value: Mapping[str, Any]) -> float:
    try:
        return _factor(value.get(key, 1.0))
    except SpecError as error:
        raise SpecError(f"{key}: {error}") from None


def _factor(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 1 <= value <= _MOST:
        raise SpecError(
            f"{str(value)[:40]!r} is no factor of 1 to {_MOST:g} by which a side computes slower than this host; "
            "or write {prefill: 2, decode: 8}, `decode: no`, or device:NAME"
        )
    return float(value)


def _device(text: str) -> str:
    name = text.removeprefix(DEVICE)
    if name == text or not name.strip():
        raise SpecError(
            f"{text[:40]!r}: write a factor, {{prefill: 2, decode: 8}} or device:NAME (`testbed devices` lists them)"
        )
    return name
