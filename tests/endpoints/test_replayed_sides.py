"""Edges and a cloud without models: what they wait for, who waits for whom, and what they say of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from testbed.endpoints.protocol import (
    Answers,
    Collect,
    Happened,
    Link,
    Looping,
    Offer,
    Planned,
    Replayed,
    Serve,
    Stage,
    TrialResult,
    Ware,
)
from testbed.endpoints.replayed_cloud import ReplayedCloud, step_s
from testbed.endpoints.replayed_edge import ReplayedEdge
from testbed.serving.job import Job
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
        self.cloud.answers(Answers(serving, {1: structs.replace(ANSWER, **answer)}))
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


def test_what_is_not_known_at_the_cloud_fails_by_name(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    sides.cloud.answers(Answers("fifo", {}))
    ((happened,),) = sides.offer(planned(0.0))
    assert happened.error == "the cloud: the request is for ware 1, which is not known here"
    assert not happened.refused


def test_a_step_reads_the_weights_once_and_every_cache_and_multiplies_as_much_as_a_pass() -> None:
    times = DeviceTimes("d", "m", ((1, 0.010), (100, 0.200)), ((100, 0.010), (1100, 0.020)))

    def job(past: int) -> Job:
        return Job(0.0, 0.0, (times.token_s(past),), held=past)

    step = step_s(times)
    assert step([job(100)]) == pytest.approx(0.010)
    assert step([job(1100)]) == pytest.approx(0.020)
    assert step([job(1100)] * 2) == pytest.approx(0.010 + 2 * 0.010)
    assert step([job(100)] * 50) == pytest.approx(times.pass_s(50))
    assert step_s(None)([job(100), job(1100)]) == pytest.approx(0.030)
