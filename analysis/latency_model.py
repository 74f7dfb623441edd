"""How long a request takes on a link that was not measured, from the run's own rows.

Compute stages are the run's; the link's are modelled. A payload of B bytes over TCP takes

    connect   RTT + c
    transmit  d + t0 + slow start + rest / rate        (d: one-way delay)

Slow start sends W0 (2^k - 1) bytes in k round trips until its window fills the link (RTT · rate) or a packet is lost,
the (1/p)th (N. Cardwell et al., "Modeling TCP Latency", INFOCOM 2000). From then on every (1/p)th loss leaves seven
tenths of the window (CUBIC's beta, RFC 9438), down to what loss sustains, and what is left goes at that goodput: the
link's rate times an efficiency e, or where that is less

    a MSS / (RTT sqrt(2p/3) + T0 min(1, 3 sqrt(3p/8)) p (1 + 32 p^2))

(J. Padhye et al., "Modeling TCP Throughput: A Simple Model and its Empirical Validation", SIGCOMM 1998, equation 30
with b = 1; at small p it is Mathis' law, which CUBIC follows at these windows: RFC 9438, section 4.3). Its second
term is the timeouts, which rule from a few percent of loss on; T0 = RTT + 200 ms, Linux's least. c, t0, e, W0 and a are
fitted to the rows by robust least squares on log seconds, held near their textbook values where the rows say
little. Stages that overlap (a stream, a cache met half-way) are put together by `stage_sums`.
Under loss a request's time is a matter of luck: the model tells of the middle, not of the tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize

from testbed.analysis import settings
from testbed.analysis.stage_sums import Sums, over_tcp
from testbed.errors import UsageError
from testbed.experiment.row import SENDING

Floats = npt.NDArray[np.float64]

#: Payload bytes of a full segment with timestamps, and what the link's rate counts of it.
MSS, PACKET = 1448.0, 1500.0
_BETA = 0.7  #: what a loss leaves of CUBIC's window (RFC 9438, section 4.6)
_REDUCTIONS = 12  #: after so many a window is that which loss sustains
_LEAST_TIMEOUT_S = 0.2  #: TCP_RTO_MIN of Linux


#: Beyond so many times the greatest (or below that part of the least) rate and delay measured, nothing is said.
REACH = 10.0
#: Loss beyond so many times the greatest measured, and beyond `LOSS_REACH`, is out of reach: timeouts rule there.
LOSS_FACTOR, LOSS_REACH = 3.0, 0.01
_AT_LEAST_S = 1e-3  # round trips below it are all the same to a request


@dataclass(frozen=True)
class Link:
    """What the model knows of a link; a rate of infinity is unlimited."""

    rate_up_bps: float
    delay_up_s: float
    delay_down_s: float
    loss_up: float = 0.0

    @property
    def rtt_s(self) -> float:
        """Both ways without queues."""
        return self.delay_up_s + self.delay_down_s

    def text(self) -> str:
        """The link for people."""
        rate = "no rate limit" if np.isinf(self.rate_up_bps) else f"{self.rate_up_bps / 1e6:g} Mbit/s up"
        return f"{rate}, {self.rtt_s * 1e3:g} ms round trip, {self.loss_up * 100:g}% loss"


@dataclass(frozen=True)
class Transport:
    """The fitted numbers; the defaults are the textbook's, the metadata how far (in log units) they may go."""

    connect_s: float = 0.001
    begin_s: float = 0.002
    efficiency: float = 0.97
    window: float = 10 * MSS  #: W0, bytes (RFC 6928)
    loss: float = 1.0  #: a

    def transmit_s(self, payload: Floats, rate: Floats, one_way: Floats, rtt: Floats, p: Floats) -> Floats:
        """First byte handed over to last byte received, elementwise: bytes, bit/s, s, s, fraction -> s."""
        link = self.efficiency * rate / 8 * (MSS / PACKET)
        rtt = np.maximum(rtt, 1e-4)
        goodput = np.minimum(self._allowed(link, rtt, p), 1e12)
        with np.errstate(divide="ignore"):
            between = np.minimum(MSS / p, 1e15)  # bytes from one loss to the next
        # Slow start ends with the first loss, or where its window fills the link.
        full = np.maximum(np.minimum(link, 1e12) * rtt, self.window)
        begun = np.minimum(np.minimum(payload, full - self.window), between)
        seconds = np.log2(1 + begun / self.window) * rtt
        rest, window = payload - begun, begun + self.window
        for number in range(_REDUCTIONS):
            # Each loss takes three tenths of the window, down to what loss sustains.
            window = np.maximum(window * _BETA, goodput * rtt) if number else window
            part = np.minimum(rest, between)
            seconds = seconds + part / np.maximum(np.minimum(window / rtt, link), goodput)
            rest = rest - part
        return np.asarray(one_way + self.begin_s + seconds + rest / goodput)

    def _allowed(self, link: Floats, rtt: Floats, p: Floats) -> Floats:
        """The goodput that rate and loss sustain, bytes a second."""
        timeouts = (rtt + _LEAST_TIMEOUT_S) * np.minimum(1.0, 3 * np.sqrt(3 * p / 8)) * p * (1 + 32 * p**2)
        with np.errstate(divide="ignore"):
            allowed = self.loss * MSS / (rtt * np.sqrt(2 * p / 3) + timeouts)
            # Both limits at once cost more than either: a smooth minimum.
            return np.asarray((link**-2.0 + allowed**-2.0) ** -0.5)


