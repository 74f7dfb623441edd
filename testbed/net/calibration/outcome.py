"""What a calibration found, as calibration.json has it: checks with units and tolerances, curves and tracks of traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from testbed.errors import TestbedError
from testbed.net.profile.trace import Way
from testbed.units import format_fraction, format_rate, format_size, format_time, parse_fraction, parse_time

_Kind = TypeVar("_Kind", "Check", "Curve", "Track")
_SHOWN: dict[str, Callable[[float], str]] = {
    "rate": format_rate,
    "delay": format_time,
    "loss": format_fraction,
    "jitter": format_time,
    "jitter distribution": lambda distance: f"{distance:.3f}",
    "round trip": format_time,
    "burst": lambda packets: f"{packets:.3g}",
    "delay trace": format_time,
    "loss trace": format_fraction,
    "loss shape": lambda square: f"{square:.2f}",
    "rate shape": lambda correlation: f"{correlation:.4f}",
    "rate trace": format_size,
}
_RELATIVE = ("rate", "rate trace", "jitter", "burst")  # whose error is a fraction of what is asked
_FORMER = {"law": "jitter distribution", "curve": "rate shape", "total": "rate trace"}
"""What checks were called in records of up to November 2026."""


#: The tolerance of what nothing is asked of.
RECORDED = "recorded"


@dataclass(frozen=True)
class Check:
    """One figure of one way. Rates in bits per second, delays in seconds, losses as fractions."""

    way: str
    what: str
    """"rate", "delay", "loss"; "round trip" (of both ways); "jitter" (standard deviation), "jitter distribution" (distance from
    it), "burst" (packets). Of a trace: "rate shape" (correlation), "rate trace" (bytes), "delay trace" (seconds off), "loss
    trace", "loss shape" (chi-square a degree of freedom)."""
    asked: float | None  # None: no limit
    measured: float | None = None  # None: nothing arrived
    low: float | None = None  # 99 % interval of what was measured
    high: float | None = None
    n: int = 0  # probe packets behind it
    ok: bool | None = None  # None: reported, not judged
    tolerance: str = ""
    p99: float | None = None  # of the delay

    def __str__(self) -> str:
        line = self.line()
        return f"{self.way} {self.what} {line['measured']} instead of {line['asked']}"

    @property
    def relative(self) -> bool:
        """Whether its error is a fraction of what is asked."""
        return self.what in _RELATIVE

    @property
    def band(self) -> tuple[float, float] | None:
        """What its error may be, as it was judged: of a delay in seconds, relative ones as fractions; None of any other."""
        try:
            if self.relative:
                most = parse_fraction(self.tolerance.lstrip("±"))
                return -most, most
            return (0.0, parse_time(self.tolerance.lstrip("+"))) if self.what == "delay" else None
        except TestbedError:
            return None

    @property
    def _nothing_asked(self) -> str:
        return "as it is" if self.tolerance.startswith(RECORDED) else "no limit"

    def line(self) -> dict[str, object]:
        """The figure as text: ``asked``, ``measured``, ``error``; with ``way``, ``what``, ``ok``."""
        show = _SHOWN.get(self.what, str)
        error = ""
        if self.asked is not None and self.measured is not None:
            off = self.measured - self.asked
            sign = "-" if off < 0 else "+"
            relative = self.what in _RELATIVE and self.asked > 0
            error = f"{100 * off / self.asked:+.2f}%" if relative else sign + show(abs(off))
        return {
            "way": self.way,
            "what": self.what,
            "asked": self._nothing_asked if self.asked is None else show(self.asked),
            "measured": "nothing arrived" if self.measured is None else show(self.measured),
            "error": error,
            "ok": self.ok is not False,
        }


