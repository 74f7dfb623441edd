"""Edge and cloud as real processes with a tiny random model, talking over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from testbed.deadline import Deadline
from testbed.endpoints import answering, cloud
from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import Forget, HangUp, Hello
from testbed.errors import EndpointError
from testbed.experiment import deployment, gate
from testbed.hosts.local import Local, Namespace
from testbed.identity import User
from testbed.speed.words import Speed
from testbed.tasks.rows import choice_rows
from testbed.transport import wire
from testbed.transport.tcp import Tcp, TcpStream
from tests.endpoints.pair import CODECS, Pair, in_this_process, started
from tests.endpoints.test_wire import Memory


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with started(tmp_path_factory.mktemp("pair"), model) as both:
        yield both


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with started(tmp_path_factory.mktemp("slow"), model, edge=5.0, cloud=20.0) as both:
        yield both


@pytest.mark.parametrize("example", [0, 1, 2])
def test_the_full_cache_sent_across_gives_the_single_machines_answer(pair: Pair, example: int) -> None:
    reference = pair.reference(example)
    result = pair.ask("fp16", example)
    outcome = pair.outcome(result, example)
    assert result.answer == reference.answer
    assert outcome.kl == 0
    assert outcome.nll == reference.nll
    assert outcome.tokens_kept == reference.context_tokens
    assert result.payload_bytes >= reference.kv_bytes


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_crosses_and_its_stages_sum_to_the_whole(pair: Pair, codec: str) -> None:
    for _ in range(2):
        result = pair.ask(codec)
        assert result.stages.total() == pytest.approx(result.e2e_s, rel=0, abs=1e-6)
    assert "decode" in result.reused
    assert result.wire_bytes > result.payload_bytes or result.wire_bytes == 0


def test_a_cache_with_fewer_tokens_gives_distributions_further_from_the_full_ones(pair: Pair) -> None:
    pair.cloud.call(Forget())
    pair.reference()
    kl = {codec: pair.outcome(pair.ask(codec)).kl for codec in ("int8", "random@0.5+int8+zstd")}
    assert 0 < (kl["int8"] or 0) < (kl["random@0.5+int8+zstd"] or 0)


def test_a_choice_is_made_in_the_cloud_by_likelihood_and_is_the_single_machines(model: Path) -> None:
    pair = in_this_process(model, task="choice")
    options = {choice for row in choice_rows() for choice in row.choices}
    for example in range(2):
        pair.cloud.call(Forget())
        reference = pair.reference(example)
        full, pruned = pair.ask("fp16", example), pair.ask("random@0.5+int8+zstd", example)
        assert full.answer == pair.ask("cloud", example).answer == reference.answer
        assert full.answer.strip() in options and pruned.answer.strip() in options


def test_an_outcome_is_not_made_up_from_a_cache_that_is_gone(pair: Pair) -> None:
    pair.cloud.call(Forget())
    first = pair.ask("int8")
    pair.ask("int4")
    with pytest.raises(EndpointError, match="given up"):
        pair.outcome(first)


def test_answers_made_of_the_same_bytes_have_one_outcome_whichever_link_these_came_over(pair: Pair) -> None:
    pair.cloud.call(Forget())
    pair.reference()
    delivery = "stream(chunk=64)"
    first = pair.outcome(pair.ask("int8", delivery=delivery, link={"name": "slow"}))
    again, other = (pair.ask(codec, delivery=delivery, link={"name": "fast"}) for codec in ("int8", "int4"))
    assert pair.outcome(again) == first  # whose own cache was given up for the other's
    assert pair.outcome(other) != first


def test_a_slower_machine_leaves_the_answer(pair: Pair, slow: Pair) -> None:
    assert [side.speed for side in slow.loaded] == [Speed(5.0, 5.0), Speed(20.0, 20.0)]
    given = {
        pair.ask("int8", 2).answer,
        *(slow.ask(what, 2).answer for what in ("int8", "int8", "cloud", "edge")),
    }
    assert len(given) == 1


def test_compute_is_measured_by_a_sides_own_pace_whatever_slows_it(pair: Pair, slow: Pair) -> None:
    sides = deployment.Pair(SimpleNamespace(scenario=None), pair.edge, slow.cloud)  # type: ignore[arg-type]
    measured = gate.measure(sides, 5)
    assert measured.tokens == 128
    assert measured.cloud.least_s < 10 * measured.edge.most_s
    assert measured.edge.least_s <= measured.edge.median_s <= measured.edge.most_s
    assert measured.edge.share is None or 0 < measured.edge.share <= 1


@pytest.mark.parametrize("what", ["q2c@0.25+int8", "cloud", "edge"])
def test_a_replayed_request_takes_as_long_as_it_says(slow: Pair, what: str) -> None:
    slow.reference()
    for _ in range(2):
        began = time.monotonic()
        result = slow.ask(what, replay=True)
        assert time.monotonic() - began > result.e2e_s > 0.05
    assert result.replayed
    assert {"first_token", "generate"} < set(result.reused)


def test_a_reused_answer_that_came_too_late_comes_too_late_again(slow: Pair) -> None:
    result = slow.ask("int4", 2)
    stages = result.stages
    across = result.e2e_s - stages.prefill_s - stages.encode_s
    for timeout in (stages.first_token_s / 2, across - stages.generate_s / 2):
        with pytest.raises(EndpointError, match="arrived within"):
            slow.ask("int4", 2, link={"timeout": timeout})
    assert "generate" in slow.ask("int4", 2).reused


def test_waiting_for_another_clients_request_is_queueing_and_not_decoding(slow: Pair) -> None:
    other = Tcp().connect("127.0.0.1", slow.link.port, None, 20.0)
    alone = slow.ask("int8", reuse="prefill").stages
    text = b"What the other client has to say is long. " * 8
    other.send_request(wire.Request(1 << 20, "cloud", "", slow.prefix, "Q?", "", 8), [text], checked=True)
    time.sleep(0.05)
    behind = slow.ask("int8", reuse="prefill").stages
    answers = [other.receive(0, Deadline(20.0)), other.receive(0, Deadline(20.0))]
    other.close()
    answer = answers[1].header if answers[1] else None
    assert isinstance(answer, wire.Answer)
    taken = sum(w.end - w.start for w in answer.worked if w.stage != "queue") + answer.generate_s
    assert behind.queue_s > taken / 3
    assert alone.queue_s < behind.queue_s / 3
    assert behind.decode_s < behind.queue_s / 2


@pytest.mark.parametrize("what", ["int8", "cloud"])
def test_hashing_and_counting_are_part_of_no_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    pair = in_this_process(model)

    def slowly(work: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            time.sleep(0.7)
            return work(*arguments)

        return slow

    for name in ("digest", "kept_digest"):
        monkeypatch.setattr(answering, name, slowly(getattr(answering, name)))
    monkeypatch.setattr(cloud, "digest", answering.digest)
    for _ in range(2):
        result = pair.ask(what)
        assert pair.outcome(result).tokens_kept > 0
        assert result.e2e_s < 0.7


def test_an_answer_that_was_another_payloads_has_no_outcome(pair: Pair) -> None:
    connection = Tcp().connect("127.0.0.1", pair.link.port, None, 5.0)
    first = wire.Request(1 << 30, "cloud", "", pair.prefix, "Q?", "", 2)
    again = structs.replace(first, id=7 << 30, same_as=1 << 30)
    for request, text in ((first, b"one text"), (again, b"other")):
        connection.send_request(request, [text], checked=True)
        received = [connection.receive(0, Deadline(10.0)), connection.receive(0, Deadline(10.0))]
    connection.close()
    assert received[1] is not None and isinstance(received[1].header, wire.Answer)
    with pytest.raises(EndpointError, match="unlike"):
        pair.outcome(7 << 30)


def test_a_connection_that_lingers_is_closed_and_counted_when_that_is_asked_for(pair: Pair) -> None:
    for _ in range(2):  # nobody has to ask
        result = pair.ask("int8", link={"lingers": True})
    cost = pair.edge.call(HangUp(), 10)
    segments = (cost.wire_bytes - result.wire_bytes) // 66  # headers: each way's end, and what confirms them
    assert 2 <= segments <= 6
    assert cost.retransmits == result.retransmits == 0
    with pytest.raises(EndpointError, match="no connection is open"):
        pair.edge.call(HangUp(), 10)


def test_tokens_are_counted_and_each_has_its_time(pair: Pair) -> None:
    pair.cloud.call(Forget())
    across, here = pair.ask("fp16"), pair.ask("edge")
    assert across.answer_tokens == here.answer_tokens > 1
    for result in (across, here):
        further = (result.token_s or 0) * (result.answer_tokens - 1)
        assert 0 < further < result.stages.first_token_s + result.stages.generate_s


def test_what_is_reused_is_said_and_gives_the_same_answer(pair: Pair) -> None:
    pair.cloud.call(Forget())
    results, outcomes = [], []
    for reuse in ("all", "all", "prefill"):
        results.append(pair.ask("q2c@0.25+int8", 2, reuse=reuse))
        outcomes.append(pair.outcome(results[-1], 2))
    first, again, fresh = results
    assert again.reused == ("prefill", "select", "encode", "decode", "first_token", "generate")
    assert again.stages.select_s == first.stages.select_s
    assert fresh.reused == ("prefill",)
    assert first.answer == again.answer == fresh.answer
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_first_token_of_an_answer_that_comes_again_is_confirmed_at_once_and_no_others(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, confirmed, confirm = in_this_process(model), list[TcpStream](), TcpStream.confirm
    monkeypatch.setattr(TcpStream, "confirm", lambda stream: confirmed.append(stream) or confirm(stream))
    counts = []
    for reuse in ("all", "all", "prefill", "all"):
        pair.ask("int8", 0, reuse=reuse)
        counts.append(len(confirmed))
    assert counts == [0, 1, 1, 2]


def test_what_the_questions_pass_takes_of_the_selection_is_told(pair: Pair) -> None:
    asked, unasked = (pair.ask(codec, 2, reuse="none") for codec in ("q2c@0.25", "window@0.25"))
    assert 0 < (asked.question_s or 0) < asked.stages.select_s
    assert unasked.question_s == 0


def test_nothing_is_reused_where_the_scenario_forbids_it(pair: Pair) -> None:
    assert [pair.ask("int8", 0, reuse="none").reused for _ in range(2)] == [(), ()]


def test_the_cloud_placement_sends_text_and_gives_the_same_answer(pair: Pair) -> None:
    reference, result = pair.reference(0), pair.ask("cloud", 0)
    assert result.answer == reference.answer
    assert result.payload_bytes < reference.kv_bytes / 10
    assert result.stages.prefill_s > 0


def test_the_edge_placement_sends_nothing(pair: Pair) -> None:
    first, again = pair.ask("edge", 2), pair.ask("edge", 2)
    assert first.payload_bytes == first.wire_bytes == 0
    assert again.reused == ("prefill", "first_token", "generate")


def test_a_connection_can_be_kept_for_the_next_request(pair: Pair) -> None:
    kept = {"transport": "tcp(connection=reuse)", "name": "kept"}
    first, second = (pair.ask("int8", 0, link=kept).stages.connect_s for _ in range(2))
    assert first > 0 == second


def test_garbage_on_the_port_gets_an_answer_and_does_no_harm(pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", pair.link.port), timeout=5) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        sock.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: sock.recv(65536), b""))
    received = Memory(reply).receive(0, Deadline(1.0))
    assert received is not None and isinstance(received.header, wire.Failure)
    assert pair.ask("int8", 0).answer is not None


def test_a_payload_that_is_no_codecs_is_an_error_of_that_request_only(pair: Pair) -> None:
    connection = Tcp().connect("127.0.0.1", pair.link.port, None, 5.0)
    for _ in range(2):
        request = wire.Request(1, "split", "int8", pair.prefix, "Q?\n", "\n", 4)
        connection.send_request(request, [b"\x00" * 5000], checked=False)
        received = connection.receive(0, Deadline(10.0))
        assert received is not None
        assert isinstance(received.header, wire.Failure)
    connection.close()


def test_an_oversized_request_is_refused_unread(pair: Pair) -> None:
    connection = Tcp().connect("127.0.0.1", pair.link.port, None, 5.0)
    connection.send(wire.Request(1, "split", "int8", "x", "Q?", "\n", 4))
    connection.socket.sendall(wire.pack(wire.Chunk(1, 0, False, None), 1 << 30))
    received = connection.receive(0, Deadline(10.0))
    assert received is not None
    assert isinstance(received.header, wire.Failure)
    assert "at most" in received.header.message
    connection.close()


def test_an_endpoint_leaves_when_the_orchestrator_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from testbed.endpoints.endpoint import Endpoint\n"
        "from testbed.hosts.local import Local\n"
        f"endpoint = Endpoint.start('edge', Local(), pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print(endpoint.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    state, deadline = Path(f"/proc/{int(done.stdout)}/stat"), Deadline(5.0)
    while state.exists() and state.read_text().split()[2] != "Z":
        deadline.left()
        time.sleep(0.05)


def test_root_is_dropped_on_the_command_line_that_starts_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    argv = " ".join(Namespace("tb-1-edge", User(1000, 100, "ann", "/home/ann")).command(["python"]))
    assert argv.startswith("nsenter --net=/run/netns/tb-1-edge")
    parts = "--reuid=1000 --regid=100 --init-groups --bounding-set=-all --no-new-privs --pdeathsig=KILL"
    assert set(parts.split()) <= set(argv.split())


def test_an_endpoint_has_no_capability_left_and_its_threads_sleep_where_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinity")
    for role in ("edge", "cloud"):
        endpoint = Endpoint.start(role, Local(), tmp_path / "log")
        with endpoint.process:
            endpoint.call(Hello(), 60)
            process = Path(f"/proc/{endpoint.process.pid}")
            environment = (process / "environ").read_text().split("\0")
            lines = (line.partition(":") for line in (process / "status").read_text().splitlines())
        status = {key: value.strip() for key, _, value in lines}
        if os.geteuid() == 0:
            assert {int(value, 16) for key, value in status.items() if key.startswith("Cap")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert "OMP_WAIT_POLICY=PASSIVE" in environment
        assert not any(entry.startswith("GOMP_SPINCOUNT") for entry in environment)
