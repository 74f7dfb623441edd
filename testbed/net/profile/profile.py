"""Profiles as text and as YAML.

Four forms are understood wherever a profile is named::

    5g-mid                                                  a preset (`testbed.net.profile.presets`)
    rate=50mbit,delay=20ms,jitter=2ms,loss=1%,queue=1bdp    the same both ways; every key may be left out
    up:rate=10mbit,delay=30ms;down:5g-mid                   each way on its own; a preset gives that half
    trace:FILE    delay=20ms,sine:5mbit..50mbit*20s         what changes over time; see `testbed.net.profile.trace`

Some keys take models with arguments, such as ``loss=gilbert(1%,burst=4)``: see `testbed.net.profile.profile_values`.

*up* runs from a link's first-named node to its second. `str` of a profile reads back as an equal profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from testbed.errors import SpecError, UnitError
from testbed.net.profile.conditions import INLINE_SOURCE, MTU, Direction, Profile, split_conditions
from testbed.net.profile.presets import PRESETS
from testbed.net.profile.profile_values import (
    Values,
    parse_integer,
    parse_jitter,
    parse_loss,
    parse_queue,
    parse_switch,
)
from testbed.net.profile.queues import MIN_QUEUE_BYTES, Queue
from testbed.net.profile.trace import is_trace, parse_trace
from testbed.strict_yaml import did_you_mean
from testbed.units import parse_percentage, parse_rate, parse_size, parse_time

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
_READERS: dict[str, Callable[[Any], Values]] = {
    "rate": lambda value: {"rate_bps": parse_rate(value)},
    "delay": lambda value: {"delay_s": parse_time(value)},
    "jitter": parse_jitter,
    "loss": parse_loss,
    "queue": lambda value: {"queue": parse_queue(value)},
    "duplicate": lambda value: {"duplicate": parse_percentage(value)},
    "corrupt": lambda value: {"corrupt": parse_percentage(value)},
    "reorder": lambda value: {"reorder": parse_percentage(value)},
    "ecn": lambda value: {"ecn": parse_switch(value)},
    "overhead": lambda value: {"overhead_bytes": parse_size(value)},
    "mtu": lambda value: {"mtu": parse_integer(value)},
    "seed": lambda value: {"seed": parse_integer(value)},
    "trace": lambda value: {"trace": parse_trace(str(value))},
}
"""Key -> the fields of a `Direction` that its value stands for; raises SpecError or UnitError."""


def _direction(settings: Mapping[str, Any]) -> Direction:
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in _READERS:
            raise SpecError(f"unknown key {str(key)[:40]!r}" + did_you_mean(str(key), list(_READERS)))
        try:
            values |= _READERS[key](value)
        except UnitError as error:
            raise SpecError(f"{key}: {error}") from None
        except SpecError as error:
            raise SpecError(str(error) if key in str(error) else f"{key}: {error}") from None
    if not values:
        raise SpecError("no conditions given; write for example rate=50mbit,delay=20ms")
    return Direction(**values)


def _inline(text: str) -> Direction:
    settings: dict[str, str] = {}
    for part in split_conditions(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if is_trace(part):
            key, equals, value = "trace", "=", part
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


def _is_inline(text: str) -> bool:
    return "=" in text or is_trace(text)


def _half(text: str, way: str) -> Direction:
    if _is_inline(text):
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
            if not _is_inline(stripped):
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
