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
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from testbed import lookup, strict_yaml
from testbed.errors import SpecError
from testbed.speed.times import DeviceTimes
from testbed.strict_yaml import did_you_mean
from testbed.units import exact_time, parse_time

_FOLDER = "devices"
_MOST_POINTS = 100

Basis = Literal["measured", "published"]


def _point(value: Any) -> tuple[int, float]:
    whole = isinstance(value, list) and len(value) == 2 and isinstance(value[0], int)
    if not whole or isinstance(value[0], bool) or not 1 <= value[0] <= 1 << 24:
        raise ValueError(f"{str(value)[:40]!r}: write [TOKENS, TIME], such as [512, 54.6ms]")
    seconds = parse_time(value[1])
    if not 0 < seconds <= 1e6:
        raise ValueError(f"{str(value)[:40]!r}: takes no time, or more than a device can")
    return value[0], seconds


_Text = Annotated[str, Field(min_length=1, max_length=2000)]
_Points = list[Annotated[tuple[int, float], BeforeValidator(_point)]]


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
    name: str | None = None


@dataclass(frozen=True)
class Device:
    """A device profile."""

    name: str
    device: str  #: what it is, for people
    dtype: str
    basis: Basis
    source: str
    times: DeviceTimes

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
        return "\n".join(lines) + "\n"


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
    for key in ("prefill", "decode"):
        for number, ((before, _), (after, _)) in enumerate(itertools.pairwise(getattr(written, key)), 1):
            if after <= before:
                raise SpecError(f"{where}: {key}[{number}]: {after} tokens behind {before}; they must ascend")
    called = written.name or name
    times = DeviceTimes(called, written.model, tuple(written.prefill), tuple(written.decode))
    return Device(called, written.device, written.dtype, written.basis, written.source, times)
