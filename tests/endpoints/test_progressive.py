"""An answer from the first bit planes, verified behind all of them; cut, changed and disordered streams of planes."""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from testbed.codecs.codec import Codec
from testbed.deadline import Deadline
from testbed.endpoints.arrivals import Arrived
from testbed.endpoints.assembly import Planes
from testbed.endpoints.protocol import Examine, Outcome, Serve, TrialResult
from testbed.errors import EndpointError, PayloadError, SpecError, WireError
from testbed.experiment.plan import make_plan
from testbed.models.loading import load_model
from testbed.transport import protection, wire
from testbed.transport.tcp import Tcp
from testbed.transport.transport import Received, Stream
from tests.endpoints.pair import Pair, in_this_process
from tests.test_files import a_row
from tests.tiny_models import FAMILIES

CODECS = {"planes": 8, "planes(bits=4)+zstd": 4, "window@0.5+planes(bits=3)": 3}


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


def few(planes: int) -> str:
    return f"progressive(planes={planes})"


@pytest.mark.parametrize("placement", ["split", "store"])
@pytest.mark.parametrize("codec", CODECS)
def test_all_planes_give_what_the_whole_gives_and_nothing_is_left_to_verify(
    pair: Pair, codec: str, placement: str
) -> None:
    of = CODECS[codec]
    whole = pair.ask(codec, placement=placement)
    result = pair.ask(codec, placement=placement, delivery=few(of))
    assert (result.answer, result.answer_tokens) == (whole.answer, whole.answer_tokens)
    assert (result.planes, result.chunks, result.levels) == (of, of + 1, f"{codec}*{of + 1}")
    assert (result.changed, result.verified_answer, result.saved_s) == (False, whole.answer, 0.0)
    assert not result.later and result.payload_bytes == whole.payload_bytes
    assert pair.outcome(result) == pair.outcome(pair.ask(codec, placement=placement, reuse="none"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_said_to_have_changed_exactly_where_the_whole_gives_another(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    pair, said = in_this_process(tiny_model(family)), set()
    for example, planes in itertools.product(range(2), (1, 4, 7)):
        whole = pair.ask("planes+zstd", example)
        result = pair.ask("planes+zstd", example, delivery=few(planes))
        assert result.verified_answer == whole.answer
        assert result.changed == (result.answer.strip() != whole.answer.strip())
        said.add(result.changed)
    assert family != "llama" or said == {True, False}


def test_what_is_measured_is_of_the_draft_and_what_comes_behind_it_stands_apart(pair: Pair) -> None:
    full, outcomes = pair.reference(), []
    for placement, planes in itertools.product(("split", "store"), (1, 2, 8)):
        result = pair.ask("planes", placement=placement, delivery=few(planes))
        outcome = pair.outcome(result)
        sent = [span for span in result.spans if span.stage == "transmit"]
        behind = [span for span in result.later if span.stage == "transmit"]
        assert [span.chunk for span in (*sent, *behind)] == list(range(9)) and len(sent) == planes + 1
        assert sum(span.bytes for span in sent) == result.payload_bytes
        assert max(span.end for span in result.spans) == pytest.approx(result.e2e_s)
        assert result.verified_s is not None and result.verified_s > result.e2e_s
        computed = [span for span in result.later if span.side == "cloud"]
        assert all(result.e2e_s - 0.01 < span.start <= span.end < result.verified_s for span in computed)
        stages = [span.stage for span in computed]
        assert stages == ["decode", "first_token", "generate"][: len(stages)] and bool(stages) == (planes < 8)
        outcomes.append((outcome.nll, outcome.payload_digest))
    assert outcomes[:3] == outcomes[3:]  # whoever made it
    assert abs((outcomes[2][0] or 0) - (full.nll or 0)) < abs((outcomes[0][0] or 0) - (full.nll or 0))


def test_a_repeated_request_says_what_it_took_over_and_is_answered_and_verified_anew(pair: Pair) -> None:
    first = pair.ask("random@0.5+planes", delivery=few(2), replay=True)
    again = pair.ask("random@0.5+planes", delivery=few(2), replay=True)
    assert set(again.reused) == {"prefill", "select", "encode"} and again.replayed
    assert (again.answer, again.verified_answer) == (first.answer, first.verified_answer)
    assert again.saved_s != first.saved_s
    stored = pair.ask("planes", delivery=few(2), placement="store")
    assert (stored.reused, stored.stages.prefill_s, stored.stages.encode_s) == ((), 0.0, 0.0)
    assert stored.store_prefill_s > 0 and stored.store_encode_s > 0


def test_a_choice_is_verified_as_it_was_made(tiny_model: Callable[[str], Path]) -> None:
    pair = in_this_process(tiny_model("llama"), task="choice")
    for example, planes in itertools.product(range(3), (1, 5)):
        whole = pair.ask("planes", example)
        result = pair.ask("planes", example, delivery=few(planes))
        assert (result.verified_answer, result.changed) == (whole.answer, result.answer != whole.answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_changes_no_answer(tiny_model: Callable[[str], Path], family: str) -> None:
    model = load_model(str(tiny_model(family)))
    past = model.prefill(model.tokenize("The sky was blue that day, and nobody knew why."), None).cache
    question = model.tokenize("Who knew?")

    @given(st.integers(0, 9), st.lists(st.integers(0, model.vocabulary - 1), max_size=4), st.integers(0, 8))
    def check(agreed: int, other: list[int], limit: int) -> None:
        told: list[tuple[int, int]] = []
        answer = model.generate(question, past, limit, "n")
        draft = [*answer[:agreed], *other]
        found = model.generate(question, past, limit, "n", lambda *each: told.append(each), draft)
        assert found == answer and told == list(enumerate(answer))

    check()


def answers(stream: Stream, request: wire.Request, chunks: Iterator[Received], then: str) -> None:
    """A cloud of one answer, from the first three chunks, behind which something else happens."""
    came = [next(chunks).at for _ in range(3 if then != "nothing" else 2)]
    if then == "nothing":
        return
    now = time.monotonic()
    worked = (wire.Worked("decode", came[-1], now, 2), wire.Worked("first_token", now, now, 2))
    stream.send(wire.FirstToken(request.id, 7, now))
    times = (came[-1], tuple(came), worked, 0.0, None, 0.0, time.monotonic())
    stream.send(wire.Answer(request.id, "said", 2, *times, False, 0, planes=2))
    if then == "failure":
        stream.send(wire.Failure(request.id, "plane 5: a lie"))
    elif then != "end":
        rest = [frame.at for frame in chunks if isinstance(frame.header, wire.Chunk)]
        now = time.monotonic()
        again = (wire.Worked("decode", now, now, 8), wire.Worked("first_token", now, now, 8))
        honest = wire.Verdict(request.id, "said more", 3, 2, tuple(rest), again, time.monotonic())
        lies = {
            "fewer chunks": {"arrived": tuple(rest[1:])},
            "too soon": {"worked": (wire.Worked("decode", 1.0, 1.0, 8), again[1])},
            "no work": {"worked": ()},
            "more agreed": {"agreed": 3},
            "later than now": {"sent_at": now + 9.0},
            "of another": {"id": request.id + 1},
        }
        stream.send(structs.replace(honest, **lies.get(then, {})))


@contextmanager
def a_cloud(then: str) -> Iterator[int]:
    """The port of one that `answers`, and then closes."""
    listener = Tcp().listen("127.0.0.1")

    def serve() -> None:
        stream = listener.accept()
        received = stream.receive_request(Deadline(20.0), 20.0)
        assert received is not None
        chunks = stream.receive_context(received[0], 1 << 22, received[1])
        answers(stream, received[0], chunks, then)
        stream.finish()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.port
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    ("then", "says"), [("end", "closed the connection|broke"), ("failure", "the cloud: plane 5: a lie")]
)
def test_where_later_planes_fail_the_answer_stands_unverified(pair: Pair, then: str, says: str) -> None:
    with a_cloud(then) as port:
        result = pair.ask("planes", delivery=few(2), link={"port": port})
    assert (result.answer, result.planes, result.changed, result.verified_s) == ("said", 2, None, None)
    assert re.search(says, result.unverified)
    row = a_row(1)
    row.fill(result, Outcome(3, 0.5), {"score": 1.0})
    assert (row.planes, row.changed, row.saved_s, row.verified_answer) == (2, None, None, "")


LIES = ("fewer chunks", "too soon", "no work", "more agreed", "later than now", "of another")


@pytest.mark.parametrize("then", ["nothing", *LIES])
def test_without_an_answer_or_with_a_verdict_that_cannot_be_there_is_no_result(pair: Pair, then: str) -> None:
    says = "closed the connection|broke" if then == "nothing" else "verdict cannot be|out of turn"
    with a_cloud(then) as port:
        if then == "of another":  # which is none on this answer
            assert "out of turn" in pair.ask("planes", delivery=few(2), link={"port": port}).unverified
            return
        with pytest.raises(EndpointError, match=says):
            pair.ask("planes", delivery=few(2), link={"port": port})


def test_an_honest_verdict_is_taken(pair: Pair) -> None:
    with a_cloud("verdict") as port:
        result = pair.ask("planes", delivery=few(2), link={"port": port})
    assert (result.changed, result.verified_answer, result.unverified) == (True, "said more", "")


@pytest.fixture(scope="module")
def pieces(pair: Pair, tiny_model: Callable[[str], Path]) -> list[bytes]:
    """A context's chunks, behind the prefix that both sides know."""
    side: Any = pair.cloud
    cloud = side._handlers[Examine].__self__
    prefix = cloud.prefixes[pair.prefix].cache
    cache = cloud.model.prefill(cloud.model.tokenize("Seven doors were open, and nobody came. " * 4), prefix)
    return [bytes(piece) for piece in Codec("planes(bits=4)").chunks(cache.cache)]


def sent(pair: Pair, pieces: list[bytes], numbers: list[int], end: bool = True) -> list[str]:
    """What kinds of frames the cloud says to these chunks, up to the end of the conversation."""
    request = wire.Request(
        1 << 30,
        "split",
        "planes(bits=4)",
        pair.prefix,
        "Q?",
        "",
        4,
        delivery=few(2),
        client="raw",
        levels=("planes(bits=4)",),
        tokens=4096,
    )
    stream = Tcp().connect("127.0.0.1", pair.link.port, None, 20.0)
    stream.send(request)
    for index, number in enumerate(numbers):
        stream.send(wire.Chunk(request.id, index, False, None, 0, number, number + 1), pieces[number])
    if end:
        stream.send(wire.End(request.id, len(numbers), sum(len(pieces[n]) for n in numbers)))
    stream.socket.shutdown(socket.SHUT_WR)
    said = []
    while (frame := stream.receive(0, Deadline(20.0))) is not None:
        said.append(getattr(frame.header, "message", type(frame.header).__name__))
    stream.close()
    return said


def test_planes_cut_anywhere_are_answered_from_if_they_suffice_and_refused_in_a_word_if_not(
    pair: Pair, pieces: list[bytes]
) -> None:
    assert sent(pair, pieces, [0, 1, 2, 3, 4]) == ["FirstToken", "Answer", "Verdict"]
    for count, ended in itertools.product(range(5), (True, False)):
        said = sent(pair, pieces, list(range(count)), ended)
        answered = count > 2 or (ended and count == 2)
        assert said[:2] == ["FirstToken", "Answer"] if answered else "FirstToken" not in said
        assert "Verdict" not in said and any(
            re.search("plane . of 4 is missing|closed inside a request|without the chunk", line)
            for line in said
        )


def test_planes_that_lie_are_refused_before_and_behind_the_answer(pair: Pair, pieces: list[bytes]) -> None:
    changed = [piece[:20] + bytes([piece[20] ^ 1]) + piece[21:] for piece in pieces]
    for number in range(5):
        said = sent(pair, [*pieces[:number], changed[number], *pieces[number + 1 :]], [0, 1, 2, 3, 4])
        assert ("Answer" in said) == (number > 2) and "Verdict" not in said
        assert re.search("checksum|header|payload", said[-1])
    for numbers in ([0, 1, 1], [0, 1, 2, 2], [1, 0, 0]):
        assert "a plane that there is not, or that has come" in sent(pair, pieces, numbers)[-1]
    assert sent(pair, pieces, [2, 4, 0, 1, 3])[:2] == ["FirstToken", "Answer"]  # as a datagram may come


@given(st.data())
def test_any_stream_of_chunks_gives_planes_or_a_typed_error(
    pair: Pair, pieces: list[bytes], data: st.DataObject
) -> None:
    side: Any = pair.cloud
    cloud = side._handlers[Examine].__self__
    request = wire.Request(1, "split", "planes", pair.prefix, "Q?", "", 4, tokens=4096)
    planes = Planes(cloud, cloud.prefixes[pair.prefix], request)
    numbers = data.draw(st.lists(st.integers(0, 12), max_size=8))
    for index, number in enumerate(numbers):
        payload = pieces[min(number, 4)]
        payload = payload[: data.draw(st.sampled_from([len(payload), len(payload) // 2, 0, 9]))]
        chunk = wire.Chunk(
            1, index, False, None, 0, number, number + data.draw(st.sampled_from([1, 1, 1, 0, 2]))
        )
        try:
            planes.take(Arrived(chunk, memoryview(payload), 0.0))
        except WireError:
            continue
    if planes.arrived:
        try:
            rebuilt = planes.rebuilt(len(planes.arrived))
        except PayloadError:
            return
        assert 1 <= rebuilt.planes <= min(4, len(planes.arrived) - 1) and bool(rebuilt.missing) == (
            rebuilt.planes < 4
        )


def test_planes_that_are_lost_leave_a_coarser_answer_or_one_that_is_not_verified(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = {"transport": "datagram", "port": pair.cloud.call(Serve(1 << 22, transport="datagram"), 10)}
    protected, lose, priorities = protection.protect, set[int](), dict[int, int]()

    def some(id: int, chunk: int, frame: bytes, loss: float, priority: int) -> list[bytes]:
        priorities[chunk] = priority
        return [] if chunk in lose else protected(id, chunk, frame, loss, priority)

    monkeypatch.setattr(protection, "protect", some)

    def ask(planes: int, *lost: int) -> TrialResult:
        lose.clear()
        lose.update(lost)
        return pair.ask("planes", placement="store", delivery=few(planes), link=link, reuse="none")

    over_tcp = pair.ask("planes", placement="store", delivery=few(3), reuse="none")
    whole = ask(3)
    assert (whole.answer, whole.verified_answer) == (over_tcp.answer, over_tcp.verified_answer)
    assert list(priorities.values()) == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    unverified = ask(3, 5)
    assert (unverified.answer, unverified.planes, unverified.changed) == (whole.answer, 3, None)
    assert "plane 5 of 8 is missing" in unverified.unverified
    coarser = ask(3, 3)
    assert (coarser.answer, coarser.planes) == (ask(2).answer, 2)
    assert coarser.payload_bytes < whole.payload_bytes == unverified.payload_bytes
    assert "plane 3 of 8 is missing" in coarser.unverified
    for lost, says in (
        (0, "without the chunk that its others are read with"),
        (1, "plane 1 of 8 is missing"),
    ):
        with pytest.raises(EndpointError, match=says):
            ask(3, lost)


def test_other_codecs_are_refused_by_name_before_anything_runs() -> None:
    settings = {"name": "t", "profiles": ["lte"], "tasks": ["needle"], "placements": ["split", "cloud"]}
    make_plan(
        {**settings, "codecs": ["planes", "q2c@0.5+planes(bits=4)+zstd"], "delivery": ["whole", few(4)]},
        "t.yaml",
    )
    for codec, says in (
        ("int8", "and int8 has none: take planes"),
        ("planes(bits=2)", "has 2: take at most progressive"),
    ):
        with pytest.raises(
            SpecError, match=r"^t\.yaml: delivery: progressive\(planes=3\) answers from the first 3"
        ) as error:
            make_plan({**settings, "codecs": ["planes", codec], "delivery": [few(3)]}, "t.yaml")
        assert says in str(error.value) and "\n" not in str(error.value)
    make_plan(
        {**settings, "placements": ["cloud"], "codecs": ["int8"], "delivery": [few(3)]}, "t.yaml"
    )  # no cache crosses
