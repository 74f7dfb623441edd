"""Whole runs of every delivery by every transport, on links that stay and that change, with whatever may be reused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from testbed.endpoints.protocol import Span
from testbed.endpoints.spans import billed
from testbed.experiment.row import STAGES
from tests.runs import SCENARIO, rows, run, unmeasured

pytestmark = [pytest.mark.netns, pytest.mark.slow]

LOSSLESS = ["whole", "stream(chunk=64)", "stream(by=layers, chunk=1)", "meet(chunk=64)"]
ADAPTIVE = "adaptive(levels=[int8, text, skip], deadline=20s, chunk=64, policy=ewma)"
STEADY, CHANGING = "rate=20mbit,delay=2ms", "delay=2ms,sine:10mbit..30mbit*2s"
#: Each pair of a delivery, a transport, a link and a kind of reuse is in one of them.
RUNS: dict[str, dict[str, Any]] = {
    "steady": {"profiles": [STEADY], "transport": ["tcp", "quic"], "reuse": "all"},
    "changing": {"profiles": [CHANGING], "transport": ["tcp(connection=reuse)", "quic"], "reuse": "all"},
    # Whose chunks may come in any order: of layers, or from both ends, none can be done without.
    "datagram": {
        "profiles": [STEADY, CHANGING],
        "transport": ["datagram"],
        "delivery": ["stream(chunk=64)", ADAPTIVE],
        "reuse": "all",
    },
    "planes": {
        "profiles": [STEADY, CHANGING],
        "transport": ["datagram", "tcp(connection=reuse)"],
        "codecs": ["planes", "window@0.5+planes"],
        "delivery": ["whole", "progressive(planes=2)"],
        "reuse": "all",
    },
    "scout": {
        "profiles": [STEADY, CHANGING],
        "transport": ["quic", "tcp(connection=reuse)"],
        "placements": ["scout", "cloud", "edge"],
        "codecs": ["random@0.5", "window@0.5"],
        "delivery": ["whole"],
        "reuse": "all",
    },
    "prefill": {"profiles": [STEADY, CHANGING], "transport": ["tcp"], "reuse": "prefill"},
    "none": {"profiles": [STEADY], "transport": ["quic", "tcp(connection=reuse)"], "reuse": "none"},
}


@pytest.fixture(autouse=True)
def _unmeasured() -> Iterator[None]:
    with unmeasured():
        yield


@pytest.mark.parametrize("kind", RUNS)
def test_whatever_way_a_cache_crosses_its_answer_is_the_same_and_its_times_add_up(
    tiny_model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "out"
    path.write_text(SCENARIO.replace("examples: 2", "examples: 1") + f"model: {tiny_model('llama')}\n")
    settings = {
        "emulator": "userspace",
        "placements": ["split", "store", "cloud", "edge"],
        "codecs": ["fp16", "q2c@0.5+int8"],
        "delivery": [*LOSSLESS, ADAPTIVE],
        **RUNS[kind],
    }
    done = run(str(path), "--out", str(out), **settings)
    found = rows(out)
    assert done.status == 0, done.errors
    assert len(found) == trials(settings)
    check_times(out, found)
    check_answers(found)
    if kind == "none":
        assert {row["reused"] for row in found} == {""}


def trials(settings: dict[str, Any]) -> int:
    """How many an example has: an adaptive delivery brings codecs of its own, a text crosses whole, at `edge` nothing does."""
    adaptive = sum(delivery.startswith("adaptive") for delivery in settings["delivery"])
    caches = len(settings["codecs"]) * (len(settings["delivery"]) - adaptive) + adaptive
    each = {"split": caches, "store": caches, "scout": len(settings["codecs"]), "cloud": 1, "edge": 0}
    crossing = sum(each[placement] for placement in settings["placements"])
    return (crossing * len(settings["transport"]) + 1) * len(settings["profiles"])


def check_times(out: Path, found: list[dict[str, Any]]) -> None:
    """Stages tile the request, and are what the spans say."""
    lines = [json.loads(line) for line in (out / "spans.jsonl").read_text().splitlines()]
    spans = {line["trial"]: line["spans"] for line in lines}
    table = pd.read_parquet(out / "spans.parquet")
    assert set(spans) == {row["trial"] for row in found} == set(table["trial"])
    for row in found:
        last = 256 if row["planes"] is None else row["planes"]  # what is behind an answer is in no stage
        own = [
            Span(s["stage"], s["start_s"], s["end_s"], s["chunk"], s["side"])
            for s in spans[row["trial"]]
            if s["chunk"] <= last
        ]
        stages = billed(own)
        for stage in STAGES:
            assert row[stage] == pytest.approx(getattr(stages, stage), abs=1e-4)
            # An instant in which nothing is at work is billed to what begins next.
            assert row[f"busy_{stage}"] >= row[stage] - 0.05 or stage == "queue_s"
        assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], abs=1e-5)
        assert 0 < row["bound_s"] <= row["e2e_s"] + 1e-3
        assert row["overlap_s"] >= 0


def check_answers(found: list[dict[str, Any]]) -> None:
    """What loses nothing answers alike, and what is sent whole or in parts keeps the same tokens."""
    found = [row for row in found if not row["tokens_left_out"]]  # by datagrams, a part may be lost
    full = {row["answer"] for row in found if row["placement"] in ("edge", "cloud") or row["codec"] == "fp16"}
    assert len(full) == 1
    for codec, deliveries in itertools.groupby(
        sorted(
            (r for r in found if r["codec"] and not r["delivery"].startswith("adaptive")),
            key=lambda r: r["codec"],
        ),
        key=lambda row: row["codec"],
    ):
        assert (
            len({row["tokens_kept"] for row in deliveries if not row["delivery"].startswith("meet")}) == 1
        ), codec
    for row in found:
        if row["delivery"].startswith("adaptive"):
            assert row["levels"] and row["met"] and row["deadline_s"] == 20.0
