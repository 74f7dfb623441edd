"""Every transport over a link that loses packets: what comes is what was sent; what is lost is missing, and not waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.hosts.namespaces import inside
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from testbed.transport import wire
from testbed.transport.secret import Secret, secrets
from testbed.transport.transport import parse
from tests.endpoints.test_every_transport import beside

pytestmark = pytest.mark.netns

CHUNKS = [os.urandom(40_000) for _ in range(10)]


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """Two nodes, and a link that loses a twentieth of all packets and delays some of them past others."""
    profile = parse_profile("rate=20mbit,delay=5ms,jitter=normal(1ms,reorder),loss=5%")
    topology = Topology("loss", (Node("edge"), Node("cloud")), (Link("link", "edge", "cloud", profile),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", str(tmp_path_factory.mktemp("state")))
        with Fabric.build(topology, "userspace") as built:
            yield built


def crossed(fabric: Fabric, name: str) -> tuple[dict[int, bytes], wire.End, float]:
    """What comes of the chunks, the end that says how many there were, and the share of what was sent that the link lost."""
    transport = parse(name)
    with inside(fabric.namespace("cloud")):
        listener = transport.listen()
    with inside(fabric.namespace("edge")):
        client = transport.connect(fabric.address("cloud"), listener.port, None, 20.0)
    server = listener.accept()
    listener.close()

    def send() -> None:
        deadline = Deadline(60.0)
        client.send(wire.Request(1, "split", "int8", "", "Q?", "", 1), deadline=deadline)
        for index, chunk in enumerate(CHUNKS):
            client.send_chunk(wire.Chunk(1, index, False, None), chunk, deadline, priority=index // 4)
        client.send(wire.End(1, len(CHUNKS), sum(map(len, CHUNKS))), deadline=deadline)
        sent.append(client.stats().sent)
        client.finish()

    sent: list[int] = []
    sending = beside(send)
    begun = server.receive_request(Deadline(60.0), 60.0)
    assert begun is not None
    *chunks, end = server.receive_context(begun[0], 1 << 20, begun[1])
    server.finish()
    sending.join()
    assert isinstance(end.header, wire.End)
    came = {f.header.index: bytes(f.payload) for f in chunks if isinstance(f.header, wire.Chunk)}
    assert len(came) == len(chunks)
    return came, end.header, 1 - server.stats().received / sent[0]


@pytest.mark.parametrize("name", ["tcp", "quic"])
def test_what_loses_nothing_brings_every_chunk(fabric: Fabric, name: str) -> None:
    came, _, _ = crossed(fabric, name)
    assert came == dict(enumerate(CHUNKS))


@pytest.mark.parametrize("fec", [0.0, 0.02, 0.1])
def test_what_may_lose_chunks_brings_them_as_they_were_sent_or_not_at_all(fabric: Fabric, fec: float) -> None:
    came, end, lost = crossed(fabric, f"datagram(fec={fec})")
    assert end.chunks == len(CHUNKS)
    assert (
        lost < 0.12
    )  # by the link, a twentieth; by its queue, none: the sender keeps to its congestion window
    assert all(CHUNKS[index] == chunk for index, chunk in came.items())
    if fec == 0.1:  # a loss of as much would be made up for in all but one of 10,000 blocks of these
        assert set(came) >= {0, 1, 2, 3}


@pytest.mark.parametrize("closed_to", [None, secrets()], ids=["open", "closed"])
def test_a_congestion_control_of_its_own_is_not_the_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_to: tuple[Secret, Secret] | None
) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path))
    link = Link("link", "edge", "cloud", parse_profile("rate=20mbit"), congestion="reno")
    with Fabric.build(Topology("route", (Node("edge"), Node("cloud")), (link,)), "userspace") as fabric:
        for name, known in (("tcp", "reno"), ("tcp(congestion=bbr)", "bbr")):
            edge, cloud = (
                (parse(name), parse(name))
                if closed_to is None
                else [parse(name).closed(secret) for secret in closed_to]
            )
            with inside(fabric.namespace("cloud")):
                listener = cloud.listen()
            with inside(fabric.namespace("edge")):
                client = edge.connect(fabric.address("cloud"), listener.port)
            server = listener.accept()
            assert [side.stats().congestion for side in (client, server)] == [known, known]
            for one in (client, server, listener):
                one.close()
