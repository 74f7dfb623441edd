"""Device profiles (see ``devices/``): what a device that is not here takes to compute for a model.

device: NVIDIA GeForce RTX 4090, 24 GB        what it is
model: llama-3.1-8b                           whose times these are: a scenario's `model`, or the NAME of `shape:NAME`
dtype: float16
basis: published                              measured: by `testbed device measure`; published: taken from the source
source: where, when and how it was measured, or who published it
prefill:                                      tokens of a pass from nothing, and how long it takes
  - [512, 54.57ms]
decode:                                       tokens of context, and how long a token behind them takes; may be left out
  - [256, 18.23ms]
codecs:                                       tokens of a cache, and how long coding all of it takes; may be left out
  int8: {encode: [[1024, 2.1ms]], decode: [[1024, 1.4ms]]}
copies:                                       bits a second within the device's memory, to the host's and from it; likewise
  within: 9600gbit
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from testbed import lookup, strict_yaml
from testbed.errors import SpecError
from testbed.speed.times import DeviceTimes, Points
from testbed.strict_yaml import did_you_mean
from testbed.units import exact_rate, exact_time, parse_rate, parse_time

_FOLDER = "devices"
_MOST_POINTS = 100

Basis = Literal["measured", "published"]
#: pinned: to or from memory of the host's that is never paged out.
Way = Literal["within", "to_host", "from_host", "to_pinned", "from_pinned"]


def _point(value: Any) -> tuple[int, float]:
    whole = isinstance(value, list) and len(value) == 2 and isinstance(value[0], int)
    if not whole or isinstance(value[0], bool) or not 1 <= value[0] <= 1 << 24:
        raise ValueError(f"{str(value)[:40]!r}: write [TOKENS, TIME], such as [512, 54.6ms]")
    seconds = parse_time(value[1])
    if not 0 < seconds <= 1e6:
        raise ValueError(f"{str(value)[:40]!r}: takes no time, or more than a device can")
    return value[0], seconds


def _rate(value: Any) -> float:
    rate_bps = parse_rate(value)
    if not 0 < rate_bps <= 1e18:
        raise ValueError(f"{str(value)[:40]!r}: is no rate of a copy")
    return rate_bps


_Text = Annotated[str, Field(min_length=1, max_length=2000)]
_Points = list[Annotated[tuple[int, float], BeforeValidator(_point)]]


class Coding(BaseModel):
    """A codec's times."""

    model_config = ConfigDict(extra="forbid", strict=True)

    encode: Annotated[_Points, Field(min_length=1, max_length=_MOST_POINTS)]
    decode: Annotated[_Points, Field(min_length=1, max_length=_MOST_POINTS)]


class Written(BaseModel):
    """A file, checked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    device: _Text
    model: _Text
    dtype: _Text
    basis: Basis
    source: _Text
    prefill: Annotated[_Points, Field(min_length=1, max_length=_MOST_POINTS)]
    decode: Annotated[_Points, Field(max_length=_MOST_POINTS)] = []
    codecs: Annotated[dict[_Text, Coding], Field(max_length=_MOST_POINTS)] = {}
    copies: dict[Way, Annotated[float, BeforeValidator(_rate)]] = {}
    name: str | None = None


class CodecTimes(NamedTuple):
    """How long a codec takes for a cache of so many tokens, the whole of it. codec: its text."""

    codec: str
    encode: Points
    decode: Points


@dataclass(frozen=True)
class Device:
    """A device profile. codecs, copies: for people and for studies; no run takes anything from them."""

    name: str
    device: str  #: what it is, for people
    dtype: str
    basis: Basis
    source: str
    times: DeviceTimes
    codecs: tuple[CodecTimes, ...] = ()
    copies: tuple[tuple[str, float], ...] = ()  #: bits a second by way (`Way`)

    @property
    def digest(self) -> str:
        """Of the model's name and the times, which are all that a run takes from it."""
        text = json.dumps([self.times.model, self.times.prefill, self.times.decode])
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def text(self) -> str:
        """As a file has it."""
        about = {"device": self.device, "model": self.times.model, "dtype": self.dtype, "basis": self.basis}
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items()]
        lines.append(f"source: {json.dumps(self.source, ensure_ascii=False)}")
        for key, points in (("prefill", self.times.prefill), ("decode", self.times.decode)):
            if points:
                lines += [f"{key}:", *(f"  - [{tokens}, {exact_time(took)}]" for tokens, took in points)]
        if self.codecs:
            lines.append("codecs:")
            for codec, encode, decode in self.codecs:
                ways = f"encode: {_line(encode)}, decode: {_line(decode)}"
                lines.append(f"  {json.dumps(codec, ensure_ascii=False)}: {{{ways}}}")
        if self.copies:
            lines += ["copies:", *(f"  {way}: {exact_rate(rate)}" for way, rate in self.copies)]
        return "\n".join(lines) + "\n"


def _line(points: Points) -> str:
    return f"[{', '.join(f'[{tokens}, {exact_time(took)}]' for tokens, took in points)}]"


def load_device(name_or_path: str) -> Device:
    """The device profile of a file, or of the one of that name that is shipped. Raises SpecError naming file and place."""
    path = find(name_or_path)
    return device_from(strict_yaml.read(path), str(path), path.stem)


def shipped_devices() -> list[Path]:
    """The device profiles that come with the testbed, and those in ``devices/`` of the current directory."""
    folders = (Path(_FOLDER), Path(__file__).parents[1] / _FOLDER)
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return list(found.values())


def find(name_or_path: str) -> Path:
    """The file of a device profile. Raises SpecError."""
    path = Path(lookup.find(name_or_path) or name_or_path)
    if path.is_file():
        return path
    shipped = {path.stem: path for path in shipped_devices()}
    if path.parent == Path() and path.name in shipped:
        return shipped[path.name]
    if path.exists():
        raise SpecError(f"{path}: a directory or a pipe, not a device profile")
    raise SpecError(
        f"no device profile {str(path)!r}{did_you_mean(path.name, list(shipped)) if shipped else ''}"
    )


def device_from(value: Any, where: str, name: str) -> Device:
    """The device profile that a YAML mapping describes. Raises SpecError beginning with `where`."""
    written = strict_yaml.checked(Written, value, where)
    ascending = {"prefill": written.prefill, "decode": written.decode}
    for codec, coding in written.codecs.items():
        ascending |= {f"codecs.{codec}.encode": coding.encode, f"codecs.{codec}.decode": coding.decode}
    for key, points in ascending.items():
        for number, ((before, _), (after, _)) in enumerate(itertools.pairwise(points), 1):
            if after <= before:
                raise SpecError(f"{where}: {key}[{number}]: {after} tokens behind {before}; they must ascend")
    called = written.name or name
    times = DeviceTimes(called, written.model, tuple(written.prefill), tuple(written.decode))
    codecs = tuple(CodecTimes(k, tuple(c.encode), tuple(c.decode)) for k, c in written.codecs.items())
    about = (called, written.device, written.dtype, written.basis, written.source)
    return Device(*about, times, codecs, tuple(written.copies.items()))
