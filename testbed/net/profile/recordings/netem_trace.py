"""Models of netem-trace, which Rattan replays, as JSON or TOML: steps of bandwidth, delay or loss, and patterns of them.

    {"RepeatedBwPatternConfig": {"pattern": [{"StaticBwConfig": {"bw": "12Mbps", "duration": "1s"}}, …], "count": 0}}

A bandwidth is text, or ``{"gbps": 0, "bps": 12000000}``; a duration is text, or ``{"secs": 1, "nanos": 0}``. Models that draw
their values at random are refused: a run has to be the same again.
"""

from __future__ import annotations

import json
import re
import tomllib
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from testbed.errors import SpecError
from testbed.net.profile.recordings.recording import BYTE_ORDER_MARK, MAX_SECONDS, Samples

_MAX_BYTES, _MAX_STEPS, _DEEPEST = 64 << 20, 5_000_000, 16
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(?:bps|bit/s|bit)\s*", re.ASCII)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|µs|ms|s|m|min|h)", re.ASCII)
_SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_LIMITS = {"rates": 100e9 / 8, "delays": 60.0, "losses": 1.0}
_KINDS = {"Bw": ("rates", "bw"), "Delay": ("delays", "delay"), "Loss": ("losses", "loss")}
_MODEL = re.compile(r"(Static|Fixed|Trace|Repeated)(Bw|Delay|Loss)(?:Pattern)?Config")

Step = tuple[float, float]  #: seconds that it lasts, and its value


def is_model(first: bytes, path: Path) -> bool:
    """Whether a file that begins so, or is called so, is such a model."""
    return first.startswith(b"{") or (path.suffix == ".toml" and first.startswith(b"["))


def read_model(file: BinaryIO, path: Path) -> Samples:
    """The steps of the model in an open file, of all kinds that it has at its top. Raises SpecError."""
    data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise SpecError(f"trace {path}: a model of more than {_MAX_BYTES >> 20} MiB")
    try:
        text = data.removeprefix(BYTE_ORDER_MARK).decode()
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"trace {path}: {str(error).splitlines()[0]}") from None
    try:
        found = (
            [(name, model) for name, model in value.items() if _MODEL.fullmatch(name)]
            if isinstance(value, dict)
            else []
        )
        if len(found) != 1:
            raise SpecError(
                "expected one model of netem-trace, such as "
                '{"RepeatedBwPatternConfig": {"pattern": [{"StaticBwConfig": {"bw": "12Mbps", "duration": "1s"}}], "count": 0}}'
            )
        ((name, model),) = found
        column = _KINDS[_kind(name)][0]
        steps = list(islice(_steps(name, model, _kind(name), 0), _MAX_STEPS + 1))
        return _samples(steps, column)
    except SpecError as error:
        raise SpecError(f"trace {path}: {error}") from None


def _kind(name: str) -> str:
    match = _MODEL.fullmatch(name)
    if match is None:
        raise SpecError(
            f"{name[:60]!r} is no model that is read: there are Static…, Trace… and Repeated…PatternConfig of Bw, Delay and "
            "Loss; write one that draws at random out with netem-trace"
        )
    return match[2]


def _samples(steps: list[Step], column: str) -> Samples:
    if len(steps) > _MAX_STEPS:
        raise SpecError(f"more than {_MAX_STEPS} steps")
    times, values, at = array("d"), array("f"), 0.0
    for lasts, value in steps:
        if not 0 <= value <= _LIMITS[column]:
            raise SpecError(f"step {len(times) + 1}: its value is out of bounds")
        if lasts > 0:
            times.append(at)
            values.append(value)
            at += lasts
        if at > MAX_SECONDS:
            raise SpecError(f"longer than {MAX_SECONDS / 86400:g} days")
    if not times:
        raise SpecError("no step of it lasts")
    named: dict[str, Any] = {column: values}
    return Samples(times, at, **named)


def _steps(name: str, model: Any, kind: str, depth: int) -> Iterator[Step]:
    if _kind(name) != kind:
        raise SpecError(f"{name}: of another kind than the model around it")
    if not isinstance(model, dict) or depth > _DEEPEST:
        raise SpecError(f"{name}: expected a mapping, not so deep")
    key = _KINDS[kind][1]
    if name.startswith(("Static", "Fixed")):
        yield _seconds(_in(model, "duration", name)), _value(_in(model, key, name), kind)
    elif name.startswith("Trace"):
        for entry in _listed(_in(model, "pattern", name), name):
            lasts, held = (
                entry
                if isinstance(entry, list) and len(entry) == 2
                else _in({}, "[duration, [values]]", name)
            )
            for value in _listed(held, name):
                yield _seconds(lasts), _value(value, kind)
    else:
        count = model.get("count", 0)
        if not isinstance(count, int) or not 0 <= count <= _MAX_STEPS:
            raise SpecError(f"{name}: count is a whole number")
        for _ in range(count or 1):  # 0: for ever, as a trace is that loops
            for entry in _listed(_in(model, "pattern", name), name):
                if not isinstance(entry, dict) or len(entry) != 1:
                    raise SpecError(f"{name}: pattern has models, each a mapping of its name")
                ((inner, own),) = entry.items()
                yield from _steps(str(inner), own, kind, depth + 1)


def _in(model: dict[str, Any], key: str, name: str) -> Any:
    if key not in model:
        raise SpecError(f"{name}: {key} is missing")
    return model[key]


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise SpecError(f"{name}: expected a list")
    return value


def _value(value: Any, kind: str) -> float:
    if kind == "Bw":
        return _rate(value) / 8
    if kind == "Delay":
        return _seconds(value)
    losses = value if isinstance(value, list) else [value]
    if len(losses) != 1 or not isinstance(losses[0], int | float):
        raise SpecError(
            "a loss that depends on the packets before it is no trace's; write loss=gilbert(…) in the profile"
        )
    return float(losses[0])


def _rate(value: Any) -> float:
    """Bits per second."""
    if (
        isinstance(value, dict)
        and set(value) <= {"gbps", "bps"}
        and all(isinstance(v, int | float) for v in value.values())
    ):
        return float(value.get("gbps", 0)) * 1e9 + float(value.get("bps", 0))
    match = _RATE.fullmatch(value) if isinstance(value, str) and len(value) < 40 else None
    if match is None:
        raise SpecError(f"{str(value)[:40]!r} is no bandwidth, such as 12Mbps")
    return float(match[1]) * _SCALES[match[2]]


def _seconds(value: Any) -> float:
    if (
        isinstance(value, dict)
        and set(value) <= {"secs", "nanos"}
        and all(isinstance(v, int | float) for v in value.values())
    ):
        return float(value.get("secs", 0)) + float(value.get("nanos", 0)) * 1e-9
    if (
        isinstance(value, str)
        and len(value) < 80
        and not _DURATION.sub("", value).strip()
        and _DURATION.search(value)
    ):
        return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(value))
    raise SpecError(f"{str(value)[:40]!r} is no duration, such as 1s or 10ms")