_SPREAD = {"connect_s": 1.0, "begin_s": 1.0, "efficiency": 0.05, "window": 0.7, "loss": 0.5}


def link_of(rows: pd.DataFrame) -> Link:
    """The conditions of one profile's rows."""
    rate = float(rows["rate_up_bps"].median())
    return Link(
        float("inf") if rate != rate else rate,
        float(rows["delay_up_s"].median()),
        float(rows["delay_down_s"].median()),
        float(rows["loss_up"].median()),
    )


def steady(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of links that do not change: a trace has no one rate, delay or loss that explains a request's time."""
    return rows[rows["trace_s"].isna()] if "trace_s" in rows else rows


def fit_transport(rows: pd.DataFrame) -> Transport:
    """The transport's numbers from the rows that crossed a link."""
    across = steady(rows)
    # Of what crossed at once, over TCP: what is in the pipeline behind a chunk hides part of its way.
    across = across[(across["placement"] != "edge") & (across["transmit_s"] > 0) & ~(across["chunks"] > 1)]
    across = across[over_tcp(across)]
    if across.empty:
        return Transport()
    names = [f.name for f in fields(Transport)]
    start = np.log([getattr(Transport(), name) for name in names])
    spread = np.array([_SPREAD[name] for name in names])
    rate = across["rate_up_bps"].fillna(np.inf).to_numpy()
    one_way = across["delay_up_s"].to_numpy()
    rtt = one_way + across["delay_down_s"].to_numpy()
    payload = across["payload_bytes"].to_numpy(dtype=np.float64)
    loss = across["loss_up"].to_numpy()
    measured = np.log(across["transmit_s"].to_numpy())
    opened = (across["connect_s"] > 0).to_numpy()
    handshake = across["connect_s"].to_numpy()
    noise = 0.15  # log seconds between requests alike: losses come at random
    # Kilobytes take a few milliseconds, of which a tenth matters to nobody: weigh by share of the second.
    weight = np.sqrt(np.minimum(1.0, np.exp(measured) / 0.1))

    def residuals(x: Floats) -> Floats:
        model = Transport(*np.exp(start + spread * x))
        predicted = np.log(model.transmit_s(payload, rate, one_way, rtt, loss))
        parts = [weight * (predicted - measured) / noise]
        if opened.any():
            opening = np.log(rtt[opened] + model.connect_s) - np.log(handshake[opened])
            parts.append(0.2 * opening / noise)
        return np.concatenate([*parts, x])

    fit = optimize.least_squares(residuals, np.zeros(len(names)), loss="soft_l1")
    return Transport(*(float(v) for v in np.exp(start + spread * fit.x)))


@dataclass(frozen=True)
class LatencyModel:
    """A run's rows, and the transport fitted to them. `generation`: whether latency ends with the last token; else with
    the first (see `Run.latency`).
    """

    rows: pd.DataFrame  #: labelled (see `settings.labelled`), finished
    transport: Transport
    generation: bool = True

    @classmethod
    def fit(cls, rows: pd.DataFrame) -> LatencyModel:
        """The model of these rows."""
        labelled = settings.finished(rows if "setting" in rows else settings.labelled(rows))
        first = not np.allclose(settings.latencies(labelled), labelled["e2e_s"], equal_nan=True)
        return cls(labelled, fit_transport(labelled), generation=not first)

    @cached_property
    def sums(self) -> Sums:
        """What the rows' requests take apart from their links."""
        return Sums.of(self.rows, self.generation)

    @cached_property
    def _lines(self) -> dict[str, npt.NDArray[np.intp]]:
        """Each setting's lines in `sums`."""
        table = self.sums.table
        return {
            str(name): np.asarray(own) for name, own in table.groupby("setting", sort=False).indices.items()
        }

    def predict(self, link: Link, slower: float = 1.0) -> pd.DataFrame:
        """Median latency and its 95th percentile for each setting (the index) on this link: columns ``e2e_s``,
        ``p95_s``, seconds, with an edge *slower* by a factor than it was measured. Of examples that were answered: what fails
        elsewhere is not known. Settings whose stages overlap in ways that are not known (`stage_sums.kind`), and those over
        another transport than TCP (`stage_sums.over_tcp`), are left away.
        """
        times = self._latencies(link, slower)
        quantiles = {
            name: (np.median(times[own]), np.quantile(times[own], 0.95)) for name, own in self._lines.items()
        }
        return pd.DataFrame.from_dict(quantiles, orient="index", columns=["e2e_s", "p95_s"])

    def medians(self, link: Link, slower: float = 1.0) -> dict[str, float]:
        """The first column of `predict` by setting."""
        times = self._latencies(link, slower)
        return {name: float(np.median(times[own])) for name, own in self._lines.items()}

    def _latencies(self, link: Link, slower: float) -> Floats:
        table = self.sums.table
        size = len(table)
        transmit = self.transport.transmit_s(
            table["payload_bytes"].to_numpy(dtype=np.float64),
            np.full(size, link.rate_up_bps),
            np.full(size, link.delay_up_s),
            np.full(size, link.rtt_s),
            np.full(size, link.loss_up),
        )
        connect = table["opened"].to_numpy(dtype=np.float64) * (link.rtt_s + self.transport.connect_s)
        there = self.sums.latencies(connect, transmit, link.delay_up_s, slower)
        return there + self.sums.crossing * link.delay_down_s


@dataclass(frozen=True)
class HeldOut:
    """One profile, predicted from all others. `errors`: relative, by setting that crosses the link;
    `chosen_within`: how much slower the predicted best is than the measured best (0: the same).
    """

    profile: str
    errors: dict[str, float]
    chosen: str
    best: str
    chosen_within: float
    chosen_sending: str
    best_sending: str
    sending_within: float
    loss_up: float = 0.0


def leave_one_out(rows: pd.DataFrame, eligible: list[str] | None = None) -> list[HeldOut]:
    """The model's error: each profile in turn is predicted from the rows of the others.

    `eligible`: the settings to choose from (those that hold the quality); None: all. Empty for fewer than two
    profiles.
    """
    labelled = steady(settings.finished(settings.labelled(rows)))
    panels = [str(p) for p in labelled["panel"].unique()]
    if len(panels) < 2:
        return []
    held_out = []
    for panel in panels:
        own = labelled[labelled["panel"] == panel]
        predicted = LatencyModel.fit(labelled[labelled["panel"] != panel]).predict(link_of(own))["e2e_s"]
        measured = settings.latencies(own).groupby(own["setting"], sort=False).median()
        both = [s for s in measured.index if s in predicted.index]
        crossing = set(own.loc[own["placement"] != "edge", "setting"])
        errors = {s: float(predicted[s] / measured[s] - 1) for s in both if s in crossing}
        options = [s for s in both if eligible is None or s in eligible]
        caches = set(own.loc[own["placement"].isin(SENDING), "setting"])
        sending = [s for s in options if s in caches]
        if not options:
            continue
        guess, true = predicted.to_dict(), measured.to_dict()
        kv = sending or options
        chosen, best = min(options, key=guess.__getitem__), min(options, key=true.__getitem__)
        chosen_kv, best_kv = min(kv, key=guess.__getitem__), min(kv, key=true.__getitem__)
        held_out.append(
            HeldOut(
                panel,
                errors,
                str(chosen),
                str(best),
                float(true[chosen] / true[best] - 1),
                str(chosen_kv),
                str(best_kv),
                float(true[chosen_kv] / true[best_kv] - 1),
                link_of(own).loss_up,
            )
        )
    return held_out


def median_error(held_out: list[HeldOut]) -> float:
    """Median of the absolute relative errors over all held-out cells that cross the link; NaN without any."""
    errors = [abs(e) for link in held_out for e in link.errors.values()]
    return float(np.median(errors)) if errors else float("nan")


def beyond(rows: pd.DataFrame, link: Link, refuse: bool = True) -> list[str]:
    """What of this link lies outside of what these rows' links were, a phrase each with the nearest measured value;
    empty where it lies within. Raises UsageError where it is out of the model's reach, unless that is to be said, too.
    """
    known = [link_of(own) for _, own in steady(rows).groupby("profile", sort=False)]
    if not known:
        raise UsageError("every link of this run changes over time: no other link can be predicted from it")
    phrases = []
    for name, asked, values, text in (
        ("rate", link.rate_up_bps, [each.rate_up_bps for each in known], _rate),
        ("round trip", max(link.rtt_s, _AT_LEAST_S), [max(each.rtt_s, _AT_LEAST_S) for each in known], _time),
    ):
        low, high = min(values), max(values)
        if low * 0.99 <= asked <= high * 1.01:
            continue
        nearest = low if asked < low else high
        away = nearest / asked if asked < low else asked / nearest
        if refuse and not away <= REACH:
            _refuse(name, text(asked), text(nearest))
        phrases.append(f"{name} {text(asked)} (nearest measured: {text(nearest)})")
    least, most = (of(each.loss_up for each in known) for of in (min, max))
    if link.loss_up > most * 1.05:
        if refuse and link.loss_up > max(LOSS_FACTOR * most, LOSS_REACH):
            _refuse("loss", _loss(link.loss_up), _loss(most))
        phrases.append(f"loss {_loss(link.loss_up)} (nearest measured: {_loss(most)})")
    elif link.loss_up < least * 0.95:
        phrases.append(f"loss {_loss(link.loss_up)} (nearest measured: {_loss(least)})")
    return phrases


def _refuse(name: str, asked: str, nearest: str) -> None:
    raise UsageError(
        f"{name} {asked} is too far from what this run measured (nearest: {nearest}) for a recommendation; "
        "run the scenario on a profile like it: testbed run … --set 'profiles=…'"
    )


def _rate(value: float) -> str:
    return "without limit" if math.isinf(value) else f"{value / 1e6:g} Mbit/s"


def _time(value: float) -> str:
    return f"{value * 1e3:g} ms"


def _loss(value: float) -> str:
    return f"{value:.4g}" if value > 1 else f"{value * 100:g}%"
