"""Profiles as text and as YAML.

Four forms are understood wherever a profile is named::

    5g-mid                                                  a preset (`testbed.net.profile.presets`)
    rate=50mbit,delay=20ms,jitter=2ms,loss=1%,queue=1bdp    the same both ways; every key may be left out
    up:rate=10mbit,delay=30ms;down:5g-mid                   each way on its own; a preset gives that half
    measured                                                a link between hosts, as it is
    trace:FILE    delay=20ms,sine:5mbit..50mbit*20s         what changes over time; see `testbed.net.profile.trace`

*up* runs from a link's first-named node to its second. `str` of a profile reads back as an equal profile.

Behind ``jitter=``, ``loss=`` and ``queue=`` stands a plain value, or a model with arguments::

    2ms   pareto(2ms)   normal(2ms,reorder)   table(2ms,file=lte.dist)
    1%    correlated(1%,25%)   gilbert(1%,burst=4)   gilbert(p=1%,r=25%,1-h=80%,1-k=0.1%)   states(p13=1%,p31=20%,…)
    1bdp  codel(1bdp,target=5ms,interval=100ms)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from testbed.errors import SpecError, UnitError
from testbed.net.profile.conditions import (
    INLINE_SOURCE,
    MEASURED,
    MIN_QUEUE_BYTES,
    MTU,
    CoDel,
    Direction,
    Profile,
    Queue,
    split_conditions,
)
from testbed.net.profile.jitter import LAWS, read_table
from testbed.net.profile.loss import FourState, GilbertElliott
from testbed.net.profile.presets import PRESETS
from testbed.net.profile.trace import WAYS, Way, is_trace, parse_trace
from testbed.strict_yaml import did_you_mean
from testbed.units import parse_percentage, parse_rate, parse_size, parse_time

__all__ = [
    "INLINE_SOURCE",
    "MEASURED",
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


_QUEUE = re.compile(r"\s*([0-9.eE+-]+)\s*(bdp|packets|p)\s*$", re.IGNORECASE)
_CALL = re.compile(r"\s*([A-Za-z0-9_-]+)\s*\(([^()]*)\)\s*$")

Values = dict[str, Any]
"""Fields of a `Direction`."""


class Call:
    """``name(first,key=value,flag)``, taken apart; raises SpecError for what is left when it is `done`."""

    def __init__(self, name: str, arguments: str) -> None:
        self.name = name
        self._plain: list[str] = []
        self._named: dict[str, str] = {}
        for part in (piece.strip() for piece in arguments.split(",")):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not part or (equals and not (key and value)) or key in self._named:
                raise SpecError(f"{name}({arguments[:40]}): {part[:40]!r} is no argument, or given twice")
            if equals:
                self._named[key] = value
            else:
                self._plain.append(part)

    def first(self, key: str, read: Callable[[str], Any]) -> Any:
        """The leading argument, which may also be given by name; None where it is missing."""
        if key in self._named:
            return self.named(key, read)
        return self._read(key, self._plain.pop(0), read) if self._plain else None

    def named(self, key: str, read: Callable[[str], Any], default: Any = None) -> Any:
        """The argument ``key=…``, or the default."""
        return self._read(key, self._named.pop(key), read) if key in self._named else default

    def flag(self, word: str) -> bool:
        """Whether the bare word stands there."""
        present = word in self._plain
        self._plain = [item for item in self._plain if item != word]
        return present

    def done(self, *known: str) -> None:
        """Nothing else may have been written."""
        for left in [*self._named, *self._plain]:
            raise SpecError(
                f"{self.name}(…): unknown argument {left[:40]!r}" + did_you_mean(left, list(known))
            )

    def missing(self, what: str) -> SpecError:
        """An error that shows how it is written."""
        return SpecError(f"{self.name}(…): write it as {what}")

    def _read(self, key: str, value: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(value)
        except UnitError as error:
            raise SpecError(f"{self.name}(…): {key}: {error}") from None


def _call(value: Any) -> Call | None:
    match = _CALL.match(value) if isinstance(value, str) else None
    return Call(match[1], match[2]) if match else None


def parse_queue(text: str | float) -> Queue:
    """``100ms``, ``64kb``, ``100p`` (full packets), ``2bdp``, or ``codel(…)`` around one of them. Raises SpecError."""
    call = _call(text)
    if call is not None:
        if call.name != "codel":
            raise SpecError(f"queue {call.name!r}(…) is unknown; use codel(1bdp,target=5ms,interval=100ms)")
        size = call.first("size", parse_queue) or Queue()
        defaults = CoDel()
        target = call.named("target", parse_time, defaults.target_s)
        interval = call.named("interval", parse_time, defaults.interval_s)
        call.done("size", "target", "interval")
        if size.codel is not None:
            raise call.missing("codel(1bdp,target=5ms,interval=100ms)")
        return replace(size, codel=CoDel(target, interval))
    match = _QUEUE.match(text) if isinstance(text, str) else None
    if match:
        try:
            amount = float(match[1])
        except ValueError:
            raise SpecError(f"queue {text!r}: {match[1]!r} is no number") from None
        return Queue(amount, "bdp" if match[2].lower() == "bdp" else "packets")
    if isinstance(text, int | float) and not isinstance(text, bool) and text:
        raise SpecError(
            f"queue {text!r} has no unit; write it with one, as 100ms, 64kb, 100p (packets) or 1bdp"
        )
    if isinstance(text, str):
        for read, unit in ((parse_size, "bytes"), (parse_time, "s")):
            try:
                amount = read(text)
            except UnitError:
                continue
            return Queue(float(amount), unit)  # type: ignore[arg-type]
    raise SpecError(f"queue {str(text)[:40]!r}: write it as 100ms, 64kb, 100p (packets) or 1bdp")


def parse_jitter(value: Any) -> Values:
    """``2ms`` or ``law(2ms)``, with ``reorder`` where packets may overtake. Raises SpecError or UnitError."""
    call = _call(value)
    if call is None:
        return {"jitter_s": parse_time(value)}
    if call.name not in (*LAWS, "table"):
        raise SpecError(
            f"jitter law {call.name[:40]!r} is unknown" + did_you_mean(call.name, [*LAWS, "table"])
        )
    spread = call.first("spread", parse_time)
    file = call.named("file", str) if call.name == "table" else None
    reorders = call.flag("reorder")
    call.done("spread", "file", "reorder")
    if spread is None or (call.name == "table" and file is None):
        raise call.missing("table(2ms,file=FILE)" if call.name == "table" else f"{call.name}(2ms)")
    law = call.name if file is None else read_table(file)
    return {"jitter_s": spread, "jitter_law": law, "jitter_reorders": reorders}


def parse_loss(value: Any) -> Values:
    """``1%``, or a model of `testbed.net.profile.loss`. Raises SpecError or UnitError."""
    call = _call(value)
    if call is None:
        return {"loss": parse_percentage(value)}
    makers = {"correlated": _correlated, "gilbert": _gilbert, "states": _states}
    if call.name not in makers:
        raise SpecError(f"loss model {call.name[:40]!r} is unknown" + did_you_mean(call.name, list(makers)))
    return {"loss_model": makers[call.name](call)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{text[:40]!r} is no number") from None


def _correlated(call: Call) -> GilbertElliott:
    mean = call.first("mean", parse_percentage)
    correlation = call.first("correlation", parse_percentage)
    call.done("mean", "correlation")
    if mean is None or correlation is None:
        raise call.missing("correlated(1%,25%)")
    return GilbertElliott.correlated(mean, correlation)


def _gilbert(call: Call) -> GilbertElliott:
    mean, burst = call.first("mean", parse_percentage), call.named("burst", _number)
    p, r = call.named("p", parse_percentage), call.named("r", parse_percentage)
    bad, good = call.named("1-h", parse_percentage), call.named("1-k", parse_percentage)
    call.done("mean", "burst", "p", "r", "1-h", "1-k")
    measured, chain = (mean, burst), (p, r)
    if None not in measured and {p, r, bad, good} == {None}:
        return GilbertElliott.bursty(mean, burst)
    if None not in chain and measured == (None, None):
        return GilbertElliott(p, r, 1.0 if bad is None else bad, good or 0.0)
    raise call.missing("gilbert(1%,burst=4), or as gilbert(p=0.25%,r=25%,1-h=100%,1-k=0%)")


def _states(call: Call) -> FourState:
    defaults = {"p32": 0.0, "p23": 1.0, "p14": 0.0}
    names = ("p13", "p31", "p32", "p23", "p14")
    values = {name: call.named(name, parse_percentage, defaults.get(name)) for name in names}
    call.done(*names)
    if None in values.values():
        raise call.missing("states(p13=1%,p31=20%,p32=10%,p23=30%,p14=0.1%); the last three may be left out")
    return FourState(**values)


def parse_integer(value: Any) -> int:
    """A whole number, as text or as YAML has it. Raises SpecError."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 19:
        raise SpecError(f"{text[:40]!r} is no whole number")
    return int(text)


