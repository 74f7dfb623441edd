"""Peers and processes that die, stand still or dribble: noticed at once, named, and never waited for without end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from testbed.deadline import Deadline
from testbed.endpoints.client import Client
from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import Hello, Link, Load, Serve
from testbed.errors import EndpointError, NetworkError, TestbedError
from testbed.experiment.deployment import Pair
from testbed.hosts.channel import Channel, Result, pack
from testbed.hosts.local import Local
from testbed.transport import wire
from testbed.transport.tcp import Tcp, TcpStream
from tests.endpoints.test_wire import arrival

FATES = {signal.SIGKILL: r"ended \(signal SIGKILL\)", signal.SIGSTOP: "has been stopped for 1"}
NOTICED_S = 8.0  #: a second or two, on a machine that has other things to do


@contextlib.contextmanager
def noticed(within_s: float = NOTICED_S) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < within_s


@contextlib.contextmanager
def dribbling(sock: socket.socket, data: bytes) -> Iterator[None]:
    """A peer that sends a byte every twentieth of a second, for as long as somebody listens."""
    done = threading.Event()

    def dribble() -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                if done.wait(0.05):
                    return
                sock.send(bytes([byte]))

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def request(**changes: Any) -> wire.Request:
    return msgspec.structs.replace(wire.Request(7, "split", "int8", "unknown", "Q?", "\n", 4), **changes)


@contextlib.contextmanager
def connected() -> Iterator[tuple[TcpStream, TcpStream]]:
    with Tcp().listen("127.0.0.1") as listener:
        client = Tcp().connect("127.0.0.1", listener.port, None, 5.0)
        server = listener.accept()
        yield client, server
        client.close()
        server.close()


def test_a_frame_that_comes_byte_by_byte_is_given_up_when_its_time_is_over() -> None:
    with connected() as (client, server), dribbling(client.socket, wire.pack(request()) * 9), noticed():
        with pytest.raises(EndpointError, match=r"no whole frame arrived within 0.5 s"):
            server.receive(0, Deadline(None), frame_s=0.5)
        with pytest.raises(EndpointError, match=r"within 0.3 s"):
            server.receive(0, Deadline(0.3))


def test_a_frame_that_nobody_takes_is_given_up_when_its_time_is_over() -> None:
    untaken = pytest.raises(EndpointError, match=r"did not take a whole frame within 0.5 s")
    with connected() as (client, _), noticed(), untaken:
        client.send(request(), bytes(1 << 26), Deadline(0.5))


def test_closing_does_not_wait_for_a_peer_that_goes_on_sending() -> None:
    with connected() as (client, server), dribbling(client.socket, bytes(2000)), noticed():
        server.finish(timeout=0.4)


def test_an_answer_on_the_control_channel_is_whole_in_time_and_belongs_to_its_call() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, ours)
    silence = pytest.raises(EndpointError, match=r"no answer within 0.4 s")
    with dribbling(theirs, bytes([0, 0, 1, 0]) + bytes(300)), noticed(), silence:
        channel.call("slow", str, 0.4)
    ours.close()
    theirs.close()
    ours, theirs = socket.socketpair()
    channel, other = Channel(ours, ours), Channel(theirs, theirs)
    with pytest.raises(EndpointError, match=r"no answer within 0.1 s"):
        channel.call("slow", str, 0.1)
    other.send(Result(1, pack("of the call that was given up")))
    other.send(Result(2, pack("of the second")))
    assert channel.call("next", str, 5.0) == "of the second"


@pytest.fixture(params=["edge", "cloud"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Endpoint]:
    endpoint = Endpoint.start(request.param, Local(), tmp_path / "log")
    with endpoint.process:
        endpoint.call(Hello(), 120)
        yield endpoint


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_an_endpoint_that_dies_or_is_stopped_is_noticed_and_named(
    endpoint: Endpoint, fate: signal.Signals
) -> None:
    assert endpoint.alive
    os.kill(endpoint.process.pid, fate)
    said = rf"the {endpoint.role} process .*{FATES[fate]}"
    with noticed(), pytest.raises(EndpointError, match=said):
        endpoint.call(Hello(), 120)
    assert not endpoint.alive


@pytest.mark.parametrize("endpoint", ["edge"], indirect=True)
def test_what_a_call_depends_on_ends_it(endpoint: Endpoint) -> None:
    def gone() -> None:
        raise NetworkError("link access: its relay (process 7) ended (signal SIGKILL)")

    os.kill(endpoint.process.pid, signal.SIGSTOP)  # or it answers before anybody looks
    with noticed(), pytest.raises(NetworkError, match="link access"):
        endpoint.call(Hello(), 120, gone)


def test_an_answer_that_comes_at_once_hides_no_network_that_is_broken() -> None:
    def broken() -> None:
        raise NetworkError("background traffic has ended")

    endpoint: Any = SimpleNamespace(role="edge", call=lambda *_: None)
    plan: Any = SimpleNamespace(scenario=None)
    with pytest.raises(NetworkError, match="background traffic"):
        Pair(plan, endpoint, endpoint, broken)._call(endpoint, Hello(), 1.0)


def _failure(port: int) -> str:
    """What the cloud says of a request that it cannot answer."""
    connection = Tcp().connect("127.0.0.1", port, None, 5.0)
    try:
        connection.send_request(request(), [], checked=False)
        received = connection.receive(0, Deadline(20.0))
        assert received is not None and isinstance(received.header, wire.Failure)
        return received.header.message
    except TestbedError as error:
        return str(error)
    finally:
        connection.close()


@pytest.mark.parametrize("endpoint", ["cloud"], indirect=True)
def test_the_cloud_serves_whoever_asks_however_many_are_silent_and_says_when_it_is_busy(
    endpoint: Endpoint,
) -> None:
    port = endpoint.call(Serve(1 << 20, request_s=8.0), 120)
    silent, busy = [], []
    for number in range(150):
        silent.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        if number % 2:
            silent[-1].send(wire.pack(request())[:9])  # a header that does not go on
    with noticed(7.0):
        assert "unknown" in _failure(port)
    for _ in range(64):
        busy.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        busy[-1].sendall(wire.pack(request()))  # whose context does not come
    time.sleep(1.0)
    assert "64 requests are under way" in _failure(port)
    deadline = Deadline(60.0)  # their time is over, and their places are free
    while "unknown" not in _failure(port):
        deadline.left()
        time.sleep(0.5)
    for sock in silent + busy:
        sock.close()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_cloud_that_dies_or_stands_still_while_the_edge_is_waited_for_is_named(
    tiny_model: Callable[[str], Path], tmp_path: Path, fate: signal.Signals
) -> None:
    loading = Load(str(tiny_model("llama")), threads=1)  # which takes seconds
    pair = Pair(
        SimpleNamespace(scenario=None),  # type: ignore[arg-type]
        *(Endpoint.start(role, Local(), tmp_path / role) for role in ("edge", "cloud")),
    )
    named = pytest.raises(EndpointError, match=f"the cloud process .*{FATES[fate]}")
    with pair.edge.process, pair.cloud.process:
        threading.Timer(0.5, os.kill, (pair.cloud.process.pid, fate)).start()
        with noticed(0.5 + NOTICED_S), named:
            pair._call(pair.edge, loading, 120.0)
        assert not pair.alive
        for side in (pair.edge, pair.cloud):
            side.process.kill()


Answering = Callable[[float], tuple[dict[str, Any], dict[str, Any]]]


def ask(answering: Answering) -> Any:
    """A request to a cloud whose answer is made up: `answering(now)` changes its first token and its end."""
    with Tcp().listen("127.0.0.1") as listener:

        def answer() -> None:
            connection = listener.accept()
            arrived = arrival(connection, 1 << 20)
            assert arrived is not None
            now = time.monotonic()
            first = wire.FirstToken(7, 3, now)
            worked = (
                wire.Worked("decode", arrived.at, arrived.at),
                wire.Worked("first_token", arrived.at, now),
            )
            whole = wire.Answer(7, "x", 1, arrived.at, (), worked, 0.0, None, 0.0, now, False, 0)
            for header, changes in zip((first, whole), answering(now), strict=True):
                connection.send(msgspec.structs.replace(header, **changes))
            connection.finish()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            return Client().ask(request(), [b"payload"], Link("127.0.0.1", listener.port, timeout=5.0))
        finally:
            thread.join()


@pytest.mark.parametrize(
    "answering",
    [
        lambda now: ({"sent_at": -1e12}, {}),
        lambda now: ({}, {"received_at": -1e12}),
        lambda now: ({}, {"sent_at": float("nan")}),
        lambda now: ({}, {"worked": ()}),
        lambda now: ({}, {"worked": (wire.Worked("first_token", now - 60, now),)}),
        lambda now: ({}, {"worked": (wire.Worked("first_token", now, now + 60),)}),
        lambda now: ({}, {"worked": (wire.Worked("decode", now, now),)}),
        lambda now: ({}, {"arrived": (now, now)}),
        lambda now: ({}, {"arrived": (now - 60,)}),
        lambda now: ({}, {"received_at": now - 60}),
        lambda now: ({"sent_at": now + 60}, {}),
        lambda now: ({}, {"sent_at": now + 1e6}),
        lambda now: ({}, {"generate_s": 60.0}),
        lambda now: ({}, {"tokens": 1 << 30}),
    ],
)
def test_an_answer_in_order_is_taken_and_one_whose_times_cannot_be_is_an_error(answering: Answering) -> None:
    assert all(0 <= s.end - s.start < 5 for s in ask(lambda now: ({}, {})).spans)
    with pytest.raises(TestbedError, match=r"times that cannot be|malformed frame header"):
        ask(answering)
