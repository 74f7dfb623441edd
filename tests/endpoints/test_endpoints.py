"""Edge and cloud as real processes with a tiny random model, talking over loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.deadline import Deadline
from testbed.endpoints import cloud
from testbed.endpoints.both import Both
from testbed.endpoints.cloud import replace_struct
from testbed.endpoints.endpoint import Endpoint
from testbed.errors import EndpointError, UsageError
from testbed.experiment.results import STAGES
from testbed.hosts.local import Local, Namespace
from testbed.identity import User, invoking_user
from testbed.tasks.rows import choice_rows
from testbed.transport import wire
from testbed.transport.tcp import Tcp
from tests.tiny_models import tiny_model_directory

CODECS = [
    "fp16",
    "int8",
    "int4",
    "q2c@0.25+int8",
    "snapkv@0.5+int4",
    "h2o@0.5",
    "window@0.25",
    "random@0.5+int8+zstd",
]


class Pair:
    """Both endpoints, loaded and serving."""

    def __init__(self, directory: Path, model: Path, task: str = "needle", **slowdown: float) -> None:
        self.edge = Endpoint.start("edge", Local(), directory / "edge.log")
        self.cloud = Endpoint.start("cloud", Local(), directory / "cloud.log")
        self.loaded = [
            side.call(
                "load",
                120,
                model=str(model),
                device="cpu",
                dtype="auto",
                threads=1,
                slowdown=slowdown.get(side.role, 1.0),
            )
            for side in (self.edge, self.cloud)
        ]
        made = self.edge.call(
            "prepare",
            60,
            task=task,
            parameters={},
            count=3,
            context_tokens=300,
            seed=0,
            codecs=CODECS,
            max_new_tokens=8,
        )
        self.examples, self.prefix_text = made["examples"], made["prefix_text"]
        known = {"text": made["prefix_text"], "reach": made["reach"], "closing": made["closing"]}
        self.cloud.call("learn_prefix", 60, **known)
        self.port = self.cloud.call("serve", 10, max_payload=1 << 22, congestion=None)

    def link(self, **changes: Any) -> dict[str, Any]:
        link = {
            "address": "127.0.0.1",
            "port": self.port,
            "congestion": None,
            "timeout": 20.0,
            "reuse": False,
            "name": "lo",
        }
        return {**link, **changes}

    def split(
        self, example: int, codec: str, repeat: int = 0, reuse: str = "all", **link: Any
    ) -> dict[str, Any]:
        return self.edge.call(
            "split",
            60,
            batch=0,
            example=example,
            codec=codec,
            repeat=repeat,
            reuse=reuse,
            link=self.link(**link),
        )

    def compare(self, reference: dict[str, Any]) -> None:
        distributions, vocabulary = reference["distributions"], reference["vocabulary"]
        self.cloud.call("compare", 60, distributions=distributions, vocabulary=vocabulary)

    def outcome(self, result: dict[str, Any], example: int) -> dict[str, Any]:
        return self.cloud.call("outcome", 60, id=result["request"], gold=self.examples[example]["gold"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("endpoints")
    made = Pair(directory, tiny_model_directory("llama", directory / "model"))
    yield made
    made.edge.stop()
    made.cloud.stop()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("slow")
    made = Pair(directory, tiny_model_directory("llama", directory / "model"), edge=5.0, cloud=20.0)
    yield made
    made.edge.stop()
    made.cloud.stop()


@pytest.mark.parametrize("example", [0, 1, 2])
def test_the_full_cache_sent_across_gives_the_single_machines_answer(pair: Pair, example: int) -> None:
    reference = pair.edge.call("reference", 60, batch=0, example=example)
    pair.compare(reference)
    result = pair.split(example, "fp16")
    outcome = pair.outcome(result, example)
    assert result["answer"] == reference["answer"]
    assert outcome["kl"] == 0
    assert outcome["nll"] == reference["nll"]
    assert outcome["tokens_kept"] == reference["context_tokens"]
    assert result["payload_bytes"] >= reference["kv_bytes"]


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_crosses_and_its_stages_sum_to_the_whole(pair: Pair, codec: str) -> None:
    for _ in range(2):
        result = pair.split(1, codec)
        stages = sum(result["stages"].get(stage, 0.0) for stage in STAGES)
        assert stages == pytest.approx(result["e2e_s"], rel=0, abs=1e-6)
        assert all(seconds >= 0 for seconds in result["stages"].values())
    assert "decode" in result["reused"]
    assert result["wire_bytes"] >= 0


def test_a_cache_with_fewer_tokens_gives_distributions_further_from_the_full_ones(pair: Pair) -> None:
    pair.cloud.call("forget")
    pair.compare(pair.edge.call("reference", 60, batch=0, example=1))
    kl = {codec: pair.outcome(pair.split(1, codec), 1)["kl"] for codec in ("int8", "random@0.5+int8+zstd")}
    assert 0 < kl["int8"] < kl["random@0.5+int8+zstd"]


@pytest.mark.slow
def test_a_choice_is_made_in_the_cloud_by_likelihood_and_is_the_single_machines(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_model_directory("llama", tmp_path / "model"), task="choice")
    try:
        for example in range(2):
            pair.cloud.call("forget")
            reference = pair.edge.call("reference", 60, batch=0, example=example)
            pair.compare(reference)
            full, pruned = pair.split(example, "fp16"), pair.split(example, "random@0.5+int8+zstd")
            sent = pair.edge.call(
                "cloud", 60, batch=0, example=example, repeat=0, reuse="all", link=pair.link()
            )
            assert full["answer"] == sent["answer"] == reference["answer"]
            options = {choice for row in choice_rows() for choice in row.choices}
            assert full["answer"].strip() in options and pruned["answer"].strip() in options
            assert sum(full["stages"].values()) == pytest.approx(full["e2e_s"], rel=0, abs=1e-6)
    finally:
        pair.edge.stop()
        pair.cloud.stop()


def test_an_outcome_is_not_made_up_from_a_cache_that_is_gone(pair: Pair) -> None:
    pair.cloud.call("forget")
    first = pair.split(1, "int8")
    pair.split(1, "int4")
    with pytest.raises(EndpointError, match="given up"):
        pair.outcome(first, 1)


@pytest.mark.slow
def test_a_slower_machine_stretches_compute_stages_and_leaves_the_answer(tmp_path: Path) -> None:
    model = tiny_model_directory("llama", tmp_path / "model")
    plain, slow = Pair(tmp_path, model), Pair(tmp_path, model, edge=3.0, cloud=6.0)
    try:
        fast, result = plain.split(1, "int8"), slow.split(1, "int8")
        again = slow.split(1, "int8")
        sent = slow.edge.call("cloud", 60, batch=0, example=1, repeat=0, reuse="all", link=slow.link())
        local = slow.edge.call("edge", 60, batch=0, example=1, repeat=0, reuse="all")
    finally:
        for pair in (plain, slow):
            pair.edge.stop()
            pair.cloud.stop()
    assert slow.loaded[0]["slowdown"] == 3.0
    assert result["answer"] == fast["answer"] == sent["answer"] == local["answer"]
    assert again["answer"] == result["answer"]
    for told in (result, again, sent, local):
        stages = sum(told["stages"].get(stage, 0.0) for stage in STAGES)
        assert stages == pytest.approx(told["e2e_s"], rel=0, abs=1e-6)


@pytest.mark.parametrize("placement", ["split", "cloud", "edge"])
def test_a_replayed_request_takes_as_long_as_it_says(slow: Pair, placement: str) -> None:
    slow.edge.call("reference", 60, batch=0, example=1)
    more: dict[str, Any] = {} if placement == "edge" else {"link": slow.link()}
    more |= {"codec": "q2c@0.25+int8"} if placement == "split" else {}
    for _ in range(2):
        began = time.monotonic()
        told = slow.edge.call(placement, 60, batch=0, example=1, repeat=0, reuse="all", replay=True, **more)
        assert time.monotonic() - began > told["e2e_s"] > 0.05
        assert sum(told["stages"].values()) == pytest.approx(told["e2e_s"], rel=0, abs=1e-6)
    assert told["replayed"]
    assert {"first_token", "generate"} < set(told["reused"])


def test_a_reused_answer_that_came_too_late_comes_too_late_again(slow: Pair) -> None:
    stages = slow.split(2, "int8")["stages"]
    across = sum(seconds for stage, seconds in stages.items() if stage not in ("prefill_s", "encode_s"))
    for timeout in (stages["first_token_s"] / 2, across - stages["generate_s"] / 2):
        with pytest.raises(EndpointError, match="arrived within"):
            slow.split(2, "int8", timeout=timeout)
    assert "generate" in slow.split(2, "int8")["reused"]


def test_waiting_for_another_clients_request_is_queueing_and_not_decoding(slow: Pair) -> None:
    prefix = slow.cloud.call("learn_prefix", 60, text=slow.prefix_text)
    other = Tcp().connect("127.0.0.1", slow.port, None, 20.0)
    alone = slow.split(1, "int8", reuse="prefill")
    text = b"What the other client has to say is long. " * 8
    other.send(wire.Request(1 << 20, "cloud", "", prefix, "Q?", "", 8, zlib.crc32(text)), text)
    time.sleep(0.05)
    behind = slow.split(1, "int8", reuse="prefill")
    answers = [other.receive(0, Deadline(20.0)), other.receive(0, Deadline(20.0))]
    other.close()
    answer = answers[1].header if answers[1] else None
    assert isinstance(answer, wire.Answer)
    taken = answer.prefill_s + answer.first_token_s + answer.generate_s
    assert behind["stages"]["queue_s"] > taken / 3
    assert alone["stages"]["queue_s"] < behind["stages"]["queue_s"] / 3
    assert behind["stages"]["decode_s"] < behind["stages"]["queue_s"] / 2
    assert sum(behind["stages"].values()) == pytest.approx(behind["e2e_s"], rel=0, abs=1e-6)


@pytest.mark.parametrize("placement", ["split", "cloud"])
def test_hashing_and_counting_are_part_of_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    both = Both().handlers()
    model = tiny_model_directory("llama", tmp_path / "model")
    both["load"](model=str(model), device="cpu", dtype="auto", threads=1)
    about = {"task": "needle", "parameters": {}, "count": 1, "context_tokens": 300, "seed": 0}
    made = both["prepare"](**about, codecs=["int8"], max_new_tokens=4)
    both["learn_prefix"](text=made["prefix_text"])
    link = {"address": "127.0.0.1", "port": both["serve"](max_payload=1 << 22, congestion=None)}
    link |= {"congestion": None, "timeout": 20.0, "reuse": False, "name": "lo"}

    def slowly(work: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            time.sleep(1.0)
            return work(*arguments)

        return slow

    for module, name in ((cloud, "digest"), (cloud, "kept_tokens"), (cloud, "kept_digest")):
        monkeypatch.setattr(module, name, slowly(getattr(module, name)))
    extra = {"codec": "int8"} if placement == "split" else {}
    for _ in range(2):
        told = both[placement](batch=0, example=0, repeat=0, reuse="all", link=link, **extra)
        assert both["outcome"](id=told["request"], gold="x")["tokens_kept"] > 0
        assert told["e2e_s"] < 1.0
        assert sum(told["stages"].values()) == pytest.approx(told["e2e_s"], rel=0, abs=1e-6)


def test_an_answer_that_was_another_payloads_has_no_outcome(pair: Pair) -> None:
    prefix = pair.cloud.call("learn_prefix", 60, text=pair.prefix_text)
    connection = Tcp().connect("127.0.0.1", pair.port, None, 5.0)
    first = wire.Request(1 << 30, "cloud", "", prefix, "Q?", "", 2, zlib.crc32(b"one text"))
    for request, text in (
        (first, b"one text"),
        (replace_struct(first, id=7 << 30, same_as=1 << 30), b"other"),
    ):
        connection.send(request, text)
        received = [connection.receive(0, Deadline(10.0)), connection.receive(0, Deadline(10.0))]
    connection.close()
    assert received[1] is not None and isinstance(received[1].header, wire.Answer)
    with pytest.raises(EndpointError, match="unlike"):
        pair.cloud.call("outcome", 60, id=7 << 30, gold="x")


def test_tokens_are_counted_and_each_has_its_time(pair: Pair) -> None:
    pair.cloud.call("forget")
    told = [pair.split(1, "fp16"), pair.edge.call("edge", 60, batch=0, example=1, repeat=0, reuse="all")]
    for one in told:
        assert one["answer_tokens"] == told[0]["answer_tokens"] > 1
        further = one["token_s"] * (one["answer_tokens"] - 1)
        assert 0 < further < one["stages"]["first_token_s"] + one["stages"]["generate_s"]


def test_what_is_reused_is_said_and_gives_the_same_answer(pair: Pair) -> None:
    pair.cloud.call("forget")
    first = pair.split(2, "q2c@0.25+int8")
    outcomes = [pair.outcome(first, 2)]
    again = pair.split(2, "q2c@0.25+int8")
    outcomes.append(pair.outcome(again, 2))
    fresh = pair.split(2, "q2c@0.25+int8", reuse="prefill")
    outcomes.append(pair.outcome(fresh, 2))
    assert again["reused"] == ["prefill", "select", "encode", "decode", "first_token", "generate"]
    assert again["stages"]["select_s"] == first["stages"]["select_s"]
    assert fresh["reused"] == ["prefill"]
    assert first["answer"] == again["answer"] == fresh["answer"]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_what_the_questions_pass_takes_of_the_selection_is_told(pair: Pair) -> None:
    asked, unasked = pair.split(2, "q2c@0.25", reuse="none"), pair.split(2, "window@0.25", reuse="none")
    assert 0 < asked["question_s"] < asked["stages"]["select_s"]
    assert unasked["question_s"] == 0


def test_nothing_is_reused_where_the_scenario_forbids_it(pair: Pair) -> None:
    assert pair.split(0, "int8", reuse="none")["reused"] == []
    assert pair.split(0, "int8", reuse="none")["reused"] == []


def test_the_cloud_placement_sends_text_and_gives_the_same_answer(pair: Pair) -> None:
    reference = pair.edge.call("reference", 60, batch=0, example=0)
    result = pair.edge.call("cloud", 60, batch=0, example=0, repeat=0, reuse="all", link=pair.link())
    assert result["answer"] == reference["answer"]
    assert result["payload_bytes"] < reference["kv_bytes"] / 10
    assert result["stages"]["prefill_s"] > 0
    assert sum(result["stages"].values()) == pytest.approx(result["e2e_s"], rel=0, abs=1e-6)


def test_the_edge_placement_sends_nothing(pair: Pair) -> None:
    first = pair.edge.call("edge", 60, batch=0, example=2, repeat=0, reuse="all")
    again = pair.edge.call("edge", 60, batch=0, example=2, repeat=0, reuse="all")
    assert first["payload_bytes"] == first["wire_bytes"] == 0
    assert again["reused"] == ["prefill", "first_token", "generate"]
    assert sum(again["stages"].values()) == pytest.approx(again["e2e_s"], rel=0, abs=1e-6)


def test_a_connection_can_be_kept_for_the_next_request(pair: Pair) -> None:
    first = pair.edge.call(
        "split",
        60,
        batch=0,
        example=0,
        codec="int8",
        repeat=0,
        reuse="all",
        link=pair.link(reuse=True, name="kept"),
    )
    second = pair.edge.call(
        "split",
        60,
        batch=0,
        example=0,
        codec="int8",
        repeat=0,
        reuse="all",
        link=pair.link(reuse=True, name="kept"),
    )
    assert first["stages"]["connect_s"] > 0
    assert second["stages"]["connect_s"] == 0


def test_garbage_on_the_port_gets_an_answer_and_does_no_harm(pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", pair.port), timeout=5) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        sock.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: sock.recv(65536), b""))
    header, _ = wire.unpack(reply)
    assert isinstance(header, wire.Failure)
    assert pair.split(0, "int8")["answer"] is not None


def test_a_payload_that_is_no_codecs_is_an_error_of_that_request_only(pair: Pair) -> None:
    prefix = pair.edge.call(
        "prepare",
        60,
        task="needle",
        parameters={},
        count=1,
        context_tokens=300,
        seed=0,
        codecs=["fp16"],
        max_new_tokens=4,
    )
    digest = pair.cloud.call("learn_prefix", 60, text=prefix["prefix_text"])
    connection = Tcp().connect("127.0.0.1", pair.port, None, 5.0)
    for _ in range(2):
        connection.send(wire.Request(1, "split", "int8", digest, "Q?\n", "\n", 4, 0), b"\x00" * 5000)
        received = connection.receive(0, Deadline(10.0))
        assert received is not None
        assert isinstance(received.header, wire.Failure)
    connection.close()


def test_an_oversized_request_is_refused_unread(pair: Pair) -> None:
    connection = Tcp().connect("127.0.0.1", pair.port, None, 5.0)
    connection.socket.sendall(wire.pack(wire.Request(1, "split", "int8", "x", "Q?", "\n", 4, 0), 1 << 30))
    received = connection.receive(0, Deadline(10.0))
    assert received is not None
    assert isinstance(received.header, wire.Failure)
    assert "at most" in received.header.message
    connection.close()


def test_a_model_that_does_not_exist_is_the_users_mistake(tmp_path: Path) -> None:
    endpoint = Endpoint.start("cloud", Local(), tmp_path / "log")
    with pytest.raises(UsageError, match="nowhere"):
        endpoint.call("load", 60, model=str(tmp_path / "nowhere"), device="cpu", dtype="auto", threads=1)
    endpoint.stop()


def test_an_endpoint_that_dies_is_named_with_its_fate(tmp_path: Path) -> None:
    endpoint = Endpoint.start("cloud", Local(), tmp_path / "log")
    endpoint.process.kill()
    with pytest.raises(EndpointError, match=r"cloud process ended \(signal SIGKILL\)"):
        endpoint.call("forget", 20)
        endpoint.call("forget", 20)
    endpoint.stop()


def test_threads_of_both_endpoints_sleep_where_they_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinity")
    for role in ("edge", "cloud"):
        endpoint = Endpoint.start(role, Local(), tmp_path / "log")
        with pytest.raises(EndpointError, match="nonsense"):
            endpoint.call("nonsense", 60)
        told = Path(f"/proc/{endpoint.process.pid}/environ").read_text().split("\0")
        endpoint.stop()
        assert "OMP_WAIT_POLICY=PASSIVE" in told
        assert not any(entry.startswith("GOMP_SPINCOUNT") for entry in told)


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
    pid = int(done.stdout)
    deadline = 100
    while (
        Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        and deadline
    ):
        deadline -= 1
        subprocess.run(["sleep", "0.05"], check=True)
    assert deadline > 0


def test_root_is_dropped_on_the_command_line_that_starts_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    argv = " ".join(Namespace("tb-1-edge", User(1000, 100, "ann", "/home/ann")).command(["python"]))
    assert argv.startswith("nsenter --net=/run/netns/tb-1-edge")
    for part in (
        "--reuid=1000",
        "--regid=100",
        "--init-groups",
        "--bounding-set=-all",
        "--no-new-privs",
        "--pdeathsig=KILL",
    ):
        assert part in argv


def test_behind_sudo_the_invoking_user_is_who_typed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    assert (invoking_user().uid, invoking_user().gid) == (65534, 65534)


@pytest.mark.netns
def test_an_endpoint_has_no_capability_left(tmp_path: Path) -> None:
    endpoint = Endpoint.start("edge", Local(), tmp_path / "log")
    status = {}
    for _ in range(200):
        if (
            "testbed.endpoints.edge"
            in Path(f"/proc/{endpoint.process.pid}/cmdline").read_text().split("\0")[:4]
        ):
            break
        subprocess.run(["sleep", "0.02"], check=True)
    for line in Path(f"/proc/{endpoint.process.pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        status[key] = value.strip()
    endpoint.stop()
    assert {int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
