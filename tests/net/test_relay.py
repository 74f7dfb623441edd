"""The relay's law of motion, without a kernel: frames in, logical times out. And the process around it, over socket pairs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.impairments.delay import pack
from testbed.net.emulators.relay.line import Line
from testbed.net.emulators.relay.userspace import PROGRAM
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.jitter import table
from testbed.net.profile.schedule import Schedule
from testbed.programs import isolated

FRAME = bytes(24 + 1250)  # 10,000 bits behind the headers: 1 ms at 10 Mbit/s


class Recorder:
    """A line whose departures are observed in logical time, by stepping it through time in small steps."""

    def __init__(self, seed: int = 1, **changes: Any) -> None:
        self.left: list[bytes] = []
        self.line = Line(self.left.append, seed)
        self.line.apply(Conditions(**changes), 0.0)

    def departures(self, arrivals: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
        """(logical departure time, frame) of all that leave."""
        found = []
        pending = sorted(arrivals, key=lambda item: item[0])
        while pending or self.line.leaves != float("inf"):
            if pending and pending[0][0] <= self.line.leaves:
                now, frame = pending.pop(0)
                self.line.enter(frame, now)
                continue
            now = self.line.leaves
            self.line.advance(now)
            found += [(now, frame) for frame in self.left]
            self.left.clear()
        return found


def test_a_lone_packet_takes_delay_plus_serialisation():
    ((time_s, _),) = Recorder(rate_bps=10e6, delay_s=0.02).departures([(1.0, FRAME)])
    assert time_s == pytest.approx(1.0 + 0.02 + 0.001)


def test_a_saturated_line_delivers_its_rate_however_late_the_process_looks():
    line = Recorder(rate_bps=10e6, delay_s=0.005, queue_bytes=10_000_000)
    for number in range(1000):
        line.line.enter(FRAME, number * 0.0005)
    line.line.advance(0.7301)  # one look, long after most departures
    # The first leaves at 5 + 1 ms, then one every millisecond: by 730.1 ms, 725 have left.
    assert line.line.counted.delivered == 725
    assert line.line.leaves == pytest.approx(0.731)


def test_what_finds_the_queue_full_is_dropped_and_the_packet_being_sent_does_not_count():
    line = Recorder(rate_bps=10e6, queue_bytes=2 * 1250)
    assert len(line.departures([(0.0, FRAME)] * 5)) == 3  # one being sent, two waiting
    assert line.line.counted.dropped_queue == 2


def test_the_queue_is_counted_in_bytes_so_small_packets_fit_where_large_ones_do_not():
    small = bytes(24 + 50)
    line = Recorder(rate_bps=10e6, queue_bytes=1250)
    assert len(line.departures([(0.0, FRAME)] + [(0.0, small)] * 30)) == 1 + 25


def test_what_is_on_its_way_takes_no_room_in_the_queue():
    line = Recorder(rate_bps=10e6, delay_s=0.5, queue_bytes=1250)
    assert len(line.departures([(n * 0.001, FRAME) for n in range(400)])) == 400


@given(
    gaps=st.lists(st.floats(0, 0.01), min_size=1, max_size=60),
    jitter=st.floats(0, 0.02),
    rate=st.sampled_from([None, 1e6, 50e6]),
)
def test_packets_keep_their_order_and_never_leave_before_they_came(
    gaps: list[float], jitter: float, rate: float | None
):
    arrivals, now = [], 0.0
    for number, gap in enumerate(gaps):
        now += gap
        arrivals.append((now, bytes(24) + number.to_bytes(2, "big") + bytes(100)))
    left = Recorder(
        rate_bps=rate, delay_s=0.02, jitter_s=jitter, jitter_table=pack(table("normal"))
    ).departures(arrivals)
    assert [frame for _, frame in left] == [frame for _, frame in arrivals]
    assert all(out >= came for (out, _), (came, _) in zip(left, arrivals, strict=True))
    assert [out for out, _ in left] == sorted(out for out, _ in left)


def test_the_same_seed_loses_the_same_packets():
    frames = [(n * 0.01, bytes(24) + n.to_bytes(2, "big")) for n in range(500)]
    first, second, other = (Recorder(seed=s, loss=0.2).departures(frames) for s in (7, 7, 8))
    assert first == second != other
    assert 60 < 500 - len(first) < 140  # four standard deviations of a binomial around 100


def test_a_new_rate_holds_for_what_is_being_sent_and_what_waits():
    line = Recorder(rate_bps=1e6, queue_bytes=100_000)
    for _ in range(3):
        line.line.enter(FRAME, 0.0)  # 10 ms each
    line.line.advance(0.005)
    line.line.apply(
        Conditions(rate_bps=10e6, queue_bytes=100_000), 0.005
    )  # half of the first is left: 0.5 ms
    assert line.line.leaves == pytest.approx(0.0055)
    line.line.advance(0.0076)
    assert line.line.counted.delivered == 3


def test_a_shorter_delay_does_not_let_packets_overtake():
    first, other = (bytes(24) + word * 10 for word in (b"first", b"other"))
    line = Recorder(delay_s=0.1)
    line.line.enter(first, 0.0)
    line.line.apply(Conditions(delay_s=0.01), 0.0)
    assert [frame for _, frame in line.departures([(0.02, other)])] == [first, other]


def test_what_a_line_is_cleared_of_is_counted_as_no_loss_and_delays_nothing_that_enters_next():
    line = Recorder(rate_bps=10e6, delay_s=0.3).line
    for _ in range(3):
        line.enter(FRAME, 0.0)  # the last of them would leave at 303 ms
    assert line.under_way == 3
    line.clear()
    line.apply(Conditions(rate_bps=10e6, delay_s=0.015), 0.01)
    line.enter(FRAME, 0.01)
    assert line.leaves == pytest.approx(0.01 + 0.015 + 0.001)
    line.advance(1.0)
    assert (
        line.counted.delivered,
        line.counted.cleared,
        line.counted.dropped_loss,
        line.counted.dropped_queue,
    ) == (1, 3, 0, 0)
    assert (line.under_way, line.held_bytes, line.waiting_bytes) == (0, 0, 0)


def test_what_is_hurried_arrives_at_once_in_its_order_and_so_does_what_follows_but_for_what_is_lost():
    line = Recorder(rate_bps=1e6, delay_s=0.3, queue_bytes=100_000)
    frames = [bytes(24) + bytes([number]) * 1250 for number in range(7)]
    for frame in frames[:5]:
        line.line.enter(frame, 0.0)  # the last of them would leave at 350 ms
    line.line.advance(0.315)
    line.line.hurry(0.315)
    assert line.left == frames[:5]
    line.line.enter(frames[5], 0.316)
    assert line.line.leaves == 0.316
    line.line.advance(0.316)
    line.line.apply(Conditions(loss=1.0, delay_s=0.3), 0.4)
    line.line.hurry(0.4)
    line.line.enter(frames[6], 0.4)
    line.line.advance(1.0)
    counted = line.line.counted
    assert line.left == frames[:6]
    assert (counted.delivered, counted.cleared, counted.dropped_queue, counted.dropped_loss) == (6, 0, 0, 1)
    assert (line.line.under_way, line.line.held_bytes, line.line.waiting_bytes) == (0, 0, 0)


def test_what_is_hurried_is_never_late():
    line = Recorder(delay_s=0.01).line  # whose times are long ago
    for at in (0.0, 1.0):
        line.enter(FRAME, at)
        line.hurry(at + 0.001)
        line.enter(FRAME, at + 0.002)
        line.advance(at + 0.003)
        assert line.counters()["recent_lateness_s"] == 0.0
        line.apply(Conditions(delay_s=0.01), at + 0.1)
        assert line.counters()["recent_lateness_s"] == 0.0
    line.enter(FRAME, 2.0)
    line.advance(3.0)
    line.hurry(3.0)
    assert line.counters()["recent_lateness_s"] > 0  # it was, before


def test_a_frame_that_cannot_be_delivered_is_counted_and_ends_nothing():
    def refuse(_: bytes) -> None:
        raise OSError

    line = Line(refuse, 1)
    line.enter(FRAME, 0.0)
    line.advance(1.0)
    assert (line.counted.overrun, line.counted.delivered) == (1, 0)


def test_a_schedule_gives_the_rate_and_an_outage_makes_everything_wait():
    made = Schedule([0.0, 1.0, 6.0], 10.0, rates=[1250e3, 0.0, 125e3])
    line = Recorder(queue_bytes=2 * 1250, schedule=made)
    arrivals = [(0.9985, FRAME)] + [(1.0 + n / 10, FRAME) for n in range(9)]
    left = [time_s for time_s, _ in line.departures(arrivals)]
    # The first has 1 ms at 10 Mbit/s; of the others, one is being sent and two wait, at 10 ms each from 6 s on.
    assert left == pytest.approx([0.9995, 6.01, 6.02, 6.03])
    assert line.line.counted.dropped_queue == 6


def test_an_outage_does_not_fill_the_memory_with_what_the_queue_has_no_room_for():
    line = Recorder(queue_bytes=10_000, schedule=Schedule([0.0, 1.0], 2.0, rates=[0.0, 1e6], loop=False))
    for number in range(500):
        line.line.enter(FRAME, number / 1000)
    assert line.line.held_bytes <= 10_000 + 2 * 1250


def test_a_schedule_gives_delay_and_loss_as_they_are_when_a_packet_enters():
    made = Schedule([0.0, 1.0], 2.0, delays=[0.1, 0.5], losses=[0.0, 1.0], loop=False)
    assert [t for t, _ in Recorder(schedule=made).departures([(0.5, FRAME), (1.5, FRAME)])] == pytest.approx(
        [0.6]
    )
    assert [t for t, _ in Recorder(schedule=made).departures([(0.95, FRAME)])] == pytest.approx([1.05])


def test_deliveries_let_packets_go_at_their_opportunities():
    line = Recorder(schedule=Deliveries(array("I", [5, 5, 20, 30])))
    small = bytes(24 + 700)
    left = line.departures([(0.0, FRAME), (0.001, small), (0.002, FRAME), (0.021, small)])
    # 1250 and 700 of 1500 + 1500 at 5 ms, of which 1050 are for the third, and 200 at 20 ms; the rest of that is lost.
    assert [round(time_s, 6) for time_s, _ in left] == [0.005, 0.005, 0.02, 0.03]


def test_a_schedule_that_begins_or_ends_while_a_packet_is_sent_takes_over_what_is_left_of_it():
    line = Recorder(rate_bps=1e6)
    line.line.enter(FRAME, 0.0)  # 10 ms
    line.line.apply(
        Conditions(schedule=Schedule([0.0, 0.01], 1.0, rates=[0.0, 1250e3], origin_s=0.004)), 0.004
    )
    assert line.line.leaves == pytest.approx(
        0.004 + 0.010 + 0.0006
    )  # 750 bytes are left, at ten times the rate
    line.line.apply(Conditions(rate_bps=1e6), 0.0143)
    assert line.line.leaves == pytest.approx(0.0143 + 0.003)


class Process:
    """A relay process between datagram socket pairs, two for each link: no namespace, no root."""

    def __init__(self, *links: dict[str, Any], listener: socket.socket | None = None) -> None:
        """*links*: what l0, l1, … are under on their way up. *listener* takes the place of a control socket of its own."""
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(10)
        self.ends, inner, described = [], [control], {}
        for number, up in enumerate(links):
            (a, port_a), (b, port_b) = (
                socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)
            )
            for end, port in ((a, port_a), (b, port_b)):
                end.settimeout(10)
                port.setblocking(False)
            self.ends.append((a, b))
            inner += [port_a, port_b]
            ports = {"port_a": port_a.fileno(), "port_b": port_b.fileno(), "seed": 1}
            described[f"l{number}"] = ports | {"conditions": {"up": up, "down": {}}}
        self.a, self.b = self.ends[0]
        orders = {"control": (listener or control).fileno(), "listening": bool(listener), "links": described}
        passed = [sock.fileno() for sock in (*inner, *([listener] if listener else []))]
        with os.fdopen(os.memfd_create("orders"), "wb", buffering=0) as file:
            file.write(json.dumps(orders).encode())
            file.seek(0)
            argv = isolated(PROGRAM, str(file.fileno()))
            self.process = subprocess.Popen(argv, pass_fds=(*passed, file.fileno()))
        for sock in inner:
            sock.close()

    def ask(self, **order: Any) -> dict[str, Any]:
        self.control.send(json.dumps({"link": "l0"} | order).encode())
        return json.loads(self.control.recv(65536))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for sock in (self.control, *(end for ends in self.ends for end in ends)):
            sock.close()


def test_the_process_relays_both_ways_and_counts_each():
    with Process({"delay_s": 0.01}) as running:
        started = time.monotonic()
        running.a.send(FRAME)
        assert running.b.recv(2000) == FRAME
        assert time.monotonic() - started >= 0.01
        running.b.send(FRAME[:110])
        assert running.a.recv(2000) == FRAME[:110]
        counted = running.ask(do="counters")
        assert (counted["up"]["packets"], counted["up"]["bytes"], counted["up"]["delivered"]) == (1, 1250, 1)
        assert (counted["down"]["packets"], counted["down"]["bytes"]) == (1, 86)


def test_the_process_takes_schedules_over_its_socket():
    with Process({}) as running, tempfile.TemporaryFile() as file:
        made = Schedule([0.0, 0.3], 1.0, rates=[0.0, 1e9], loop=False, origin_s=time.monotonic())
        up = {"schedule": made.pack(file) | {"file": 0}}
        file.flush()
        order = {"do": "apply", "link": "l0", "conditions": {"up": up, "down": {}}}
        socket.send_fds(running.control, [json.dumps(order).encode()], [file.fileno()])
        assert json.loads(running.control.recv(65536)) == {}
        running.a.send(FRAME)
        assert running.b.recv(2000) == FRAME
        assert time.monotonic() >= made.origin_s + 0.3


def test_the_process_changes_conditions_when_told():
    with Process({}) as running:
        running.ask(do="apply", conditions={"up": {"loss": 1.0}, "down": {}})
        running.a.send(FRAME)
        running.b.send(FRAME)
        running.a.recv(2000)
        assert running.ask(do="counters")["up"]["dropped_loss"] == 1


def test_the_process_hurries_what_is_under_way_when_told():
    with Process({"delay_s": 1e3}) as running:
        running.a.send(FRAME)
        while not running.ask(do="under_way")["packets"]:
            pass
        assert running.ask(do="hurry") == {}
        assert running.b.recv(2000) == FRAME
        running.a.send(FRAME[:110])
        assert running.b.recv(2000) == FRAME[:110]


@pytest.mark.parametrize("end", ["stop", "closed", "nonsense"])
def test_the_process_ends_when_told_or_when_its_owner_is_gone(end: str):
    with Process({}) as running:
        if end == "stop":
            running.ask(do="stop")
        elif end == "closed":
            running.control.close()
        else:
            running.control.send(b"\xff not json")
        assert running.process.wait(timeout=10) == 0


def test_the_process_outlives_an_order_it_cannot_read_on_a_listening_socket(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with Process({}, listener=listener):
            for message in (b"{}", b"[1]", os.urandom(100), b'{"do": "counters", "link": "l0"}'):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                    client.settimeout(10)
                    client.connect(str(tmp_path / "s"))
                    client.send(message)
                    answer = client.recv(65536)
    assert json.loads(answer)["up"]["packets"] == 0


def test_one_process_serves_many_links_each_by_its_own_conditions_until_the_last_is_removed():
    count = 40
    with Process(*({"delay_s": number * 0.002} for number in range(count))) as running:
        running.ask(do="counters")  # it runs
        sent = time.monotonic()
        for number, (a, _) in reversed(list(enumerate(running.ends))):
            a.send(b"%d" % number + bytes(99))
        for number, (_, b) in enumerate(running.ends):
            assert b.recv(2000).strip(b"\0") == b"%d" % number
            assert time.monotonic() - sent >= number * 0.002
        for number in range(count):
            assert running.ask(do="counters", link=f"l{number}")["up"]["delivered"] == 1
            running.ask(do="remove", link=f"l{number}")
            assert number == count - 1 or running.process.poll() is None
        assert running.process.wait(timeout=10) == 0
