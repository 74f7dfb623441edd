"""A link or a side that stands still in mid-stream: an error when the request's time is over, or the answer once it goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.endpoints.protocol import Serve, TrialResult
from testbed.errors import EndpointError
from tests.endpoints.pair import Pair, Within, in_this_process, started
from tests.endpoints.stalling_link import Stalling, stalling

TRANSPORTS = ("tcp", "tcp(connection=reuse)", "quic", "datagram")
ADAPTIVE = "adaptive(levels=[int8, int4, skip], deadline=1s, chunk=64, policy=ewma)"
#: What a delivery is asked for, beside int8 of a stored cache.
DELIVERIES: dict[str, dict[str, str]] = {
    "whole": {},
    "stream(chunk=64)": {},
    "stream(by=layers, chunk=1)": {},
    "meet(chunk=64)": {},
    "progressive(planes=2)": {"what": "planes"},
    ADAPTIVE: {},
}
#: Each delivery and each transport.
WAYS = tuple(
    zip(DELIVERIES, ("datagram", "tcp", "quic", "quic", "tcp(connection=reuse)", "datagram"), strict=True)
)
AFTER = 20_000  #: bytes; of a cache of some 60,000
SLACK_S = 4.0  #: closing takes two seconds; the rest is a machine that has other things to do
SILENT = r"nothing arrived within|no whole frame arrived within|did not take|no whole request|closed"


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


@pytest.fixture(scope="module")
def ports(pair: Pair) -> dict[str, int]:
    return {t: pair.cloud.call(Serve(1 << 22, request_s=2.0, transport=t), 10) for t in TRANSPORTS}


def ask(pair: Pair, delivery: str, transport: str, port: int, timeout: float, name: str) -> TrialResult:
    about = {"what": "int8", "placement": "store", "delivery": delivery, "reuse": "none"}
    link = {"name": name, "transport": transport, "port": port, "timeout": timeout}
    return pair.ask(**{**about, **DELIVERIES[delivery], "link": link})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("delivery", "transport"), WAYS)
def test_a_link_that_stands_still_for_good_ends_a_request_with_its_time_and_no_other(
    pair: Pair, ports: dict[str, int], delivery: str, transport: str
) -> None:
    port, timeout = ports[transport], 1.0
    with stalling(transport, port, AFTER) as (link, through):
        began = time.monotonic()
        try:
            result = ask(pair, delivery, transport, through, timeout, f"stalls: {delivery}")
        except EndpointError as error:
            assert any(word in str(error) for word in SILENT.split("|")), error
        else:  # of planes, the first ones are enough
            assert result.unverified and delivery.startswith("progressive")
        assert link.stalled.is_set()
        assert time.monotonic() - began < timeout + SLACK_S
    assert ask(pair, delivery, transport, port, 20.0, "well").answer_tokens


@pytest.mark.parametrize(("delivery", "transport"), WAYS)
def test_a_link_that_goes_on_in_time_gives_the_answer(
    pair: Pair, ports: dict[str, int], delivery: str, transport: str
) -> None:
    port = ports[transport]
    well = ask(pair, delivery, transport, port, 20.0, "well")
    with stalling(transport, port, AFTER, for_s=0.3) as (link, through):
        result = ask(pair, delivery, transport, through, 20.0, f"pauses: {delivery}")
        assert link.stalled.is_set()
    if not result.tokens_left_out and not delivery.startswith("adaptive"):
        assert result.answer == well.answer


#: Each placement, delivery and transport, and each pair of them.
CUT = [
    ("split", "whole", "quic"),
    ("split", "whole", "datagram"),
    ("store", "whole", "tcp"),
    ("store", "stream(chunk=64)", "quic"),
    ("split", "stream(chunk=64)", "datagram"),
    ("split", "stream(chunk=64)", "tcp"),
    ("store", "stream(by=layers, chunk=1)", "tcp"),
    ("split", "stream(by=layers, chunk=1)", "quic"),
    ("split", "meet(chunk=64)", "tcp(connection=reuse)"),
    ("store", "meet(chunk=64)", "quic"),
    ("store", "progressive(planes=2)", "tcp(connection=reuse)"),
    ("split", "progressive(planes=2)", "quic"),
    ("split", ADAPTIVE, "tcp"),
    ("split", ADAPTIVE, "quic"),
    ("store", ADAPTIVE, "datagram"),
    *(("cloud", "whole", transport) for transport in TRANSPORTS),
    *(("scout", "whole", transport) for transport in ("tcp", "quic")),
]


@pytest.mark.parametrize(("placement", "delivery", "transport"), CUT)
def test_a_link_that_is_cut_anywhere_ends_a_request_at_once_or_leaves_what_was_asked_for(
    pair: Pair, ports: dict[str, int], placement: str, delivery: str, transport: str
) -> None:
    what = {"cloud": "cloud", "scout": "random@0.5"}.get(placement, DELIVERIES[delivery].get("what", "int8"))
    about: dict[str, Any] = {"what": what, "placement": placement, "delivery": delivery, "reuse": "none"}
    if placement == "cloud":
        about.pop("placement")
    timeout, results = 8.0, list[TrialResult]()
    for after in (400, 3_000, 20_000, 50_000):
        with stalling(transport, ports[transport], after, cuts=True) as (_, through):
            link = {
                "name": f"cut {placement} {delivery} {after}",
                "transport": transport,
                "port": through,
                "timeout": timeout,
            }
            began = time.monotonic()
            try:
                results.append(pair.ask(**about, link=link))
            except EndpointError as error:
                assert str(error)
            # A connection is closed within two seconds; a datagram's sender may learn of the end by silence alone.
            assert time.monotonic() - began < (SLACK_S if "tcp" in transport else timeout + SLACK_S)
    well = pair.ask(**about, link={"name": "well", "transport": transport, "port": ports[transport]})
    for result in results:  # the whole had crossed, or as much as is of use
        lacks = result.unverified or result.tokens_left_out or delivery.startswith("adaptive")
        assert lacks or result.answer == well.answer
        assert not result.tokens_left_out or transport == "datagram" or delivery.startswith("adaptive")


@pytest.fixture(scope="module")
def sides(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Each side as a process of its own."""
    with started(tmp_path_factory.mktemp("sides"), tiny_model("llama")) as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize(("delivery", "transport"), WAYS[1:4] + WAYS[5:])
