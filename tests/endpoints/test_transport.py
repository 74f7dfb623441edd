"""What one more transport takes: a file, and a line in the table."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.endpoints.client import Client
from testbed.endpoints.cloud import Cloud
from testbed.endpoints.protocol import Link, Serve
from testbed.errors import EndpointError, UsageError
from testbed.transport.transport import TRANSPORTS, parse
from tests.endpoints.test_wire import request

#: Long enough for several pieces.
PAYLOAD = bytes(range(256)) * 10_000


@pytest.fixture(params=["tcp", "xor", "quic"])
def transport(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TRANSPORTS, "xor", "tests.endpoints.xor_transport:Xor")
    name: str = request.param
    return name


def test_edge_and_cloud_speak_over_whichever_transport_the_link_names(transport: str) -> None:
    port = Cloud().serve(Serve(1 << 22, request_s=20.0, transport=transport))
    link = Link("127.0.0.1", port, transport=transport, timeout=20.0)
    for asked in (request(prefix="of nobody"), request(prefix="of nobody", id=8)):
        with pytest.raises(EndpointError, match="'of nobody' that this side does not know"):
            Client().ask(asked, [PAYLOAD, PAYLOAD[:999]], link)


def test_the_cloud_listens_at_the_address_that_it_is_told_and_nowhere_else() -> None:
    port = Cloud().serve(Serve(1 << 22, address="127.0.0.1"))
    parse("tcp").connect("127.0.0.1", port, None, 5.0).finish()
    with pytest.raises(EndpointError):
        parse("tcp").connect("127.0.0.2", port, None, 5.0)
    with pytest.raises(UsageError, match=r"cannot listen at 192\.0\.2\.1 .*an address of its own host"):
        Cloud().serve(Serve(1 << 22, address="192.0.2.1"))


def test_an_unknown_transport_is_named_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"'pigeon': unknown; there is tcp"):
        parse("pigeon")
