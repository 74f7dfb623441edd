"""What an endpoint says is looked at before it is believed."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from testbed import __version__
from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import VERSION, Compute, Examine, Forget, Hello, Serve, TrialRequest
from testbed.errors import EndpointError, UsageError
from testbed.hosts.channel import Channel, Refused
from testbed.hosts.host import Process

TRIAL = {
    "stages": {"transmit_s": 1.0},
    "e2e_s": 1.0,
    "spans": [],
    "reused": [],
    "replayed": False,
    "answer": "",
}
TRIAL |= {"answer_tokens": 1, "token_s": None}
OUTCOME = {"tokens_kept": 3, "nll": 0.5}
COMPUTED = {"tokens": 128, "seconds": 0.1, "share": None}
NOW = {"version": VERSION, "testbed": __version__}
NAN, INF = float("nan"), float("inf")

Answering = Callable[[Any, Any], Endpoint]


class Answers:
    """A process that answers the given messages with the given values."""

    def __init__(self, handlers: dict[type, Any]) -> None:
        ours, self._theirs = socket.socketpair()
        self.channel, other = Channel(ours, ours), Channel(self._theirs, self._theirs)
        known = {kind: lambda message, answer=answer: answer for kind, answer in handlers.items()}
        threading.Thread(target=other.serve, args=(known,), daemon=True).start()

    def status(self, within_s: float | None = 0.0) -> None: ...

    def stopped_s(self) -> float:
        return 0.0


def endpoint(handlers: dict[type, Any]) -> Endpoint:
    return Endpoint("edge", cast(Process, Answers({Hello: NOW, **handlers})))


@pytest.mark.parametrize(
    ("message", "good", "change", "place"),
    [
        (TrialRequest("edge", 0, 0), TRIAL, {"stages": {"transmit_s": -1e12}}, "stages"),
        (TrialRequest("edge", 0, 0), TRIAL, {"stages": {"score": 1.0}}, "unknown field `score`"),
        (TrialRequest("edge", 0, 0), TRIAL, {"e2e_s": 2.0}, "stages sum to 1.0.* `e2e_s` is 2.0"),
        (TrialRequest("edge", 0, 0), TRIAL, {"e2e_s": NAN}, "e2e_s"),
        (TrialRequest("edge", 0, 0), TRIAL, {"spans": [("transmit", 0.0, NAN)]}, "spans"),
        (TrialRequest("edge", 0, 0), TRIAL, {"e2e_s": -0.1}, "e2e_s"),
        (TrialRequest("edge", 0, 0), TRIAL, {"payload_bytes": -1}, "payload_bytes"),
        (TrialRequest("edge", 0, 0), TRIAL, {"reused": "prefill"}, "reused"),
        (TrialRequest("edge", 0, 0), TRIAL, {"answer": None}, "answer"),
        (TrialRequest("edge", 0, 0), TRIAL, {"more": 1}, "unknown field `more`"),
        (Examine(1, "x"), OUTCOME, {"nll": INF}, "nll"),
        (Compute(), COMPUTED, {"seconds": -1.0}, "seconds"),
        (Compute(), COMPUTED, {"seconds": NAN}, "seconds"),
        (Compute(), COMPUTED, {"seconds": 0.0}, "seconds"),
        (Compute(), COMPUTED, {"share": 1.5}, "share"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error_that_names_its_place(
    message: Any, good: dict[str, Any], change: dict[str, Any], place: str
) -> None:
    assert endpoint({type(message): good}).call(message, 10)
    strange = endpoint({type(message): good | change})
    with pytest.raises(EndpointError, match=f"edge: an answer that cannot be: .*{place}"):
        strange.call(message, 10)
    assert strange.alive


@pytest.mark.parametrize(
    "greeting", [{"version": 0, "testbed": "0.0.1"}, {"version": VERSION + 1, "testbed": "0.0.1", "x": 1}]
)
def test_a_testbed_that_speaks_another_version_is_refused_by_name_with_the_remedy(
    greeting: dict[str, Any],
) -> None:
    said = rf"the edge: its testbed 0\.0\.1 speaks version {greeting['version']} .* install testbed {__version__} there"
    with pytest.raises(UsageError, match=said):
        endpoint({Hello: greeting, Serve: 1}).call(Serve(1), 10)


def test_a_message_that_an_endpoint_does_not_know_is_refused_and_the_next_one_answered() -> None:
    asked = endpoint({Serve: 4711})
    with pytest.raises(EndpointError, match=r"edge: a message that cannot be: .*forget"):
        asked.call(Forget(), 10)
    assert asked.call(Serve(1), 10) == 4711


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, ours), theirs


@pytest.mark.parametrize(
    "result",
    [
        b"\xc1",  # no MessagePack
        b"\x91" * 100_000,  # without an end
        b"\xdd\xff\xff\xff\xff",  # so many items, says it
        b"\xa2\xff\xff",  # no text
        b"\x81\xa1x\x01",  # of another kind
    ],
)
def test_bytes_that_are_no_answer_are_one_error(ends: tuple[Channel, socket.socket], result: bytes) -> None:
    channel, other = ends
    body = b"\x82\xa6number\x01\xa6result" + result
    other.sendall(struct.pack("!I", len(body)) + body)
    with pytest.raises(
        EndpointError, match=r"malformed message on the control|an answer that cannot be"
    ) as error:
        channel.call("x", str, 5.0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    if result.startswith((b"\xa2", b"\x81")):
        assert error.type is Refused  # the other end lives
