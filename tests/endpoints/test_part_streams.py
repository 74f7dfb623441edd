"""Streams of chunks that no edge sends: the cloud answers, or says why not, and goes on."""

from __future__ import annotations

import contextlib
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.deadline import Deadline
from testbed.endpoints.protocol import Serve, TrialResult
from testbed.errors import EndpointError, WireError
from testbed.transport import wire
from testbed.transport.quic import QuicStream
from testbed.transport.tcp import Tcp, TcpStream
from testbed.transport.transport import Stream, parse
from tests.endpoints.pair import Pair, in_this_process

#: What the cloud did not expect would end a thread of it.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

Frame = tuple[wire.Header, bytes]
#: By delivery, what a request in it asks for.
WAYS: dict[str, dict[str, str]] = {
    "stream(chunk=64)": {},
    "stream(by=layers, chunk=1)": {},
    "adaptive(levels=[int8, text, skip], deadline=1min, chunk=64)": {},
    "adaptive(levels=[int8, text], policy=fixed(level=1), chunk=64)": {},
    "meet(chunk=64)": {"placement": "store"},
    "progressive(planes=2)": {"what": "planes(bits=4)"},
    "whole": {"placement": "scout", "what": "random@0.5"},
}
#: What a request asks for beside a delivery, where that is not all.
OTHERS: dict[str, dict[str, str]] = {
    "split, whole": {"delivery": "whole"},
    "store, whole": {"delivery": "whole", "placement": "store"},
    "cloud, whole": {"delivery": "whole", "what": "cloud"},
    "store, stream(chunk=64)": {"delivery": "stream(chunk=64)", "placement": "store"},
    "store, stream(by=layers, chunk=1)": {"delivery": "stream(by=layers, chunk=1)", "placement": "store"},
    "split, meet(chunk=64)": {"delivery": "meet(chunk=64)", "placement": "split"},
    "store, progressive(planes=2)": {
        "delivery": "progressive(planes=2)",
        "placement": "store",
        "what": "planes(bits=4)",
    },
}
#: Of which chunks may be lost: those of a part, and of a whole.
LOSSY = (
    "stream(chunk=64)",
    "adaptive(levels=[int8, text, skip], deadline=1min, chunk=64)",
    "store, stream(chunk=64)",
    "split, whole",
    "store, whole",
    "cloud, whole",
)
#: Every placement, delivery and transport, each pair of them; all ways by TCP are below.
CROSSED = [
    *(("quic", way) for way in (*WAYS, *OTHERS)),
    *(("datagram(repeats=0)", way) for way in LOSSY),
    *(("tcp", way) for way in OTHERS),
]
SAID = (wire.FirstToken, wire.Answer, wire.Failure, wire.Receipt, wire.Enough, wire.Verdict)


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


@pytest.fixture(scope="module")
def recorded(pair: Pair) -> dict[str, list[Frame]]:
    """What the edge sends of a request, by delivery."""
    return {way: recording(pair, way) for way in (*WAYS, *OTHERS)}


@pytest.fixture(scope="module")
def ports(pair: Pair) -> dict[str, int]:
    return {
        transport: pair.cloud.call(Serve(1 << 22, request_s=1.0, transport=transport), 10)
        for transport in dict.fromkeys(transport for transport, _ in CROSSED)
    }


def asked(pair: Pair, way: str, **about: Any) -> TrialResult:
    own = OTHERS[way] if way in OTHERS else {"delivery": way, **WAYS[way]}
    return pair.ask(**{"what": "int8", **own, **about})  # type: ignore[arg-type]


def recording(pair: Pair, delivery: str) -> list[Frame]:
    frames: list[Frame] = []
    with Tcp().listen("127.0.0.1") as listener:

        def record() -> None:
            connection = listener.accept()
            while not frames or not isinstance(frames[-1][0], wire.End):
                received = connection.receive(1 << 24, Deadline(20.0))
                assert received is not None
                frames.append((received.header, bytes(received.payload)))
            connection.finish()

        recorder = threading.Thread(target=record)
        recorder.start()
        with pytest.raises(EndpointError, match="closed the connection without an answer"):
            asked(pair, delivery, link={"port": listener.port})
        recorder.join()
    return frames


def replies(
    pair: Pair, frames: list[Frame], transport: str = "tcp", port: int = 0, then: str = "ends"
) -> list[wire.Header]:
    """What the cloud says to these frames, until it has answered, refused or closed the connection. then: what follows them: the
    stream `ends`; it ends `inside` one more frame; or nothing, and the peer is `gone`, or `silent`.
    """
    stream = parse(transport).connect("127.0.0.1", port or pair.link.port, None, 10.0)
    said: list[wire.Header] = []
    try:
        with contextlib.suppress(EndpointError):  # it closed before it took all of them
            for header, payload in frames:
                send = stream.send_chunk if isinstance(header, wire.Chunk) else stream.send
                send(header, payload, Deadline(10.0))  # type: ignore[operator]
            if then == "inside":
                whole = wire.pack(wire.End(1, 2, 3), 0)
                stream.write([memoryview(whole[:-1])], Deadline(10.0))
        if then == "gone":
            return said
        if then != "silent":
            ended(stream)
        with contextlib.suppress(EndpointError, WireError):  # a reset
            while (frame := stream.receive(0, Deadline(30.0))) is not None:
                said.append(frame.header)
                if isinstance(stream, QuicStream) and isinstance(frame.header, wire.Answer | wire.Failure):
                    break  # who sent what was lost might be asked for it again
    finally:
        stream.close()
    return said


