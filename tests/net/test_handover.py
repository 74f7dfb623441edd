"""A node goes over to another link in the midst of a transfer: what survives that, and what does not."""

from __future__ import annotations

import json
import os
import time

import pytest

from testbed.deadline import Deadline
from testbed.errors import EndpointError, SpecError, UsageError
from testbed.hosts.namespaces import inside
from testbed.net.fabric.fabric import Fabric
from testbed.net.fabric.handover import hand_over
from testbed.net.topology.files import topology_from
from testbed.transport import wire
from testbed.transport.transport import parse
from tests.command import command
from tests.endpoints.test_every_transport import beside

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("own_state")]

TOWERS = topology_from(
    {
        "nodes": ["edge", "tower-a", "tower-b", "cloud"],
        "links": [
            {"name": "radio-a", "a": "edge", "b": "tower-a", "profile": "rate=20mbit,delay=5ms"},
            {"name": "radio-b", "a": "edge", "b": "tower-b", "profile": "rate=20mbit,delay=5ms"},
            {"name": "fibre-a", "a": "tower-a", "b": "cloud", "profile": "rate=100mbit,delay=1ms"},
            {"name": "fibre-b", "a": "tower-b", "b": "cloud", "profile": "rate=100mbit,delay=1ms"},
        ],
    },
    "towers",
    "towers",
)
PAYLOAD = os.urandom(2_500_000)  # one second's worth of a radio link


def transferred(
    fabric: Fabric, name: str, patience_s: float, keep_address: bool, down: bool = False
) -> tuple[bool, float]:
    """Whether a payload came whole that was under way, up or down, when the edge went over, and how long it was by no link."""
    transport = parse(name)
    with inside(fabric.namespace("cloud")):
        listener = transport.listen()
    with inside(fabric.namespace("edge")):
        client = transport.connect(fabric.address("cloud"), listener.port, None, 10.0)
    server = listener.accept()
    sender, receiver = (server, client) if down else (client, server)
    client.send(
        wire.Request(1, "split", "int8", "", "Q?", "", 1), b"", Deadline(10.0)
    )  # who opens the stream
    server.receive(0, Deadline(10.0))
    ended: list[EndpointError] = []

    def send() -> None:
        try:
            sender.send(wire.Request(1, "split", "int8", "", "Q?", "", 1), PAYLOAD, Deadline(patience_s))
        except EndpointError as error:
            ended.append(error)

    sending = beside(send)

    def over() -> None:
        time.sleep(0.4)
        lasted.append(hand_over(fabric.state, "edge", "radio-b", 0.2, keep_address=keep_address))

    lasted: list[float] = []
    moving = beside(over)
    try:
        frame = receiver.receive(len(PAYLOAD), Deadline(patience_s))
        came = frame is not None and frame.payload == PAYLOAD
    except EndpointError:
        came = False
    moving.join()
    client.abort()
    server.abort()
    listener.close()  # who leads what comes from a new address to its connection
    sending.join()
    return came, lasted[0]


@pytest.mark.parametrize("name", ["tcp", "quic"])
def test_a_transfer_goes_on_where_the_edge_keeps_its_address(name: str) -> None:
    with Fabric.build(TOWERS, "userspace") as fabric:
        came, lasted = transferred(fabric, name, 15.0, True)
        counted = {link: fabric.counters(link)["up"].bytes for link in ("radio-a", "radio-b")}
    assert came and lasted >= 0.2
    assert min(counted.values()) > 100_000  # both carried a part of it


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_a_transfer_by_quic_goes_on_from_a_new_address(down: bool) -> None:
    with Fabric.build(TOWERS, "userspace") as fabric:
        came, _ = transferred(fabric, "quic", 15.0, False, down)
        counted = {
            link: fabric.counters(link)["down" if down else "up"].bytes for link in ("radio-a", "radio-b")
        }
    assert came
    assert min(counted.values()) > 100_000


def test_a_transfer_by_tcp_ends_where_the_edge_gets_a_new_address() -> None:
    with Fabric.build(TOWERS, "userspace") as fabric:
        came, _ = transferred(fabric, "tcp", 4.0, False)
        assert not came
        again = parse("tcp")  # which finds the cloud from the new address
        with inside(fabric.namespace("cloud")):
            listener = again.listen()
        with inside(fabric.namespace("edge")):
            client = again.connect(fabric.address("cloud", "fibre-a"), listener.port, None, 10.0)
        client.close()
        listener.close()
        assert fabric.counters("radio-b")["up"].packets > 0


def test_an_edge_goes_over_and_back_and_not_to_where_it_cannot() -> None:
    with Fabric.build(TOWERS, "userspace") as fabric:
        for link in ("radio-b", "radio-a", "radio-b"):
            before = fabric.counters(link)["up"].packets
            hand_over(fabric.state, "edge", link, 0.0)
            with inside(fabric.namespace("cloud")):
                waiting = parse("tcp").listen()
            with inside(fabric.namespace("edge")):
                parse("tcp").connect(fabric.address("cloud"), waiting.port, None, 5.0).close()
            waiting.close()
            assert fabric.counters(link)["up"].packets > before
        said = command("handover", "edge", "radio-a", "--id", fabric.id, "--outage", "20ms", "--json")
        assert said.status == 0 and json.loads(said.out)["outage_s"] >= 0.02
        wrong = command("handover", "edge", "radio-a", "--id", fabric.id, "--outage", "2h")
        assert (wrong.status, wrong.errors.count("\n")) == (2, 1)
        with pytest.raises(SpecError, match="no link 'radio-c'"):
            hand_over(fabric.state, "edge", "radio-c", 0.0)
        with pytest.raises(UsageError, match="edge is not on link fibre-a; it has radio-a, radio-b"):
            hand_over(fabric.state, "edge", "fibre-a", 0.0)