@dataclass(frozen=True)
class Curve:
    """Bytes of the network layer in equal parts of one stretch of the trace, as asked and as delivered."""

    way: Way
    begin_s: float  # in the trace, after its offset
    bin_s: Annotated[float, msgspec.Meta(gt=0)]
    asked_bytes: tuple[float, ...]
    delivered_bytes: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_columns(self.asked_bytes, self.delivered_bytes)

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where the trace is as good as constant: what is left then is the packets' grain."""
        n = len(self.asked_bytes)
        means = sum(self.asked_bytes) / n, sum(self.delivered_bytes) / n
        pairs = [
            (a - means[0], d - means[1]) for a, d in zip(self.asked_bytes, self.delivered_bytes, strict=True)
        ]
        asked, delivered = sum(a * a for a, _ in pairs), sum(d * d for _, d in pairs)
        if sqrt(asked / n) < 0.02 * means[0]:
            return None
        return sum(a * d for a, d in pairs) / sqrt(asked * delivered) if delivered else 0.0

    @property
    def totals(self) -> tuple[float, float]:
        """Bytes asked and delivered over the whole stretch."""
        return sum(self.asked_bytes), sum(self.delivered_bytes)


@dataclass(frozen=True)
class Track:
    """Means over equal parts of one stretch of a trace, as asked and as measured; None where no probe tells."""

    way: Way
    what: Literal["delay", "loss"]  # seconds; fractions
    begin_s: float  # in the trace, after its offset
    bin_s: Annotated[float, msgspec.Meta(gt=0)]
    asked: tuple[float | None, ...]
    measured: tuple[float | None, ...]

    def __post_init__(self) -> None:
        _check_columns(self.asked, self.measured)


@dataclass(frozen=True)
class Course:
    """How one figure of one way went over the time of a measurement: medians over equal parts; None where no probe tells."""

    way: Way
    what: Literal["rate", "excess delay"]  # bits per second; seconds over the least
    bin_s: float
    measured: tuple[float | None, ...]


def _check_columns(asked: Sequence[float | None], measured: Sequence[float | None]) -> None:
    if (
        not asked
        or len(asked) != len(measured)
        or not all(isfinite(v) for v in (*asked, *measured) if v is not None)
    ):
        raise ValueError("as many finite numbers measured as asked, and some")


@dataclass(frozen=True)
class Outcome:
    """A profile's last measurement, read back. host: on which it was made, where the record is of several."""

    profile: str
    ok: bool
    emulator: str
    checks: tuple[Check, ...]
    curves: tuple[Curve, ...] = ()
    tracks: tuple[Track, ...] = ()
    host: str = ""

    @property
    def label(self) -> str:
        """What tells it from others."""
        return f"{self.profile} · {self.host}" if self.host else self.profile

    def check(self, way: str, what: str) -> Check | None:
        """The figure of one way; None: there is none."""
        return next(
            (check for check in reversed(self.checks) if (check.way, check.what) == (way, what)), None
        )


def outcomes(record: dict[str, Any]) -> list[Outcome]:
    """Each profile's last measurement in calibration.json, on each host, in the order in which they came; what is none is passed
    over."""
    measurements = list(_dicts(record.get("measurements")))
    several = len({str(each.get("host") or "") for each in measurements} - {""}) > 1
    latest = {
        (str(each.get("profile")), str(each.get("host") or "") if several else ""): each
        for each in measurements
    }
    read = []
    for (profile, host), measurement in latest.items():
        if attempts := list(_dicts(measurement.get("attempts"))):
            last = attempts[-1]
            checks = tuple(_read(Check, last.get("checks")))
            curves, tracks = tuple(_read(Curve, last.get("curves"))), tuple(_read(Track, last.get("tracks")))
            emulator = str(measurement.get("emulator") or "")
            read.append(
                Outcome(
                    profile,
                    measurement.get("ok") is not False,
                    emulator,
                    checks,
                    curves,
                    tracks,
                    host,
                )
            )
    return read


def _read(kind: type[_Kind], values: object) -> Iterable[_Kind]:
    """Those of *values* that are one."""
    for raw in _dicts(values):
        if kind is Check:
            raw = raw | {"what": _FORMER.get(str(raw.get("what")), raw.get("what"))}
        with contextlib.suppress(msgspec.ValidationError):
            yield msgspec.convert(raw, kind)


def _dicts(value: object) -> Iterable[dict[str, Any]]:
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()
