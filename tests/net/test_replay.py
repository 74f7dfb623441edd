"""Links that change, on real namespaces."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from testbed.net import emulators
from testbed.net.emulators.namespace import inside
from testbed.net.profile import parse_profile
from tests.net.wire import Wire, wire

pytestmark = pytest.mark.netns


@pytest.fixture
def net() -> Iterator[Wire]:
    with wire() as made:
        yield made


def test_a_transfer_survives_an_outage_of_five_seconds(net: Wire):
    profile = parse_profile("rate=20mbit,delay=5ms,outage:5s@1s")
    attachment = emulators.choose("userspace").attach(
        net.wire, "l0", "l0a", "l0b", parse_profile("delay=5ms")
    )
    listener = inside(net.namespace("b"), lambda: socket.create_server((net.address("b"), 5001)))
    arrivals: list[tuple[float, int]] = []

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            while piece := connection.recv(65536):
                arrivals.append((time.monotonic(), len(piece)))

    thread = threading.Thread(target=receive)
    thread.start()
    client = inside(net.namespace("a"), lambda: socket.create_connection((net.address("b"), 5001), 20))
    origin = time.monotonic()
    attachment.apply(profile, origin)
    with client:
        client.settimeout(60)
        client.sendall(bytes(4_000_000))  # 1.6 s at this rate
    thread.join(60)
    listener.close()
    attachment.detach()
    assert sum(size for _, size in arrivals) == 4_000_000
    assert sum(size for at, size in arrivals if at < origin + 1) > 1_000_000
    assert not [at for at, _ in arrivals if origin + 1.1 < at < origin + 5.9]
    assert [at for at, _ in arrivals if at > origin + 5.9]
