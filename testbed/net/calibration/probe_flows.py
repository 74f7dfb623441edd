"""What is sent to measure a link: flows that saturate it, and probes that do not."""

from __future__ import annotations

from testbed.net.calibration.prober import MESSAGE, UDP_OVERHEAD
from testbed.net.calibration.probes import Flow
from testbed.net.profile.profile import Direction, Profile

PROBE_BYTES = UDP_OVERHEAD + MESSAGE.size
"""Network layer; there are no smaller ones: at 1 Mbit/s they take 0.35 ms each."""
FULL_PACKET = 1500
UNLIMITED_BPS = 300e6
"""What is offered where there is no limit; the result is reported, not judged."""
SLACK_S = 0.1
"""For the last packet of a phase, over what the profile explains."""
_OVERLOAD, _OVERLOAD_FAST = (
    1.2,
    1.1,
)  # a saturating flow's rate over the asked one; what is lost of it costs time, too
_FAST_BPS = 200e6
_CLOSEST_S = 0.3e-3  # two probes of many; a slow prober's are further apart
_LONGEST_S = 600.0  # of a flow whose number of packets is given


def settle_s(profile: Profile, way: str) -> float:
    """How long after a saturating flow's last packet something may still arrive."""
    direction = profile.up if way == "up" else profile.down
    waiting = direction.queue_bytes(profile.round_trip_s)
    draining = waiting * 8 / direction.rate_bps if waiting and direction.rate_bps else 0.0
    return direction.delay_s + 6 * direction.jitter_s + draining + SLACK_S


def measuring_s(profile: Profile) -> float:
    """How long one measurement of rate, delay and loss takes at least; *profile* does not change over time."""
    dense = [loss_flow(profile, way, 1.0, None) for way in ("up", "down")]
    lossy = max(min(flow.packets * flow.interval_s, flow.duration_s) for flow in dense)
    return max(settle_s(profile, way) for way in ("up", "down")) + lossy


def packet_bytes(direction: Direction) -> int:
    """A saturating flow's packet: full-sized, smaller where a second would not hold a hundred of them."""
    return max(200, min(FULL_PACKET, int((direction.rate_bps or 1e12) / 8 / 100)))


def rate_flow(direction: Direction, scale: float) -> Flow:
    size = packet_bytes(direction)
    offered = UNLIMITED_BPS
    if direction.rate_bps:
        # Loss comes before the bottleneck; what is left must still saturate it.
        over = _OVERLOAD if direction.rate_bps <= _FAST_BPS else _OVERLOAD_FAST
        offered = over * direction.rate_bps / (1 - min(direction.loss, 0.9))
    duration = (1.2 if direction.rate_bps else 0.5) * scale
    duration = max(duration, min(6.0, 40 * size * 8 / offered))  # forty packets at least
    interval = size * 8 / offered
    return Flow(int(duration / interval) + 1, size, interval, duration, catch_up=True)


def loss_flow(profile: Profile, way: str, scale: float, probes: int | None) -> Flow:
    """Probes that never fill the queue: under half the rate, and what jitter may bunch together fits in half of the queue.

    Of a chain's bursts there are fewer than losses, so they take more probes, closer together.
    """
    direction = profile.up if way == "up" else profile.down
    packets, interval = int((2000 if direction.loss else 800) * scale), 0.9e-3 if direction.loss else 1.5e-3
    duration = 2.0 * scale
    if direction.loss_model is not None:
        packets, interval, duration = int(10_000 * scale), _CLOSEST_S, 4.0 * scale
    if probes is not None:
        packets, interval, duration = probes, _CLOSEST_S, _LONGEST_S
    if direction.rate_bps:
        interval = max(interval, 2 * PROBE_BYTES * 8 / direction.rate_bps)
        waiting = direction.queue_bytes(profile.round_trip_s) or FULL_PACKET
        interval = max(interval, 8 * direction.jitter_s * PROBE_BYTES / (waiting / 2))
    return Flow(packets, PROBE_BYTES, interval, duration)


def delay_flow(direction: Direction, scale: float, probes: int | None) -> Flow:
    """Probes so far apart that one in hundreds at most meets its predecessor under jitter; where *probes* is given, a tenth."""
    interval = max(8e-3, 4 * direction.jitter_s)
    if probes is not None:
        return Flow(probes // 10, PROBE_BYTES, interval, _LONGEST_S)
    return Flow(10_000, PROBE_BYTES, interval, 2.4 * scale)
