"""A link that changes over time, as a description: what a profile says in place of a rate.

The text forms, wherever a direction of a profile is written (see `testbed.net.profile`)::

    trace:FILE                              a recording (`testbed.net.profile.recordings`), for each way its own columns
    step:50mbit*10s+5mbit*5s                rates one after the other
    sine:10mbit..50mbit*20s                 a rate that swings
    outage:5s@10s    outage:5s@10s/60s      nothing for 5 s, 10 s from the beginning; and so every 60 s
    flap:10s/1s                             up for 10 s, down for 1 s

each with options: ``trace:FILE(scale=0.5,offset=10s,end=hold,column=down)``. The others stand beside fixed conditions:
``delay=20ms,queue=100ms,trace:FILE`` or ``rate=50mbit,delay=20ms,outage:5s@10s``.

A description reads no file until `Trace.schedule` or `Trace.recording` is asked for, so what names a file that is gone can
still be printed, compared and taken down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from testbed import lookup
from testbed.errors import SpecError, UnitError
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.generators import Flap, Outage, Sine, Step
from testbed.net.profile.recordings.columns import parse_columns
from testbed.net.profile.recordings.files import Layout, read_recording
from testbed.net.profile.recordings.recording import (
    MAX_SECONDS,
    OPPORTUNITY_BYTES,
    DeliveryTimes,
    Recording,
    Samples,
)
from testbed.net.profile.schedule import Schedule
from testbed.strict_yaml import did_you_mean
from testbed.units import exact_time, format_rate, format_time, parse_time

Way = Literal["up", "down"]
WAYS: tuple[Way, ...] = ("up", "down")
"""Of a link: from its first-named node to its second, and back."""
_SHIPPED = Path(__file__).parents[2] / "scenarios"
_COLUMNS = {"up": "up", "ul": "up", "down": "down", "dl": "down"}
_UNWRITABLE = set(",;()\n\r\t")
_MAX_SCALE = 1e6
_SHORT_S = 1.0


class File(msgspec.Struct, frozen=True, tag="file"):
    """A recording, by the path of its file: as written. *at*: where it is, as was found beside the file that names it
    (`testbed.lookup`); else it is looked for from the working directory, and among the shipped scenarios."""

    path: str
    at: str = ""
    kind: ClassVar[str] = "trace"

    @classmethod
    def parse(cls, text: str) -> File:
        if not text or _UNWRITABLE & set(text):
            raise SpecError(
                f"{text[:40]!r} cannot be a trace's file: give one without brackets, commas and semicolons"
            )
        return cls(text, lookup.find(text))

    def __str__(self) -> str:
        return f"trace:{self.path}"

    def found(self) -> Path:
        """Where the file is. Raises SpecError where it is not."""
        if self.at:
            return Path(self.at)  # `read_recording` says if it has gone
        for path in (Path(self.path), _SHIPPED / self.path):
            if path.exists():
                return path
        raise SpecError(f"trace {self.path}: no such file")


_KINDS: dict[str, type[File | Step | Sine | Outage | Flap]] = {
    kind.kind: kind for kind in (File, Step, Sine, Outage, Flap)
}


@dataclass(frozen=True)
class Trace:
    """A recording or a rule, and how it is used.

    *scale* multiplies rates (of deliveries: what one carries); *offset_s*: where in it to start; *end*: whether it begins
    again or its last values hold; *column*: the way whose columns of the file are used, empty for the direction's own;
    *columns*, *every_s*, *skip*: how the file is read (`recordings.files.Layout`).
    """

    source: File | Step | Sine | Outage | Flap
    scale: float = 1.0
    offset_s: float = 0.0
    end: Literal["loop", "hold"] = "loop"
    column: Literal["", "up", "down"] = ""
    columns: str = ""
    every_s: float = 0.0
    skip: Literal["", "idle"] = ""

    def __post_init__(self) -> None:
        said = {"columns": self.columns, "every": self.every_s, "skip": self.skip}
        if any(said.values()) and not isinstance(self.source, File):
            raise SpecError(
                f"{next(key for key, value in said.items() if value)}: of a file, and {self.source} is none"
            )
        if self.every_s and not self.columns:
            raise SpecError("every: says how far rows without a time are apart, whose columns= are said")

    def __str__(self) -> str:
        scale = f"{self.scale:g}" if float(f"{self.scale:g}") == self.scale else repr(self.scale)
        options = {
            "scale": "" if self.scale == 1 else scale,
            "offset": exact_time(self.offset_s) if self.offset_s else "",
            "end": "" if self.end == "loop" else self.end,
            "column": self.column,
            "columns": self.columns,
            "every": exact_time(self.every_s) if self.every_s else "",
            "skip": self.skip,
        }
        written = ",".join(f"{key}={value}" for key, value in options.items() if value)
        return str(self.source) + (f"({written})" if written else "")

    @property
    def sets_rate(self) -> bool:
        """Whether a fixed rate beside it would be a contradiction, as far as is known without reading a file."""
        return isinstance(self.source, (Step, Sine))

    @property
    def may_set_rate(self) -> bool:
        """Whether it gives the rate, or is a file that may."""
        return self.sets_rate or isinstance(self.source, File)

    def recording(self, way: Way, rate_bps: float | None) -> Recording:
        """What changes over one way's time. Raises SpecError where the file is missing or wrong, or has a rate where
        *rate_bps* is given, too."""
        if not isinstance(self.source, File):
            return self.source.samples(rate_bps)
        layout = Layout(self.columns, self.every_s, self.skip)
        recording = read_recording(self.source.found(), self.column or way, layout)
        if rate_bps is not None and (isinstance(recording, DeliveryTimes) or recording.rates is not None):
            raise SpecError(f"{self}: it gives the rate; leave rate= away, or change it with scale")
        return recording

    def schedule(self, way: Way, rate_bps: float | None, origin_s: float = 0.0) -> Schedule | Deliveries:
        """What an emulator follows from *origin_s* on; `recording` says what is raised, and so does an option that cannot be."""
        recording = self.recording(way, rate_bps)
        if isinstance(recording, DeliveryTimes):
            if self.end == "hold":
                raise SpecError(f"{self}: packet deliveries have no last value to hold; they can loop")
            return Deliveries(
                recording.times_ms, OPPORTUNITY_BYTES * self.scale, offset_s=self.offset_s, origin_s=origin_s
            )
        return Schedule(
            recording.times,
            recording.length_s,
            rates=recording.rates,
            delays=recording.delays,
            losses=recording.losses,
            loaded_delays=recording.loaded_delays,
            scale=self.scale,
            loop=self.end == "loop" and not self._once,
            offset_s=self.offset_s,
            origin_s=origin_s,
        )

    @property
    def _once(self) -> bool:
        """Whether it is an outage that does not come again: it is over soon, and what it interrupts goes on for good."""
        return isinstance(self.source, Outage) and self.source.every_s is None

    def rates_bps(self, way: Way, rate_bps: float | None) -> tuple[float | None, float | None]:
        """The mean (see `means`) and the largest rate, bits per second; None: not limited, or no business of this trace's.

        One outage that does not come again is left out of the mean: over a long time it is nothing.
        """
        recording = self.recording(way, rate_bps)
        if isinstance(recording, DeliveryTimes):
            return recording.mean_rate * 8 * self.scale, recording.peak_rate * 8 * self.scale
        if recording.rates is None or recording.peak_rate == float("inf"):
            return rate_bps, rate_bps
        peak = recording.peak_rate * 8 * self.scale
        return peak if self._once else self._mean(recording, "rates") * 8 * self.scale, peak

    def means(self, way: Way, rate_bps: float | None) -> dict[str, float]:
        """The mean ``delays`` (seconds) and ``losses`` (fractions) of what gives them, weighted by time: over the whole trace
        where it loops, over what there is from the offset on where its last values hold in the end."""
        recording = self.recording(way, rate_bps)
        columns = [name for name in ("delays", "losses") if getattr(recording, name, None) is not None]
        return {name: self._mean(recording, name) for name in columns if isinstance(recording, Samples)}

    def _mean(self, recording: Samples, column: str) -> float:
        return recording.mean(column, 0.0 if self.end == "loop" else self.offset_s)

    def remarks(self, way: Way, rate_bps: float | None) -> list[str]:
        """What is to be seen before a recording is used: its length, its mean rate, and what is odd. Nothing of a rule."""
        if not isinstance(self.source, File):
            return []
        recording, rate = self.recording(way, rate_bps), self.rates_bps(way, rate_bps)[0]
        remark = f"{self}: {format_time(recording.length_s)} long"
        remark += "" if rate is None else f", {format_rate(rate)} on average"
        if isinstance(recording, Samples) and recording.idle_rows:
            share = recording.idle_rows / len(recording.times)
            remark += f"; {recording.idle_rows} of its rows ({share:.0%}) were taken while idle or pinging: "
            remark += "skip=idle leaves them out"
        if isinstance(recording, DeliveryTimes) and recording.length_s < _SHORT_S:
            return [
                f"{remark}; shorter than a second, again and again: are these delays, and no times of deliveries? They are "
                f"trace:{self.source.path}(columns=delay_ms,every=10ms)"
            ]
        return [
            remark + ("; shorter than a second, again and again" if recording.length_s < _SHORT_S else "")
        ]


def is_trace(text: str) -> bool:
    """Whether this text is meant to be a trace: it begins with a kind's name and a colon."""
    return text.partition(":")[0].strip() in _KINDS and ":" in text