def parse_switch(value: Any) -> bool:
    """``yes`` or ``no``; YAML's own true and false. Raises SpecError."""
    if isinstance(value, bool):
        return value
    if str(value).strip().lower() in ("yes", "no"):
        return str(value).strip().lower() == "yes"
    raise SpecError(f"{str(value)[:40]!r}: write yes or no")


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


def _half(text: str, way: Way) -> Direction:
    if _is_inline(text):
        return _inline(text)
    return _preset(text).ways[way]


def _profile(up: Direction, down: Direction) -> Profile:
    nameless = Profile("", up, down)
    return Profile(nameless.text(), up, down)


def parse_profile(text: str) -> Profile:
    """The profile a text stands for: ``preset``, ``rate=…,delay=…`` or ``up:…;down:…``. Raises SpecError."""
    if len(text) > _MAX_TEXT:
        raise SpecError(f"profile {text[:20]!r}…: longer than {_MAX_TEXT} characters")
    stripped = text.strip()
    if stripped == MEASURED.name:
        return MEASURED
    try:
        if ";" not in stripped and not stripped.startswith(("up:", "down:")):
            if not _is_inline(stripped):
                return _preset(stripped)
            both = _inline(stripped)
            return _profile(both, both)
        halves: dict[Way, Direction] = {}
        for part in stripped.split(";"):
            written, colon, rest = part.partition(":")
            way = next((way for way in WAYS if way == written.strip()), None)
            if way is None or not colon or way in halves:
                raise SpecError("write the two ways as up:…;down:…, each once")
            halves[way] = _half(rest.strip(), way)
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


def _way_from(value: Any, way: Way) -> Direction:
    try:
        if isinstance(value, str):
            return _half(value, way)
        if isinstance(value, Mapping):
            return _direction(value)
        raise SpecError("expected a preset's name, key=value text, or a mapping")
    except SpecError as error:
        raise SpecError(f"{way}: {error}") from None
