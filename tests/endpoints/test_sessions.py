"""Clients at the cloud: each with a memory of its own, and all with their turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.codecs.entropy import tables
from testbed.deadline import Deadline
from testbed.endpoints.protocol import Forget
from testbed.endpoints.sessions import MAX_CLIENTS, Sessions
from testbed.errors import EndpointError
from testbed.transport import wire
from testbed.transport.transport import parse
from tests.endpoints.pair import Pair, in_this_process
from tests.test_files import a_row


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


def test_one_clients_memory_is_no_other_ones(pair: Pair) -> None:
    pair.reference(client="ann")
    first = pair.ask("int8", link={"client": "ann"})
    other = pair.ask("fp16", link={"client": "bob"})
    # Ann's cache is still hers, though Bob's came after it; and only she has something to compare with.
    hers = pair.outcome(first, client="ann")
    assert (hers.kl or 0) > 0
    assert pair.outcome(other, client="bob").kl is None
    pair.cloud.call(Forget("bob"))
    for request in (other, first):
        with pytest.raises(EndpointError, match="never answered"):
            pair.outcome(request, client="bob")
    again = pair.ask("int8", link={"client": "ann"})
    assert "decode" in again.reused
    assert pair.outcome(again, client="ann") == hers


def test_two_clients_at_once_each_get_their_own_answer_under_the_same_number(pair: Pair) -> None:
    texts = {"ann": b"The sky was blue that day. " * 4, "bob": b"Nobody has ever read 17 books. " * 9}

    def ask(client: str, chunk: int = 1000) -> str:
        request = wire.Request(99, "cloud", "", pair.prefix, "Q?", "", 4, client=client)
        stream = parse("tcp").connect("127.0.0.1", pair.link.port, None, 60.0)
        text = texts[client]
        stream.send_request(request, (text[i : i + chunk] for i in range(0, len(text), chunk)), checked=True)
        frames = [stream.receive(0, Deadline(60.0)) for _ in range(2)]
        stream.close()
        answer = frames[1].header if frames[1] else None
        assert isinstance(answer, wire.Answer) and answer.id == 99
        return answer.text

    alone = {client: ask(client) for client in texts}
    digests = {c: pair.outcome(99, client=c).payload_digest for c in texts}
    assert digests["ann"] != digests["bob"]
    with ThreadPoolExecutor(2) as pool:
        together = dict(zip(texts, pool.map(ask, texts), strict=True))
    assert together == alone
    assert ask("ann", chunk=10) == alone["ann"]  # in however many chunks
    for client in texts:
        assert pair.outcome(99, client=client).payload_digest == digests[client]


def test_clients_take_turns_and_each_ones_requests_keep_their_order() -> None:
    sessions, served = Sessions(), list[str]()

    def compute(client: str, name: str) -> None:
        with sessions.turn(client):
            served.append(name)

    threads = []
    with sessions.turn("first"):
        for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
            threads.append(threading.Thread(target=compute, args=(name[0], name)))
            threads[-1].start()
            while sum(map(len, sessions._waiting.values())) < len(threads):
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert served == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_turn_that_fails_is_over() -> None:
    sessions = Sessions()
    with pytest.raises(EndpointError), sessions.turn("a"):
        raise EndpointError("no")
    with sessions.turn("b"):
        pass


def test_only_so_many_clients_are_remembered() -> None:
    sessions = Sessions()
    kept = sessions.of("kept")
    for number in range(2 * MAX_CLIENTS):
        sessions.of(f"passing {number}")
        assert sessions.of("kept") is kept
    assert len(sessions._of) == MAX_CLIENTS


def test_a_row_has_the_bytes_that_the_cloud_needed_beforehand(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables.KEPT, "directory", lambda: tmp_path)
    counted = tables.Counted(4, 2, 16, bytes([255]) * (2 * 16 * 16))
    name, path = tables.KEPT.save(tables.Tables(tables.FORMAT, "", [counted] * 6))
    for codec, shared in (("int4+ans", 0), (f"int4+ans(table={name})", path.stat().st_size)):
        made, result = a_row(1), pair.ask(codec)
        made.fill(result, pair.outcome(result), {"score": 1.0, "em": 1.0, "f1": 1.0})
        assert made.shared_bytes == shared