def parse_trace(text: str) -> Trace:
    """The trace a text stands for; without a kind's name in front it is a file. Raises SpecError."""
    text = text.strip()
    if not is_trace(text):
        text = f"trace:{text}"
    kind, _, rest = text.partition(":")
    fields: dict[str, Any] = {}
    if rest.rstrip().endswith(")"):
        rest, bracket, inside = rest.rstrip().removesuffix(")").partition("(")
        if not bracket:
            raise SpecError(f"{text[:60]!r}: a bracket is missing")
        fields = _fields(inside)
    return Trace(_KINDS[kind.strip()].parse(rest.strip()), **fields)


def _fields(text: str) -> dict[str, Any]:
    """The fields of a `Trace` that options stand for. Raises SpecError."""
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise SpecError(f"{part.strip()[:40]!r} is not key=value, such as scale=0.5")
        if key not in _OPTIONS:
            raise SpecError(f"a trace has no option {key[:40]!r}" + did_you_mean(key[:40], list(_OPTIONS)))
        field, read = _OPTIONS[key]
        if field in fields:
            raise SpecError(f"{key!r} is given twice")
        fields[field] = read(value)
    return fields


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        raise SpecError(f"scale {text[:20]!r} is no number") from None
    if not 1 / _MAX_SCALE <= scale <= _MAX_SCALE:  # also false for NaN
        raise SpecError(f"scale {text[:20]} lies outside {1 / _MAX_SCALE:g}..{_MAX_SCALE:g}")
    return scale


