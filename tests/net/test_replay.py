"""Links that change, on real namespaces."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from testbed.hosts.namespaces import call_inside
from testbed.net import emulators
from testbed.net.calibration.calibrate import calibrate
from testbed.net.profile.profile import parse_profile
from tests.net.wire import Conditioned, Wire

pytestmark = pytest.mark.netns


EMULATORS = ["userspace", pytest.param("netem", marks=pytest.mark.netem)]


@pytest.mark.slow
@pytest.mark.parametrize("emulator", EMULATORS)
def test_a_link_follows_its_trace_and_calibration_keeps_both_curves(net: Wire, emulator: str):
    text = "up:delay=5ms,sine:1mbit..4mbit*2s;down:rate=2mbit,delay=5ms,outage:500ms@1s/2s"
    for _ in range(4):  # on a busy host a guest itself is held up
        conditioned = Conditioned(net, emulators.choose(emulator), parse_profile(text))
        measured = calibrate(conditioned, "l0", parse_profile(text), stretch_s=4.0)
        conditioned.attachment.detach()
        if measured.ok:
            break
    assert measured.ok, measured.cause
    assert [(c.way, c.what) for c in measured.checks if c.what.startswith("rate ")] == [
        *[("up", "rate shape"), ("up", "rate trace")],
        *[("down", "rate shape"), ("down", "rate trace")],
    ]
    up, down = measured.to_dict()["attempts"][-1]["curves"]
    assert len(up["asked_bytes"]) == len(up["delivered_bytes"]) == 40
    assert sum(down["asked_bytes"]) == pytest.approx(2e6 / 8 * 3)  # 4 s without two outages


@pytest.mark.parametrize("emulator", EMULATORS)
def test_a_transfer_survives_an_outage_of_five_seconds(net: Wire, emulator: str):
    profile = parse_profile(
        "rate=5mbit,delay=5ms,outage:5s@4s"
    )  # a slow kernel may take seconds to put it on
    attachment = emulators.choose(emulator).attach(net.wire, "l0", "l0a", "l0b", parse_profile("delay=5ms"))
    listener = call_inside(net.namespace("b"), lambda: socket.create_server((net.address("b"), 5001)))
    arrivals: list[tuple[float, int]] = []

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            while piece := connection.recv(65536):
                arrivals.append((time.monotonic(), len(piece)))

    thread = threading.Thread(target=receive)
    thread.start()
    client = call_inside(net.namespace("a"), lambda: socket.create_connection((net.address("b"), 5001), 20))
    origin = time.monotonic()
    attachment.apply(profile, origin)
    with client:
        client.settimeout(60)
        client.sendall(bytes(3_000_000))  # 4.8 s at this rate
    thread.join(60)
    listener.close()
    attachment.detach()
    assert sum(size for _, size in arrivals) == 3_000_000
    assert [at for at, _ in arrivals if at < origin + 4]
    assert not [at for at, _ in arrivals if origin + 4.5 < at < origin + 8.9]  # a busy machine reads late
    assert [at for at, _ in arrivals if at > origin + 8.9]