def ended(stream: Stream) -> None:
    """Nothing more comes."""
    if isinstance(stream, QuicStream):
        stream.connection.end()
    else:
        assert isinstance(stream, TcpStream)
        with contextlib.suppress(OSError):
            stream._out.shutdown(1)


@pytest.mark.parametrize(
    ("transport", "way", "then"),
    [
        *((*crossed, then) for crossed in CROSSED for then in ("ends", "inside", "gone")),
        *((*crossed, "silent") for crossed in CROSSED[::4]),  # the cloud's second each time
    ],
)
def test_a_stream_cut_anywhere_over_any_transport_is_an_answer_to_what_came_or_a_refusal_and_never_a_wait(
    pair: Pair, recorded: dict[str, list[Frame]], ports: dict[str, int], transport: str, way: str, then: str
) -> None:
    honest, port = recorded[way], ports[transport]
    # Behind a request alone, in mid-context, and before its end.
    for count in sorted({1, len(honest) // 2, len(honest) - 1} if then != "silent" else {len(honest) // 2}):
        began = time.monotonic()
        said = replies(pair, honest[:count], transport, port, then)
        assert time.monotonic() - began < 15.0
        assert then == "gone" or (said and isinstance(said[-1], wire.Answer | wire.Failure | wire.Verdict))
        if count == 1 and then != "gone":
            assert [type(header) for header in said] == [wire.Failure]
    assert isinstance(replies(pair, honest, transport, port)[-1], wire.Answer | wire.Verdict)


@pytest.mark.parametrize("delivery", WAYS)
def test_what_an_edge_sends_is_answered_whoever_sends_it(
    pair: Pair, recorded: dict[str, list[Frame]], delivery: str
) -> None:
    said = replies(pair, recorded[delivery])
    answer = said[-2 if delivery.startswith("progressive") else -1]
    assert isinstance(answer, wire.Answer) and set(map(type, said)) <= set(SAID) - {wire.Failure}
    assert answer.text == asked(pair, delivery).answer


@pytest.mark.parametrize("delivery", WAYS)
def test_a_connection_cut_at_any_chunk_is_an_error_and_no_wait(
    pair: Pair, recorded: dict[str, list[Frame]], delivery: str
) -> None:
    for count in range(1, len(recorded[delivery])):
        said = replies(pair, recorded[delivery][:count])
        # Where only the end is missing, the layers are all there: the question was read through them. Of planes the first ones
        # are enough, and all of the text is.
        enough = {"stream(by=layers, chunk=1)": 4, "meet(chunk=64)": 2, "progressive(planes=2)": 4}
        if count < enough.get(delivery, len(recorded[delivery])):
            assert [type(header) for header in said if not isinstance(header, wire.Receipt)] == [wire.Failure]
        assert isinstance(said[-1], wire.Failure | wire.Answer)


def parts_of(frames: list[Frame], tokens: list[tuple[int, int]]) -> list[Frame]:
    """A request of these parts of its context, each with the payload of the honest one that begins there."""
    request, *chunks, _ = frames
    honest = {header.start: (header, payload) for header, payload in chunks if isinstance(header, wire.Chunk)}
    made: list[Frame] = [request]
    for index, (start, stop) in enumerate(tokens):
        header, payload = honest[start]
        made.append(
            (msgspec.structs.replace(header, index=index, last=False, start=start, stop=stop), payload)
        )
    request_id = request[0].id  # type: ignore[union-attr]
    return [*made, (wire.End(request_id, len(tokens), sum(len(payload) for _, payload in made)), b"")]


@pytest.mark.parametrize(
    "tokens", [[(0, 64), (64, 128), (0, 64)], [(0, 64), (0, 0)], [(0, 128), (64, 128)], [(64, 192), (0, 65)]]
)
def test_a_part_that_has_come_is_refused_so_that_what_is_left_out_is_counted(
    pair: Pair, recorded: dict[str, list[Frame]], tokens: list[tuple[int, int]]
) -> None:
    said = replies(pair, parts_of(recorded["stream(chunk=64)"], tokens))
    assert [type(header) for header in said] == [wire.Failure]
    some = replies(pair, parts_of(recorded["stream(chunk=64)"], [(64, 128), (0, 64)]))[-1]
    assert isinstance(some, wire.Answer) and some.left_out == 297 - 128


@pytest.mark.parametrize(
    "delivery", ["stream(chunk=64)", "adaptive(levels=[int8, text], policy=fixed(level=1), chunk=64)"]
)
def test_by_datagrams_chunks_may_come_in_any_order_and_those_that_do_not_are_counted(
    pair: Pair, recorded: dict[str, list[Frame]], delivery: str
) -> None:
    honest, port = recorded[delivery], pair.cloud.call(Serve(1 << 22, transport="datagram(repeats=0)"), 10)
    (request, _), *chunks, (end, _) = honest
    assert isinstance(end, wire.End)

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.permutations(chunks), st.integers(0, len(chunks)))
    def check(shuffled: list[Frame], lost: int) -> None:
        stream = parse("datagram(repeats=0)").connect("127.0.0.1", port, None, 10.0)
        try:
            stream.send(request)
            for header, payload in shuffled[lost:]:
                stream.send_chunk(header, payload, Deadline(10.0))  # type: ignore[arg-type]
            stream.send(end)
            said: Any = None
            while not isinstance(said, wire.Answer | wire.Failure):
                received = stream.receive(0, Deadline(20.0))
                assert received is not None
                said = received.header
        finally:
            stream.close()
        missing = sum(header.stop - header.start for header, _ in shuffled[:lost])  # type: ignore[union-attr]
        if lost == len(chunks):
            assert isinstance(said, wire.Failure) or said.left_out == 297
        else:
            assert isinstance(said, wire.Answer) and said.left_out == missing, said

    check()


CHANGES: dict[str, Any] = {
    "index": st.integers(0, 300),
    "level": st.integers(0, 3),
    "start": st.integers(0, 1 << 40),
    "stop": st.integers(0, 1 << 40),
    "last": st.booleans(),
    "crc": st.none() | st.integers(0, 1 << 32),
    "chunks": st.integers(0, 300),
    "length": st.integers(0, 1 << 40),
    "tokens": st.integers(0, 1 << 40),
    "levels": st.lists(st.sampled_from(["text", "skip", "int8", "nothing"]), max_size=3).map(tuple),
    "delivery": st.sampled_from([*WAYS, "whole", "pigeon", "stream(chunk=8)"]),
    "placement": st.sampled_from(["split", "store", "cloud", "scout", "edge", ""]),
    "max_new_tokens": st.integers(1, 4),
}


@st.composite
def changed(draw: st.DrawFn, honest: list[Frame]) -> list[Frame]:
    """An honest stream with one to three things wrong with it."""
    frames = list(honest)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(frames) - 1))
        header, payload = frames[at]
        what = draw(st.sampled_from(["drop", "twice", "swap", "field", "bytes"]))
        if what == "drop" and len(frames) > 1:
            del frames[at]
        elif what == "twice":
            frames.insert(at, frames[at])
        elif what == "swap":
            other = draw(st.integers(0, len(frames) - 1))
            frames[at], frames[other] = frames[other], frames[at]
        elif what == "field":
            field = draw(st.sampled_from([name for name in CHANGES if hasattr(header, name)] or ["id"]))
            value = draw(CHANGES.get(field, st.integers(0, 9)))
            frames[at] = (msgspec.structs.replace(header, **{field: value}), payload)
        elif payload:
            cut = draw(st.integers(0, len(payload) - 1))
            frames[at] = (
                header,
                draw(st.sampled_from([payload[:cut], payload + payload[cut:], flipped(payload, cut)])),
            )
    return frames