def _offset(text: str) -> float:
    try:
        seconds = parse_time(text)
    except UnitError as error:
        raise SpecError(f"offset: {error}") from None
    if seconds > MAX_SECONDS:
        raise SpecError(f"offset {text} is more than {MAX_SECONDS / 86400:g} days")
    return seconds


def _end(text: str) -> str:
    if text not in ("loop", "hold"):
        raise SpecError(f"end={text[:20]}: a trace's end is loop or hold")
    return text


def _column(text: str) -> str:
    if text.lower() not in _COLUMNS:
        raise SpecError(f"column={text[:20]}: it is up (ul) or down (dl)")
    return _COLUMNS[text.lower()]


def _columns_of(text: str) -> str:
    parse_columns(text)
    return text


def _every(text: str) -> float:
    seconds = _offset(text)
    if not 1e-6 <= seconds <= 86400:
        raise SpecError(f"every={text[:20]}: rows are from 1us to a day apart")
    return seconds


def _skip(text: str) -> str:
    if text != "idle":
        raise SpecError(f"skip={text[:20]}: what can be left out is idle")
    return text


_OPTIONS: dict[str, tuple[str, Callable[[str], float | str]]] = {
    "scale": ("scale", _scale),
    "offset": ("offset_s", _offset),
    "end": ("end", _end),
    "column": ("column", _column),
    "columns": ("columns", _columns_of),
    "every": ("every_s", _every),
    "skip": ("skip", _skip),
}
"""As it is written -> the field of a `Trace`, and how it is read."""
