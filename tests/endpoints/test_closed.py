"""A data path that is closed: who has not the run's secret is served nothing, soon, and in nobody's way."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from testbed.deadline import Deadline
from testbed.endpoints.protocol import Serve
from testbed.errors import EndpointError, WireError
from testbed.transport import closed as closed_tcp
from testbed.transport import quic as quic_module
from testbed.transport import secret as secret_module
from testbed.transport import wire
from testbed.transport.secret import Secret, secrets
from testbed.transport.transport import Listener, Stream, parse
from tests.endpoints.pair import Pair, in_this_process
from tests.endpoints.test_every_transport import beside
from tests.endpoints.test_wire import request

TRANSPORTS = ["tcp", "tcp(connection=reuse)", "quic", "datagram", "datagram(connections=3)"]


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


def test_another_certificate_by_the_same_key_and_name_is_another() -> None:
    """It would pass for one that the known one signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    serving, asking = secrets()
    known = x509.load_pem_x509_certificate(asking.certificate)
    key = serialization.load_pem_private_key(asking.key, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    other = (
        x509.CertificateBuilder(known.subject, known.subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(known.not_valid_before_utc)
        .not_valid_after(known.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )
    forged = structs.replace(asking, certificate=other.public_bytes(serialization.Encoding.PEM))
    with parse("tcp").closed(serving).listen("127.0.0.1") as listener:
        with pytest.raises((EndpointError, WireError)):
            client = parse("tcp").closed(forged).connect("127.0.0.1", listener.port, None, 5.0)
            client.receive(0, Deadline(5.0))
            raise EndpointError("it was closed")
        assert listener._ready.empty()  # type: ignore[attr-defined]


def test_nothing_older_than_tls_1_3_is_spoken() -> None:
    """Not even with who has the right certificate."""
    serving, asking = secrets()
    own = closed_tcp._context.__wrapped__
    with parse("tcp").closed(serving).listen("127.0.0.1") as listener:
        context = own(asking, True)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        stranger = socket.create_connection(("127.0.0.1", listener.port))
        with stranger, pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(stranger)


def test_no_disk_has_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    opened = os.open

    def noticed(path: str, flags: int, *about: int, **more: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            written.append(path)
        return opened(path, flags, *about, **more)

    monkeypatch.setattr(os, "open", noticed)
    client, server = pair_of("tcp", *secrets())
    client.close(), server.close()
    assert not written


def test_what_a_stranger_says_makes_no_line_of_its_own_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    secret_module.Complaints().say("192.0.2.1", "bye\nrefused nobody: \x1b[2J" + "x" * 10_000)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("refused 192.0.2.1: bye?refused") and "\x1b" not in line and len(line) < 300


def test_few_datagrams_are_kept_of_who_has_not_told_the_token() -> None:
    serving, asking = secrets()
    open_ = parse("datagram").closed(structs.replace(asking, token=b""))  # nothing is told
    with parse("datagram").closed(serving).listen("127.0.0.1") as listener:
        client = open_.connect("127.0.0.1", listener.port, None, 5.0)
        (connection,) = listener._known.values()  # type: ignore[attr-defined]
        client.connection.send_datagrams([bytes(1000)] * 1000, Deadline(5.0))  # type: ignore[attr-defined]
        until = time.monotonic() + 3
        while connection._unread < 60_000 and time.monotonic() < until:
            time.sleep(0.01)
        assert 60_000 <= connection._unread <= 70_000
        client.close()


def silent(port: int, secret: Secret) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


def hesitant(port: int, secret: Secret) -> socket.socket:
    """The right certificate, and no token."""
    stream = parse("tcp").closed(structs.replace(secret, token=b"")).connect("127.0.0.1", port, None, 5.0)
    return stream.socket  # type: ignore[attr-defined, no-any-return]


def by_quic(port: int, secret: Secret) -> Stream:
    """A handshake, and no token."""
    return parse("quic").connect("127.0.0.1", port, None, 5.0)


@pytest.mark.parametrize(
    ("transport", "stranger"), [("tcp", silent), ("tcp", hesitant), ("quic", by_quic), ("datagram", by_quic)]
)
def test_thirty_strangers_at_once_hold_no_request_up(
    alone: Pair,
    transport: str,
    stranger: Callable[[int, Secret], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(closed_tcp, "_MOST_PENDING", 8)
    serving, asking = secrets()
    port = alone.cloud.call(Serve(1 << 22, transport=transport, secret=serving, address="127.0.0.1"), 10)
    strangers = [stranger(port, asking) for _ in range(30)]
    about = {"transport": transport, "port": port, "secret": asking, "name": f"{transport} {stranger}"}
    assert alone.ask("int8", link=about).answer == alone.ask("int8").answer
    for one in strangers:
        one.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[Listener, bytes]]:
    """One that is closed, and the greeting of a client that would be let in."""
    serving, asking = secrets()
    with (
        parse("tcp").closed(serving).listen("127.0.0.1") as listener,
        socket.create_server(("127.0.0.1", 0)) as deaf,
    ):
        port = deaf.getsockname()[1]

        def knock() -> None:
            with pytest.raises(EndpointError):
                parse("tcp").closed(asking).connect("127.0.0.1", port, None, 5.0)

        thread = beside(knock)
        with deaf.accept()[0] as heard:
            greeting = heard.recv(4096)
        thread.join()
        yield listener, greeting


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.booleans(), st.integers(0, 500), st.integers(1, 255))
def test_any_bytes_instead_of_a_handshake_are_refused(
    listener: tuple[Listener, bytes], noise: bytes, greets: bool, at: int, by: int
) -> None:
    """Among them a client's own greeting in which a byte is another."""
    listening, greeting = listener
    if greets:
        changed = bytearray(greeting)
        changed[at % len(changed)] ^= by
        noise = bytes(changed) + noise
    with socket.create_connection(("127.0.0.1", listening.port)) as stranger:
        stranger.settimeout(10.0)
        try:
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):  # a greeting or an alert, perhaps
                pass
        except ConnectionError:
            pass
    assert listening._ready.empty()  # type: ignore[attr-defined]


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


def test_a_flood_from_one_address_pushes_nobody_at_another_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_tcp, "_MOST_PENDING", 8)
    serving, asking = secrets()
    with parse("tcp").closed(serving).listen("127.0.0.1") as listener:
        ours = socket.create_connection(("127.0.0.1", listener.port), source_address=("127.0.0.2", 0))
        flood = [silent(listener.port, asking) for _ in range(30)]
        stream = closed_tcp.closed(ours, asking, True, Deadline(5.0))
        server = listener.accept()
        for end in (stream, server, *flood):
            end.close()


@pytest.mark.parametrize("transport", ["quic", "datagram(connections=3)"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_handshakes_over_quic_that_nobody_ends_keep_nobody_out(
    transport: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there is room for: from the client's own address, begun before; and from another one, without end."""
    monkeypatch.setattr(quic_module, "_MOST_PENDING", 8)
    monkeypatch.setattr(quic_module, "PATIENCE_S", 60.0)
    serving, asking = secrets()
    over = threading.Event()

    def begin(port: int, source: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.bind((source, 0))
            stranger.sendto(b"\xc0\x00\x00\x00\x01\x08" + os.urandom(1300), ("127.0.0.1", port))

    def flood(port: int) -> None:
        while not over.wait(0.002):
            begin(port, "127.0.0.2")

    with parse(transport).closed(serving).listen("127.0.0.1") as listener:
        for _ in range(100):
            begin(listener.port, "127.0.0.1" if not goes_on else "127.0.0.2")
        flooding = beside(lambda: flood(listener.port) if goes_on else None)
        client = parse(transport).closed(asking).connect("127.0.0.1", listener.port, None, 10.0)
        server = listener.accept()
        client.send(wire.Enough(3))
        came = server.receive(0, Deadline(5.0))
        over.set()
        flooding.join()
        assert came is not None and came.header == wire.Enough(3)
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