def test_a_cloud_that_is_stopped_in_mid_stream_costs_one_request(
    sides: Pair, delivery: str, transport: str
) -> None:
    port, timeout = sides.cloud.call(Serve(1 << 22, request_s=2.0, transport=transport), 10), 1.0
    assert not isinstance(sides.cloud, Within)
    with stalling(transport, port, AFTER, for_s=0.0) as (link, through):
        stopping = threading.Thread(target=_signalled, args=(link, sides.cloud.process.pid, signal.SIGSTOP))
        stopping.start()
        began = time.monotonic()
        with pytest.raises(EndpointError, match=SILENT):
            ask(sides, delivery, transport, through, timeout, "stopped")
        assert time.monotonic() - began < timeout + SLACK_S
        os.kill(sides.cloud.process.pid, signal.SIGCONT)
        stopping.join()
    assert ask(sides, delivery, transport, port, 20.0, "well").answer_tokens


def _signalled(link: Stalling, pid: int, fate: signal.Signals) -> None:
    """Sends that to the process when the link has carried enough."""
    assert link.stalled.wait(20)
    os.kill(pid, fate)


@pytest.mark.slow
def test_an_edge_that_is_stopped_or_dies_in_mid_stream_leaves_a_cloud_that_answers_others(
    pair: Pair, sides: Pair
) -> None:
    port = sides.cloud.call(Serve(1 << 22, request_s=2.0), 10)
    assert not isinstance(sides.edge, Within)
    for fate, says in ((signal.SIGSTOP, "has been stopped"), (signal.SIGKILL, "signal SIGKILL")):
        with stalling("tcp", port, AFTER) as (link, through):
            ending = threading.Thread(target=_signalled, args=(link, sides.edge.process.pid, fate))
            ending.start()
            began = time.monotonic()
            with pytest.raises(EndpointError, match=says):
                ask(sides, "stream(chunk=64)", "tcp", through, 20.0, "left")
            assert time.monotonic() - began < SLACK_S
            ending.join()
        assert ask(pair, "stream(chunk=64)", "tcp", port, 20.0, "another's").answer_tokens
        if fate == signal.SIGSTOP:
            os.kill(sides.edge.process.pid, signal.SIGCONT)
