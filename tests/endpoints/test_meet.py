"""A context of which the cloud computes the beginning while the end of its cache arrives: exact wherever they meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.deadline import Deadline
from testbed.endpoints import meeting
from testbed.endpoints.meeting import meeting_point
from testbed.endpoints.protocol import Forget, TrialResult
from testbed.endpoints.spans import bound, hidden
from testbed.endpoints.tokens import to_bytes
from testbed.errors import EndpointError
from testbed.transport import wire
from testbed.transport.tcp import Tcp
from testbed.transport.transport import TRANSPORTS
from tests.endpoints.pair import Pair, in_this_process
from tests.tiny_models import FAMILIES

#: A context of the pair's has 297 tokens: 5 chunks.
MEET = "meet(chunk=64)"
CUT = r"closed the connection|broke"


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSPORTS, "held", "tests.endpoints.held_transport:Held")


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


@pytest.fixture
def as_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cloud drops what has arrived, and foresees nothing."""
    monkeypatch.setattr(meeting._Meeting, "_meeting_point", lambda self: self._back)


@pytest.fixture
def begin_behind(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the cloud begin when the chunk of that number has arrived."""

    def wait(chunk: int) -> None:
        def come_together(self: meeting._Meeting) -> None:
            while len(self._arrivals.times) <= chunk:
                time.sleep(0.001)
            original(self)

        monkeypatch.setattr(meeting._Meeting, "come_together", come_together)

    original = meeting._Meeting.come_together
    return wait


def computed(result: TrialResult) -> list[int]:
    """Tokens of each pass that the cloud prefilled with."""
    return [span.bytes for span in result.spans if span.stage == "prefill" and span.side == "cloud"]


def met(pair: Pair, chunks: int, example: int = 1, codec: str = "fp16", **about: str) -> TrialResult:
    link = {"transport": f"held(chunks={chunks})"}
    return pair.ask(codec, example, link, placement="store", delivery=MEET, **about)


@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_the_two_meet_the_answer_and_what_is_kept_are_the_full_caches(
    tiny_model: Callable[[str], Path], family: str, begin_behind: Callable[[int], None], as_arrived: None
) -> None:
    pair = in_this_process(tiny_model(family))
    full = pair.reference()
    whole = pair.ask("fp16")
    kept = pair.outcome(whole)
    for chunks, blocks in enumerate(([297], [256], [192], [128], [64], [])):
        begin_behind(chunks)
        result = met(pair, chunks)
        assert computed(result) == blocks
        assert (result.answer, result.answer_tokens) == (whole.answer, whole.answer_tokens)
        outcome = pair.outcome(result)
        assert (outcome.tokens_kept, outcome.kept_digest) == (kept.tokens_kept, kept.kept_digest)
        assert outcome.kl is not None and outcome.kl < 1e-4
        assert outcome.nll == pytest.approx(full.nll, abs=2e-3)


@pytest.mark.parametrize("delivery", ["meet(chunk=32)", "meet", "meet(chunk=1024)"])
@pytest.mark.parametrize("codec", ["fp16", "int8", "q2c@0.25+int4", "window@0.5"])
@pytest.mark.parametrize("placement", ["store", "split"])
def test_left_to_itself_it_leaves_nothing_out_and_its_times_add_up(
    pair: Pair, delivery: str, codec: str, placement: str
) -> None:
    for _ in range(2):
        result = pair.ask(codec, placement=placement, delivery=delivery)
        crossed = (result.chunks or 0) - 1
        assert result.levels == ",".join(
            ["text", *([codec] if crossed == 1 else [f"{codec}*{crossed}"] if crossed else [])]
        )
        assert result.tokens_left_out == 0 and sum(computed(result)) <= 297
        assert 0 < bound(result.spans) <= result.e2e_s + 1e-6 and hidden(result.spans) >= 0
        if codec in ("fp16", "int8"):
            assert pair.outcome(result).tokens_kept == 297
        else:
            assert pair.outcome(result).tokens_kept >= 297 // 4


def test_what_was_foreseen_to_arrive_and_does_not_is_computed_in_another_pass(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pair.ask("fp16")
    kept = pair.outcome(whole).kept_digest
    monkeypatch.setattr(
        meeting._Meeting, "_meeting_point", lambda self: self._front + 64 if self._layers == 1 else self._back
    )
    result = met(pair, 0)
    assert computed(result) == [64, 64, 64, 64, 41] and result.answer == whole.answer
    assert pair.outcome(result).kept_digest == kept


times = st.floats(1e-6, 10)


@given(st.integers(1, 3000), st.integers(8, 700), st.data(), st.floats(0, 1), times, times)
def test_the_two_will_meet_at_the_first_chunk_that_will_be_there_when_all_before_it_is(
    tokens: int, chunk: int, data: st.DataObject, share: float, arrival: float, left: float
) -> None:
    front = chunk * data.draw(st.integers(0, (tokens - 1) // chunk))
    since = share * tokens * arrival
    found = meeting_point(tokens, chunk, front, since, arrival, left)

    def waits(begin: int) -> float:
        """How long what comes from there on is waited for when all before it is computed."""
        return (tokens - begin) * arrival - since - left * (begin - front)

    assert found > front and (found - front) % chunk == 0
    assert waits(found) <= 1e-6 * tokens
    assert found == front + chunk or waits(found - chunk) >= -1e-6 * tokens


def test_a_block_whose_tokens_have_all_arrived_meanwhile_is_given_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = meeting._Meeting._wanted

    def given_up(self: meeting._Meeting, layer: bool) -> int:
        while len(self._arrivals.times) < 6:
            time.sleep(0.001)
        return original(self, layer)

    whole = pair.ask("int8")
    monkeypatch.setattr(meeting._Meeting, "_wanted", given_up)
    result = met(pair, 5, codec="int8")
    assert computed(result)[-1:] in ([0], []) and result.chunks == 6
    assert sum(computed(result)) == 0 and result.answer == whole.answer


def test_what_arrives_amid_a_pass_is_dropped_from_it_and_decoded_and_its_time_is_no_part_of_the_passes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, as_arrived: None
) -> None:
    look = meeting._Meeting._look

    def late(self: meeting._Meeting) -> int:
        """A chunk is there when the first layer is done, and not before."""
        while self._layers and len(self._arrivals.times) < 2:
            time.sleep(0.001)
        return look(self) if self._layers else self._back

    whole = pair.ask("fp16")
    kept = pair.outcome(whole).kept_digest
    monkeypatch.setattr(meeting._Meeting, "_look", late)
    result = met(pair, 1)
    cloud = [span for span in result.spans if span.side == "cloud" and span.stage in ("prefill", "decode")]
    assert [span.stage for span in cloud[:3]] == ["prefill", "decode", "prefill"] and cloud[1].chunk == 1
    assert all(before.end <= after.start for before, after in pairwise(cloud))
    assert sum(computed(result)) == 256 and result.answer == whole.answer
    assert pair.outcome(result).kept_digest == kept


@pytest.mark.parametrize("connection", ["fresh", "reuse"])
def test_chunks_that_come_when_enough_have_come_are_harmless(
    pair: Pair, connection: str, begin_behind: Callable[[int], None], as_arrived: None
) -> None:
    whole = pair.ask("int8")
    begin_behind(2)
    link = {"transport": f"held(chunks=2, connection={connection})"}
    for _ in range(3):
        late = pair.ask("int8", link=link, placement="store", delivery=MEET)
        # The third was under way, and perhaps another: they crossed, and are nobody's time.
        assert late.chunks and late.chunks >= 4 and late.levels == f"text,int8*{late.chunks - 1}"
        assert computed(late) == [192]
        assert [span.chunk for span in late.spans if span.stage == "transmit"] == [0, 1, 2]
    assert pair.ask("int8").answer == whole.answer


@pytest.mark.parametrize("chunk", range(6))
def test_a_connection_that_is_cut_inside_a_chunk_is_an_error(
    pair: Pair, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting._Meeting, "come_together", lambda self: self._arrivals.join())
    with pytest.raises(EndpointError, match=CUT):
        pair.ask("int8", link={"transport": f"held(cut={chunk + 1})"}, placement="store", delivery=MEET)
    monkeypatch.undo()
    assert pair.ask("int8").answer


def test_a_cut_is_noticed_between_two_layers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    original = meeting._Meeting._wanted

    def given_up(self: meeting._Meeting, layer: bool) -> int:
        self._arrivals._thread.join(20)
        return original(self, layer)

    monkeypatch.setattr(meeting._Meeting, "_wanted", given_up)
    with pytest.raises(EndpointError, match=CUT):
        pair.ask("int8", link={"transport": "held(cut=2)"}, placement="store", delivery=MEET)


TEXT = to_bytes(range(20), 1 << 10)
#: level, start and stop, payload of each chunk
LIES: dict[str, list[tuple[int, int, int, bytes]]] = {
    "nothing": [],
    "a cache first": [(1, 0, 20, TEXT)],
    "less of the text": [(0, 0, 19, TEXT[:38])],
    "more of the text": [(0, 0, 20, TEXT + TEXT)],
    "the text twice": [(0, 0, 20, TEXT), (0, 16, 20, TEXT[:8])],
    "another part": [(0, 0, 20, TEXT), (1, 8, 16, b"")],
    "one cut elsewhere": [(0, 0, 20, TEXT), (1, 15, 20, b"")],
    "no cache": [(0, 0, 20, TEXT), (1, 16, 20, b"TBKV")],
    "words that there are not": [(0, 0, 20, b"\xff" * 40)],
}


@pytest.mark.parametrize("lie", LIES)
def test_chunks_that_are_not_what_comes_next_are_refused(
    pair: Pair, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = meeting._Meeting.come_together

    def come_together(self: meeting._Meeting) -> None:
        self._arrivals._thread.join(20)
        original(self)

    monkeypatch.setattr(meeting._Meeting, "come_together", come_together)
    connection = Tcp().connect(pair.link.address, pair.link.port)
    request = wire.Request(
        1, "store", "int8", pair.prefix, "Q?", "\n", 4, delivery="meet(chunk=8)", levels=("text", "int8"), tokens=20
    )  # fmt: skip
    connection.send(request)
    for index, (level, start, stop, payload) in enumerate(LIES[lie]):
        connection.send(wire.Chunk(1, index, False, None, level, start, stop), payload)
    connection.send(wire.End(1, len(LIES[lie]), sum(len(payload) for *_, payload in LIES[lie])))
    received = connection.receive(0, Deadline(20))
    assert received is not None and isinstance(received.header, wire.Failure)
    connection.close()


def test_what_a_request_says_of_its_length_is_not_believed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models take any number of tokens: the parts of so many would not fit into memory."""
    model = pair.cloud._handlers[Forget].__self__.model  # type: ignore[union-attr]
    monkeypatch.setattr(model, "max_positions", 1 << 40)
    connection = Tcp().connect(pair.link.address, pair.link.port)
    connection.send(
        wire.Request(
            1, "store", "int8", pair.prefix, "Q?", "\n", 4, delivery="meet(chunk=8)", levels=("text", "int8"), tokens=1 << 34
        )
    )  # fmt: skip
    connection.send(wire.Chunk(1, 0, False, None, 0, 0, 1 << 34), TEXT)
    received = connection.receive(0, Deadline(20))
    assert received is not None and isinstance(received.header, wire.Failure)
    assert "more than 256 parts" in received.header.message
    connection.close()


@pytest.mark.parametrize("empty", [{"question": ""}, {"choices": ("yes", "")}])
def test_a_request_that_asks_nothing_is_refused(pair: Pair, empty: dict[str, Any]) -> None:
    asked = {"question": "Q?", "delivery": "meet(chunk=8)", "levels": ("text", "int8"), "tokens": 20, **empty}
    connection = Tcp().connect(pair.link.address, pair.link.port)
    connection.send(wire.Request(1, "store", "int8", pair.prefix, stop="\n", max_new_tokens=4, **asked))
    connection.send(wire.Chunk(1, 0, False, None, 0, 0, 20), TEXT)
    connection.send(wire.End(1, 1, len(TEXT)))
    enough, received = (connection.receive(0, Deadline(20)) for _ in range(2))
    assert enough is not None and isinstance(enough.header, wire.Enough)
    assert received is not None and isinstance(received.header, wire.Failure)
    assert received.header.message == "the request's question, or one of its choices, is empty"
    connection.close()
