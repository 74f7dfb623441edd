"""What a calibration found, as calibration.json has it: checks with units and tolerances, curves and tracks of traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeGuard

from testbed.errors import TestbedError
from testbed.net.emulators.emulator import Emulator
from testbed.units import format_fraction, format_rate, format_size, format_time, parse_fraction, parse_time

WAYS = ("up", "down")


_SHOWN: dict[str, Callable[[float], str]] = {
    "rate": format_rate,
    "delay": format_time,
    "loss": format_fraction,
    "jitter": format_time,
    "law": lambda distance: f"{distance:.3f}",
    "burst": lambda packets: f"{packets:.3g}",
    "delay trace": format_time,
    "loss trace": format_fraction,
    "loss shape": lambda square: f"{square:.2f}",
    "curve": lambda correlation: f"{correlation:.4f}",
    "total": format_size,
}
_RELATIVE = ("rate", "total", "jitter", "burst")  # whose error is a fraction of what is asked


@dataclass(frozen=True)
class Check:
    """One figure of one way. Rates in bits per second, delays in seconds, losses as fractions."""

    way: str
    what: str
    """"rate", "delay", "loss"; "jitter" (standard deviation), "law" (distance from it), "burst" (packets). Of a trace: "curve"
    (correlation), "total" (bytes), "delay trace" (seconds off), "loss trace", "loss shape" (chi-square a degree of freedom)."""
    asked: float | None  # None: no limit
    measured: float | None  # None: nothing arrived
    low: float | None  # 99 % interval of what was measured
    high: float | None
    n: int  # probe packets behind it
    ok: bool | None  # None: reported, not judged
    tolerance: str
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

    def line(self) -> dict[str, object]:
        """The figure as text: ``asked``, ``measured``, ``error``; with ``way``, ``what``, ``ok``."""
        show = _SHOWN[self.what]
        error = ""
        if self.asked is not None and self.measured is not None:
            off = self.measured - self.asked
            sign = "-" if off < 0 else "+"
            relative = self.what in _RELATIVE and self.asked > 0
            error = f"{100 * off / self.asked:+.2f}%" if relative else sign + show(abs(off))
        return {
            "way": self.way,
            "what": self.what,
            "asked": "no limit" if self.asked is None else show(self.asked),
            "measured": "nothing arrived" if self.measured is None else show(self.measured),
            "error": error,
            "ok": self.ok is not False,
        }


@dataclass(frozen=True)
class Curve:
    """Bytes of the network layer in equal parts of one stretch of the trace, as asked and as delivered."""

    way: str
    begin_s: float  # in the trace, after its offset
    bin_s: float
    asked_bytes: tuple[float, ...]
    delivered_bytes: tuple[int, ...]

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
    def totals(self) -> tuple[float, int]:
        """Bytes asked and delivered over the whole stretch."""
        return sum(self.asked_bytes), sum(self.delivered_bytes)

    def checks(self, emulator: type[Emulator] | Emulator) -> list[Check]:
        """The verdict for shape and sum, in the emulator's tolerances."""
        least, most_off = emulator.least_correlation, emulator.most_off
        asked, delivered = self.totals
        n, shape = len(self.asked_bytes), self.correlation
        fits = None if shape is None else shape >= least
        total_ok = abs(delivered - asked) <= most_off * asked
        return [
            Check(self.way, "curve", 1.0, shape, None, None, n, fits, f"≥ {least}"),
            Check(
                self.way, "total", asked, delivered, None, None, n, total_ok, f"±{format_fraction(most_off)}"
            ),
        ]


@dataclass(frozen=True)
class Track:
    """Means over equal parts of one stretch of a trace, as asked and as measured; None where no probe tells."""

    way: str
    what: str  # "delay" (seconds) or "loss" (fractions)
    begin_s: float  # in the trace, after its offset
    bin_s: float
    asked: tuple[float | None, ...]
    measured: tuple[float | None, ...]


@dataclass(frozen=True)
class Outcome:
    """A profile's last measurement, read back."""

    profile: str
    ok: bool
    emulator: str
    checks: tuple[Check, ...]
    curves: tuple[Curve, ...] = ()
    tracks: tuple[Track, ...] = ()

    def check(self, way: str, what: str) -> Check | None:
        """The figure of one way; None: there is none."""
        return next(
            (check for check in reversed(self.checks) if (check.way, check.what) == (way, what)), None
        )


def outcomes(record: dict[str, Any]) -> list[Outcome]:
    """Each profile's last measurement in calibration.json, in the order in which they came; what is not one is passed over."""
    latest = {str(one.get("profile")): one for one in _dicts(record.get("measurements"))}
    found = []
    for profile, one in latest.items():
        if attempts := list(_dicts(one.get("attempts"))):
            last = attempts[-1]
            checks = tuple(map(_read_check, _dicts(last.get("checks"))))
            curves = tuple(c for raw in _dicts(last.get("curves")) if (c := _read_curve(raw)))
            tracks = tuple(t for raw in _dicts(last.get("tracks")) if (t := _read_track(raw)))
            emulator = str(one.get("emulator") or "")
            found.append(Outcome(profile, one.get("ok") is not False, emulator, checks, curves, tracks))
    return found


def _read_check(raw: dict[str, Any]) -> Check:
    asked, measured, low, high, n, p99 = (
        value if _number(value := raw.get(key)) else None
        for key in ("asked", "measured", "low", "high", "n", "p99")
    )
    ok = raw.get("ok") if isinstance(raw.get("ok"), bool) else None
    way, what, tolerance = (str(raw.get(key) or "") for key in ("way", "what", "tolerance"))
    return Check(way, what, asked, measured, low, high, int(n or 0), ok, tolerance, p99)


def _read_curve(raw: dict[str, Any]) -> Curve | None:
    asked, delivered = raw.get("asked_bytes"), raw.get("delivered_bytes")
    if not (isinstance(asked, list) and isinstance(delivered, list) and len(asked) == len(delivered) > 0):
        return None
    numbers = [*asked, *delivered, raw.get("begin_s"), raw.get("bin_s")]
    if raw.get("way") not in WAYS or not all(map(_number, numbers)) or raw["bin_s"] <= 0:
        return None
    return Curve(raw["way"], raw["begin_s"], raw["bin_s"], tuple(asked), tuple(delivered))


def _read_track(raw: dict[str, Any]) -> Track | None:
    asked, measured = raw.get("asked"), raw.get("measured")
    if not (isinstance(asked, list) and isinstance(measured, list) and len(asked) == len(measured) > 0):
        return None
    numbers = [*(v for v in (*asked, *measured) if v is not None), raw.get("begin_s"), raw.get("bin_s")]
    if raw.get("way") not in WAYS or raw.get("what") not in ("delay", "loss"):
        return None
    if not all(map(_number, numbers)) or raw["bin_s"] <= 0:
        return None
    return Track(raw["way"], raw["what"], raw["begin_s"], raw["bin_s"], tuple(asked), tuple(measured))


def _dicts(value: object) -> Iterable[dict[str, Any]]:
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else ()


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