def flipped(payload: bytes, at: int) -> bytes:
    return payload[:at] + bytes([payload[at] ^ 0x10]) + payload[at + 1 :]


@pytest.mark.parametrize("delivery", WAYS)
def test_streams_that_lie_get_an_answer_or_a_refusal_and_harm_nobody(
    pair: Pair, recorded: dict[str, list[Frame]], delivery: str
) -> None:
    honest = recorded[delivery]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changed(honest))
    def check(frames: list[Frame]) -> None:
        said = replies(pair, frames)
        kinds = [type(header) for header in said]
        assert set(kinds) <= set(SAID)
        if wire.Answer not in kinds and isinstance(frames[0][0], wire.Request):
            assert wire.Failure in kinds

    check()
    assert asked(pair, delivery).answer
    assert pair.ask("int8", delivery="stream(chunk=64)").answer == pair.ask("int8").answer


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "way"), CROSSED)
def test_streams_that_lie_over_any_transport_get_an_answer_or_a_refusal_in_bounded_memory(
    pair: Pair, recorded: dict[str, list[Frame]], ports: dict[str, int], transport: str, way: str
) -> None:
    honest, port = recorded[way], ports[transport]
    tracemalloc.start()

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changed(honest))
    def check(frames: list[Frame]) -> None:
        said = replies(pair, frames, transport, port)
        kinds = [type(header) for header in said]
        assert set(kinds) <= {*SAID, wire.Missing}
        if wire.Answer not in kinds and isinstance(frames[0][0], wire.Request):
            assert wire.Failure in kinds

    try:
        check()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert isinstance(replies(pair, honest, transport, port)[-1], wire.Answer | wire.Verdict)
