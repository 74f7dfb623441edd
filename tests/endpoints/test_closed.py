"""A data path that is closed: who has not the run's secret is served nothing, soon, and in nobody's way."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from testbed.deadline import Deadline
from testbed.endpoints.protocol import Serve
from testbed.errors import EndpointError, WireError
from testbed.transport import closed as closed_tcp
from testbed.transport import secret as secret_module
from testbed.transport import wire
from testbed.transport.secret import Secret, secrets
from testbed.transport.transport import Stream, parse
from tests.endpoints.pair import Pair, in_this_process
from tests.endpoints.test_every_transport import beside
from tests.endpoints.test_wire import request

TRANSPORTS = ["tcp", "tcp(connection=reuse)", "quic", "datagram"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (closed_tcp, secret_module):
        monkeypatch.setattr(module, "PATIENCE_S", 1.0)


def pair_of(transport: str, serving: Secret, asking: Secret | None) -> tuple[Stream, Stream]:
    with parse(transport).closed(serving).listen("127.0.0.1") as listener:
        client = parse(transport).closed(asking).connect("127.0.0.1", listener.port, None, 5.0)
        return client, listener.accept()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_both_ways_at_once_everything_crosses_as_it_was(transport: str) -> None:
    client, server = pair_of(transport, *secrets())
    there, back = os.urandom(3_000_000), [os.urandom(300_000) for _ in range(10)]

    def answers() -> None:
        for index, payload in enumerate(back):
            server.send(wire.Chunk(7, index, False, None), payload)

    client.send(request())
    assert server.receive_request(Deadline(10.0), 10.0) is not None
    answering = beside(answers)
    asking = beside(lambda: client.send(wire.Chunk(7, 0, False, None), there, Deadline(20.0)))
    for payload in back:
        came = client.receive(1 << 20, Deadline(20.0))
        assert came is not None and came.payload == payload
    came = server.receive(1 << 22, Deadline(20.0))
    assert came is not None and came.payload == there
    for thread in (answering, asking):
        thread.join()
    assert client.stats().sent > len(there) and server.stats().sent > sum(map(len, back))
    finishing = beside(client.finish)
    assert server.receive(0, Deadline(5.0)) is None
    server.finish()
    finishing.join()


def test_what_crosses_is_not_what_was_said() -> None:
    serving, asking = secrets()
    seen = bytearray()
    with (
        parse("tcp").closed(serving).listen("127.0.0.1") as listener,
        socket.create_server(("127.0.0.1", 0)) as middle,
    ):

        def pass_on() -> None:
            near, far = middle.accept()[0], socket.create_connection(("127.0.0.1", listener.port))

            def forward(a: socket.socket, b: socket.socket) -> None:
                while data := a.recv(65536):
                    seen.extend(data)
                    b.sendall(data)

            threading.Thread(target=forward, args=(far, near), daemon=True).start()
            forward(near, far)

        threading.Thread(target=pass_on, daemon=True).start()
        client = parse("tcp").closed(asking).connect("127.0.0.1", middle.getsockname()[1], None, 5.0)
        server = listener.accept()
    client.send(request(question="What is the secret word?"))
    assert server.receive_request(Deadline(5.0), 5.0) is not None
    assert len(seen) > 500 and b"secret word" not in seen and asking.token not in seen
    client.close(), server.close()


@pytest.mark.parametrize("transport", ["tcp", "quic"])
@pytest.mark.parametrize("what", ["nothing", "certificate", "token"])
def test_a_stranger_is_served_nothing(transport: str, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    serving, asking = secrets()
    other = secrets()[1]
    stranger = {
        "nothing": None,
        "certificate": structs.replace(other, token=asking.token),
        "token": structs.replace(asking, token=os.urandom(32)),
    }[what]
    with parse(transport).closed(serving).listen("127.0.0.1") as listener:
        with pytest.raises(EndpointError):
            client = parse(transport).closed(stranger).connect("127.0.0.1", listener.port, None, 5.0)
            client.send(request())
            client.receive(0, Deadline(5.0))
            raise EndpointError("it was closed")  # an orderly end is one, too
        client = parse(transport).closed(asking).connect("127.0.0.1", listener.port, None, 5.0)
        server = listener.accept()
        client.send(wire.Enough(3))
        came = server.receive(0, Deadline(5.0))
        assert came is not None and came.header == wire.Enough(3)
        client.close(), server.close()
    said = capfd.readouterr().err
    assert serving.token.hex() not in said and "PRIVATE" not in said
    if transport == "tcp":
        assert said.count("refused 127.0.0.1: ") >= 1


def test_who_says_nothing_or_nonsense_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_tcp, "_MOST_PENDING", 8)
    serving, asking = secrets()
    with parse("tcp").closed(serving).listen("127.0.0.1") as listener:
        strangers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(30)]
        for number, stranger in enumerate(strangers):
            if number % 2:
                stranger.sendall(os.urandom(200) if number % 4 == 1 else b"\x16\x03\x01" + os.urandom(300))
        started = time.monotonic()
        client = parse("tcp").closed(asking).connect("127.0.0.1", listener.port, None, 5.0)
        server = listener.accept()
        assert time.monotonic() - started < 5
        for stranger in strangers:
            stranger.settimeout(5.0)
            try:
                while stranger.recv(4096):  # an alert, perhaps
                    pass
            except ConnectionError:
                pass
            stranger.close()
        while listener._pending and time.monotonic() - started < 20:  # type: ignore[attr-defined]
            time.sleep(0.01)
        assert not listener._pending  # type: ignore[attr-defined]
        client.close(), server.close()


def test_a_changed_byte_ends_the_connection() -> None:
    client, server = pair_of("tcp", *secrets())
    client.socket.send(b"\x17\x03\x03\x00\x20" + os.urandom(32))  # type: ignore[attr-defined]
    with pytest.raises(WireError, match="no TLS"):
        server.receive(1 << 20, Deadline(5.0))
    client.close(), server.close()


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_requests_give_the_same_answers(alone: Pair, transport: str) -> None:
    serving, asking = secrets()
    port = alone.cloud.call(Serve(1 << 22, transport=transport, secret=serving, address="127.0.0.1"), 10)
    link = {"transport": transport, "port": port, "secret": asking, "apart": True}
    for about in ({}, {"delivery": "stream(chunk=64)"}, {"delivery": "stream(chunk=64)"}):
        open_, closed_ = alone.ask("int8", **about), alone.ask("int8", link=link, **about)
        assert (open_.answer, open_.payload_bytes) == (closed_.answer, closed_.payload_bytes)
    with pytest.raises(EndpointError):
        alone.ask("int8", link={**link, "name": "another", "secret": secrets()[1]})
    with pytest.raises(EndpointError):
        alone.ask("int8", link={**link, "name": "none", "secret": None, "timeout": 3.0})


def test_a_secret_is_in_no_text() -> None:
    secret = secrets()[0]
    serve = Serve(1, secret=secret)
    assert ssl.PEM_cert_to_DER_cert(secret.certificate.decode())
    assert "PRIVATE" not in repr(serve) and secret.token.hex() not in repr(serve)
