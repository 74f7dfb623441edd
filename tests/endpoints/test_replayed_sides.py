"""Edges and a cloud without models: what they wait for, who waits for whom, and what they say of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from testbed.endpoints.load_messages import Answers, Collect, Happened, Looping, Offer, Planned, Stage
from testbed.endpoints.protocol import Link, Parts, Replayed, Serve, TrialResult, Ware
from testbed.endpoints.replayed_cloud import ReplayedCloud, part_of, step_s
from testbed.endpoints.replayed_edge import ReplayedEdge
from testbed.serving.job import Job
from testbed.serving.server import Server, simulate
from testbed.serving.serving import parse
from testbed.speed.times import DeviceTimes

PAYLOAD = b"0123456789" * 1000
ANSWER = Replayed("decode", 0.02, 0.01, (0.005,) * 4, held=100, memory=1000, text="so", tokens=5)


class Sides:
    """A cloud, and as many edges as are asked for, in this process."""

    def __init__(self, folder: Path, serving: str = "fifo", edges: int = 1, **answer: Any) -> None:
        path = folder / "1.payload"
        path.write_bytes(PAYLOAD)
        self.ware = Ware("split", str(path), (4000, 6000), "p", "why?", "\n", 8, codec="int4")
        self.cloud = ReplayedCloud()
        port = self.cloud.serve(Serve(1 << 20, address="127.0.0.1"))
        self.cloud.answers(Answers(serving, {1: structs.replace(ANSWER, **answer)}, {}))
        self.link = Link("127.0.0.1", port, timeout=10.0)
        self.edges = [ReplayedEdge() for _ in range(edges)]
        self.stage()

    def stage(self, **times: float) -> None:
        for edge in self.edges:
            edge.stage(Stage({1: structs.replace(self.ware, **times)}, self.link))

    def offer(self, *offers: Offer) -> list[list[Happened]]:
        """What became of all that edges were offered."""
        for edge, offer in zip(self.edges, offers, strict=True):
            edge.offer(offer)
        happened: list[list[Happened]] = [[] for _ in self.edges]
        for edge, own in zip(self.edges, happened, strict=True):
            still = 1
            while still:
                time.sleep(0.01)
                collected = edge.collect(Collect())
                own += collected.happened
                still = collected.open
        return happened


def planned(*at: float, client: str = "n1", first: int = 0) -> Offer:
    requests = tuple(Planned(first + number, moment, client, 1) for number, moment in enumerate(at))
    return Offer(time.monotonic() + 0.02, requests, until_s=max(at, default=0.0))


def result(happened: Happened) -> TrialResult:
    assert happened.result is not None, happened.error
    return happened.result


def test_a_request_alone_waits_for_nobody_and_takes_what_its_parts_take(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    sides.stage(prefill_s=0.03, select_s=0.01, encode_s=0.02)
    ((happened,),) = sides.offer(planned(0.0))
    found = result(happened)
    stages = found.stages
    assert (stages.prefill_s, stages.select_s, stages.encode_s) == pytest.approx((0.03, 0.01, 0.02))
    assert stages.decode_s == pytest.approx(0.02)
    assert stages.first_token_s >= 0.01 and stages.generate_s >= 0.02 - 1e-3
    assert (found.answer, found.answer_tokens, found.congestion != "") == ("so", 5, True)
    assert found.wire_bytes > len(PAYLOAD)


def test_what_comes_up_is_delayed_by_no_slow_answer_and_waits_where_it_has_to(tmp_path: Path) -> None:
    sides = Sides(tmp_path, rebuild_s=0.2, first_s=0.0, token_s=())
    ((*happened,),) = sides.offer(planned(0.0, 0.01, 0.02))
    assert [each.at for each in sorted(happened, key=lambda h: h.number)] == pytest.approx([0.0, 0.01, 0.02])
    queues = [result(each).stages.queue_s for each in sorted(happened, key=lambda h: h.number)]
    assert queues[1] >= 0.15 and queues[2] >= 0.35
    assert result(happened[-1]).e2e_s >= 0.55


def test_an_edge_prepares_one_request_at_a_time_and_the_others_wait_there(tmp_path: Path) -> None:
    sides = Sides(tmp_path, rebuild_s=0.0, first_s=0.0, token_s=())
    sides.stage(prefill_s=0.1)
    ((*happened,),) = sides.offer(planned(0.0, 0.0, 0.0))
    waits = [result(each).stages.edge_queue_s for each in sorted(happened, key=lambda h: h.number)]
    assert waits[0] < waits[1] < waits[2]
    assert waits[1] >= 0.1 - 1e-3 and waits[2] >= 0.2 - 1e-3


def test_two_edges_wait_for_each_other_at_the_cloud_alone(tmp_path: Path) -> None:
    sides = Sides(tmp_path, edges=2, rebuild_s=0.2, first_s=0.0, token_s=())
    sides.stage(prefill_s=0.05)
    ours, theirs = sides.offer(planned(0.0), planned(0.0, client="n2", first=1))
    stages = [result(each).stages for each in (*ours, *theirs)]
    assert max(each.edge_queue_s for each in stages) < 0.05
    assert max(each.queue_s for each in stages) >= 0.1
    assert {each.client for each in (*ours, *theirs)} == {"n1", "n2"}


def test_a_client_of_a_closed_loop_asks_again_once_it_has_thought_until_the_end(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    looping = (Looping("n1.1", 0.0, 0, 2, (1,)), Looping("n1.2", 0.0, 1, 2, (1,)))
    ((*happened,),) = sides.offer(Offer(time.monotonic(), (), looping, think_s=0.05, until_s=0.5))
    numbers = [each.number for each in happened]
    assert len(set(numbers)) == len(numbers) and {number % 2 for number in numbers} == {0, 1}
    for client in ("n1.1", "n1.2"):
        own = sorted((each for each in happened if each.client == client), key=lambda h: h.number)
        assert len(own) >= 3
        for before, after in itertools.pairwise(own):
            assert after.at >= before.at + result(before).e2e_s + 0.05 - 1e-3
    assert all(each.at < 0.5 for each in happened)


def test_who_is_refused_says_so_and_why(tmp_path: Path) -> None:
    sides = Sides(tmp_path, "fifo(memory=1500b)", edges=2, rebuild_s=0.3)
    ours, theirs = sides.offer(planned(0.0), planned(0.1, client="n2", first=1))
    assert not ours[0].refused and result(ours[0]).answer == "so"
    assert theirs[0].refused and theirs[0].result is None
    assert theirs[0].error == "the cloud: refused: its cache takes 1kb, and 500b of 1.5kb are free"


def test_whoever_gives_up_is_in_nobodys_way_at_the_cloud(tmp_path: Path) -> None:
    sides = Sides(tmp_path, rebuild_s=0.5, first_s=0.0, token_s=())
    port = sides.cloud.serve(Serve(1 << 20, address="127.0.0.1", request_s=0.2))
    sides.link = structs.replace(sides.link, port=port, timeout=0.2)
    sides.stage()
    ((*happened,),) = sides.offer(planned(0.0, 0.01, 0.02))
    assert all(each.error for each in happened)
    time.sleep(0.6)
    sides.link = structs.replace(sides.link, timeout=5.0)
    sides.stage()
    ((late,),) = sides.offer(planned(0.0, first=9))
    assert result(late).stages.queue_s < 0.4


def in_parts(stored: bool = False, whole: bool = False) -> Parts:
    """Two of 8 tokens each, of which each takes 100 ms to prefill and 20 ms to encode."""
    prefill = () if stored else ((8, 0.1), (16, 0.1))
    return Parts(16, 2, "int4", prefill, (0.02, 0.02), whole, asks=False)


def streaming(sides: Sides, parts: Parts, **times: float) -> None:
    sides.ware = structs.replace(sides.ware, delivery="stream(chunk=8)", parts=parts)
    sides.stage(**times)


def test_a_context_in_parts_crosses_while_it_is_made_and_is_rebuilt_as_it_comes(tmp_path: Path) -> None:
    sides = Sides(tmp_path, parts_s=(0.03, 0.03), rebuild_s=0.0)
    streaming(sides, in_parts())
    ((happened,),) = sides.offer(planned(0.0))
    found = result(happened)
    assert (found.chunks, found.levels, found.tokens_left_out) == (2, "int4*2", 0)
    by = {(span.stage, span.chunk): span for span in found.spans}
    assert by["prefill", 0].end - by["prefill", 0].start == pytest.approx(0.1, abs=0.05)
    # The first part is at the cloud, and rebuilt, before the second is prefilled.
    assert by["decode", 0].end < by["prefill", 1].end < by["transmit", 1].start < by["decode", 1].start
    assert found.e2e_s == pytest.approx(found.stages.total(), abs=1e-5)
    assert found.e2e_s < 0.2 + 0.04 + 0.06 + 0.01 + 0.02 + 0.15


def test_what_a_part_holds_is_waited_for_where_the_whole_context_decides_it(tmp_path: Path) -> None:
    sides = Sides(tmp_path, parts_s=(0.0, 0.0), rebuild_s=0.0)
    streaming(sides, in_parts(whole=True), select_s=0.05)
    ((happened,),) = sides.offer(planned(0.0))
    by = {(span.stage, span.chunk): span for span in result(happened).spans}
    assert (
        by["prefill", 1].end <= by["select", 0].start + 1e-3
        and by["select", 0].end <= by["transmit", 0].start
    )


def test_what_is_stored_in_parts_needs_no_device_and_goes_at_once(tmp_path: Path) -> None:
    sides = Sides(tmp_path, parts_s=(0.0, 0.0), rebuild_s=0.0)
    streaming(sides, in_parts(stored=True))
    ((happened,),) = sides.offer(planned(0.0))
    stages = result(happened).stages
    assert stages.prefill_s == stages.encode_s == 0.0


def test_an_edge_makes_one_request_at_a_time_in_parts_too_and_its_link_is_one_requests(
    tmp_path: Path,
) -> None:
    sides = Sides(tmp_path, parts_s=(0.0, 0.0), rebuild_s=0.0)
    streaming(sides, in_parts())
    ((*happened,),) = sides.offer(planned(0.0, 0.0, 0.0))
    found = [result(each) for each in sorted(happened, key=lambda h: h.number)]
    assert [each.stages.edge_queue_s for each in found] == sorted(each.stages.edge_queue_s for each in found)
    assert found[2].stages.edge_queue_s >= 2 * 0.2 - 1e-3 and all(each.chunks == 2 for each in found)


def test_parts_are_rebuilt_between_others_tokens_in_a_batch_and_not_within_a_turn() -> None:
    for text, first in (("batch(max=4)", "rebuild"), ("fifo", "tokens")):
        server = Server(parse(text), step_s({}))
        server.offer(Job(0.1, 0.1, (0.1, 0.1)), 1.0)
        for _ in range(2):  # rebuilt, and its first token
            work = server.begin(1.0)
            assert work is not None
            server.end(work, 1.0)
        part = Job(0.1, 0.0, part=True)
        whole = Job(0.1, 0.1, behind=(part,))
        server.offer(whole, 1.0), server.offer(part, 1.0)
        work = server.begin(1.0)
        assert work is not None and work.kind == first and (whole not in work.jobs)


@pytest.mark.parametrize("text", ["fifo", "shortest", "batch(max=4)"])
def test_the_question_is_read_through_parts_of_layers_in_their_order(text: str) -> None:
    ware = structs.replace(ANSWER, parts_s=(0.3, 0.1, 0.2), reads_s=(0.05, 0.02), first_s=0.04)
    parts = list[Job]()
    for _ in ware.reads_s:
        parts.append(part_of(ware, parts))
    last = Job(0.2, ware.first_s, behind=tuple(parts))
    other = Job(0.01, 0.01)
    answered = simulate(Server(parse(text), step_s({})), [(0.0, job) for job in (*parts, last, other)])
    assert len(answered) == 4
    order = [*parts, last]
    assert all(a.first <= b.began for a, b in itertools.pairwise(order))
    for job, rebuild_s, read_s in zip(order, ware.parts_s, (*ware.reads_s, ware.first_s), strict=True):
        assert job.rebuilt - job.began == pytest.approx(rebuild_s)
        assert job.first - job.rebuilt == pytest.approx(read_s)


def test_passes_of_several_take_what_was_measured_of_their_like() -> None:
    job = Job(0.0, 0.0, (0.010,), passes=((1, 0.010), (2, 0.012), (4, 0.020)))
    step = step_s({})
    assert step([job]) == pytest.approx(0.010)
    assert step([job] * 3) == pytest.approx(0.016)
    assert step([job, Job(0.0, 0.0, (0.010,), passes=((1, 0.030), (2, 0.040)))]) == pytest.approx(0.026)


def test_requests_of_two_models_are_decoded_in_a_pass_each_one_behind_the_other() -> None:
    times = {"m": DeviceTimes("d", "m", ((1, 0.001), (100, 0.200)), ((100, 0.010), (1100, 0.020)))}
    own = [Job(0.0, 0.0, (0.010,), held=100, model="m")] * 2
    here = [Job(0.0, 0.0, (0.010,), passes=((1, 0.010), (2, 0.012)))] * 2
    step = step_s(times)
    assert step([own[0], here[0], own[1], here[1]]) == pytest.approx(step(own) + step(here))
    assert (step(own), step(here)) == (pytest.approx(0.010), pytest.approx(0.012))


def test_what_is_not_known_at_the_cloud_fails_by_name(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    sides.cloud.answers(Answers("fifo", {}, {}))
    ((happened,),) = sides.offer(planned(0.0))
    assert happened.error == "the cloud: the request is for ware 1, which is not known here"
    assert not happened.refused


def test_a_step_reads_the_weights_once_and_every_cache_and_multiplies_as_much_as_a_pass() -> None:
    times = DeviceTimes("d", "m", ((1, 0.010), (100, 0.200)), ((100, 0.010), (1100, 0.020)))

    def job(past: int) -> Job:
        return Job(0.0, 0.0, (times.token_s(past),), held=past)

    step = step_s({"": times})
    assert step([job(100)]) == pytest.approx(0.010)
    assert step([job(1100)]) == pytest.approx(0.020)
    assert step([job(1100)] * 2) == pytest.approx(0.010 + 2 * 0.010)
    assert step([job(100)] * 50) == pytest.approx(times.pass_s(50))
    assert step_s({})([job(100), job(1100)]) == pytest.approx(0.030)
