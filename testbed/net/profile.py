"""Profiles as text and as YAML.

Three forms are understood wherever a profile is named::

    5g-mid                                                  a preset (`testbed.net.presets`)
    rate=50mbit,delay=20ms,jitter=2ms,loss=1%,queue=1bdp    the same both ways; every key may be left out
    up:rate=10mbit,delay=30ms;down:5g-mid                   each way on its own; a preset gives that half

*up* runs from a link's first-named node to its second. `str` of a profile reads back as an equal profile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from testbed.errors import SpecError, UnitError
from testbed.net.conditions import INLINE_SOURCE, MIN_QUEUE_BYTES, MTU, Direction, Profile, Queue
from testbed.net.presets import PRESETS
from testbed.net.strict_yaml import did_you_mean
from testbed.units import parse_fraction, parse_rate, parse_size, parse_time

__all__ = [
    "INLINE_SOURCE",
    "MIN_QUEUE_BYTES",
    "MTU",
    "PRESETS",
    "Direction",
    "Profile",
    "Queue",
    "parse_profile",
    "parse_queue",
    "profile_from",
]

_MAX_TEXT = 1000
_QUEUE = re.compile(r"\s*([0-9.eE+-]+)\s*(bdp|packets|p)\s*$", re.IGNORECASE)


def parse_queue(text: str | float) -> Queue:
    """``100ms``, ``64kb``, ``100p`` (packets of 1500 bytes) or ``2bdp``. Raises SpecError."""
    match = _QUEUE.match(text) if isinstance(text, str) else None
    if match:
        try:
            amount = float(match[1])
        except ValueError:
            raise SpecError(f"queue {text!r}: {match[1]!r} is no number") from None
        return Queue(amount, "bdp" if match[2].lower() == "bdp" else "packets")
    if isinstance(text, str):
        for read, unit in ((parse_size, "bytes"), (parse_time, "s")):
            try:
                amount = read(text)
            except UnitError:
                continue
            return Queue(float(amount), unit)  # type: ignore[arg-type]
    raise SpecError(f"queue {str(text)[:40]!r}: write it as 100ms, 64kb, 100p (packets) or 1bdp")


_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "rate": ("rate_bps", parse_rate),
    "delay": ("delay_s", parse_time),
    "jitter": ("jitter_s", parse_time),
    "loss": ("loss", parse_fraction),
    "queue": ("queue", parse_queue),
}


def _direction(settings: Mapping[str, Any]) -> Direction:
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in _READERS:
            raise SpecError(f"unknown key {str(key)[:40]!r}" + did_you_mean(str(key), list(_READERS)))
        name, read = _READERS[key]
        try:
            values[name] = read(value)
        except UnitError as error:
            raise SpecError(f"{key}: {error}") from None
    if not values:
        raise SpecError("no conditions given; write for example rate=50mbit,delay=20ms")
    return Direction(**values)


def _inline(text: str) -> Direction:
    settings: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise SpecError(f"{part.strip()[:40]!r} is not key=value, such as rate=50mbit")
        if key in settings:
            raise SpecError(f"{key[:40]!r} is given twice")
        settings[key] = value
    return _direction(settings)


def _preset(text: str) -> Profile:
    if text not in PRESETS:
        raise SpecError(
            f"unknown profile {text[:40]!r}" + did_you_mean(text, list(PRESETS)) + " (see `testbed profiles`)"
        )
    return PRESETS[text]


def _half(text: str, way: str) -> Direction:
    if "=" in text:
        return _inline(text)
    return getattr(_preset(text), way)


def _profile(up: Direction, down: Direction) -> Profile:
    nameless = Profile("", up, down)
    return Profile(nameless.text(), up, down)


def parse_profile(text: str) -> Profile:
    """The profile a text stands for: ``preset``, ``rate=…,delay=…`` or ``up:…;down:…``. Raises SpecError."""
    if len(text) > _MAX_TEXT:
        raise SpecError(f"profile {text[:20]!r}…: longer than {_MAX_TEXT} characters")
    stripped = text.strip()
    try:
        if ";" not in stripped and not stripped.startswith(("up:", "down:")):
            if "=" not in stripped:
                return _preset(stripped)
            both = _inline(stripped)
            return _profile(both, both)
        halves: dict[str, Direction] = {}
        for part in stripped.split(";"):
            way, colon, rest = (piece.strip() for piece in part.partition(":"))
            if way not in ("up", "down") or not colon or way in halves:
                raise SpecError("write the two ways as up:…;down:…, each once")
            halves[way] = _half(rest, way)
        if len(halves) < 2:
            raise SpecError("one way is missing; write both, as up:…;down:…")
        return _profile(halves["up"], halves["down"])
    except SpecError as error:
        if str(error).startswith("unknown profile"):
            raise
        raise SpecError(f"profile {stripped[:60]!r}: {error}") from None


def profile_from(value: Any, where: str) -> Profile:
    """A profile out of YAML: text as for `parse_profile`, ``{rate: …, delay: …}`` or ``{up: …, down: …}``.

    Raises SpecError that begins with `where`.
    """
    try:
        if isinstance(value, str):
            return parse_profile(value)
        if not isinstance(value, Mapping):
            raise SpecError("expected a profile: a preset's name, key=value text, or a mapping")
        if "up" not in value and "down" not in value:
            both = _direction(value)
            return _profile(both, both)
        if set(value) != {"up", "down"}:
            raise SpecError("give both ways and nothing else: up and down")
        return _profile(_way_from(value["up"], "up"), _way_from(value["down"], "down"))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _way_from(value: Any, way: str) -> Direction:
    try:
        if isinstance(value, str):
            return _half(value, way)
        if isinstance(value, Mapping):
            return _direction(value)
        raise SpecError("expected a preset's name, key=value text, or a mapping")
    except SpecError as error:
        raise SpecError(f"{way}: {error}") from None
