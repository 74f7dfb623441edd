"""Where sending a cache is forecast to pay, against the formulas that it follows from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from testbed.experiment.borders import Border, borders
from testbed.experiment.estimate import ANSWER_TOKENS, QUESTION_TOKENS, Estimator
from testbed.experiment.plan import make_plan
from tests.command import command
from tests.test_devices import BASE, profile

#: A TCP segment's bytes on the link, and of them the payload's.
FRAMED = 1500 / 1448


def found(**changes: Any) -> list[Border]:
    about = {**BASE, "profiles": ["rate=100mbit"], "placements": ["store", "split"], "max_new_tokens": None}
    return borders(Estimator(make_plan({**about, **changes}, "t.yaml")))


def test_without_delay_the_borders_are_where_bytes_over_the_rate_meet_what_is_saved(tmp_path: Path) -> None:
    edge = profile(tmp_path, "edge", prefill=[[512, "2s"], [1024, "4s"]], decode=[[1024, "100ms"]])
    cloud = profile(tmp_path, "cloud", prefill=[[512, "1s"], [1024, "2s"]], decode=[[1024, "10ms"]])
    plan = {"compute": {"edge": f"device:{edge}", "cloud": f"device:{cloud}"}, "codecs": ["int8"]}
    store, split = found(**plan)
    cache, text = 1024 * 2 * 32 * 8 * (128 + 2), 1024 * 4.5  # a byte an element, and a scale a token and head
    coding = 2 * 32 * 8 * 128 * 2 * 1024 / 1e9
    # The question's pass, on the line from one token's to that of 512, and the tokens behind the first.
    answering = {
        side: token + (longest - token) * (QUESTION_TOKENS - 1) / 511 + token * (ANSWER_TOKENS - 1)
        for side, token, longest in (("edge", 0.1, 2.0), ("cloud", 0.01, 1.0))
    }
    assert store.beats_text_bps == pytest.approx(8 * FRAMED * (cache - text) / (2.0 - coding), rel=1e-3)
    saved = 4.0 + answering["edge"] - answering["cloud"] - coding
    assert store.beats_edge_bps == pytest.approx(8 * FRAMED * cache / saved, rel=1e-3)
    saved = answering["edge"] - answering["cloud"] - 2 * coding
    assert split.beats_edge_bps == pytest.approx(8 * FRAMED * cache / saved, rel=1e-3)
    assert split.beats_text_bps is None  # the edge prefills no faster than the cloud


def test_a_stream_pays_at_no_higher_rate_than_the_whole_and_a_longer_way_at_a_higher_one() -> None:
    whole, stream = found(placements=["split"], delivery=["whole", "stream(chunk=256)"])
    assert stream.beats_edge_bps is not None and whole.beats_edge_bps is not None
    assert stream.beats_edge_bps < whole.beats_edge_bps
    near, far = found(placements=["store"], profiles=["rate=100mbit,delay=1ms", "rate=100mbit,delay=40ms"])
    assert near.beats_edge_bps is not None and far.beats_edge_bps is not None
    assert (near.rtt_s, far.rtt_s) == (0.002, 0.08) and near.beats_edge_bps < far.beats_edge_bps


@pytest.mark.parametrize("factor", [1, 3, 50])
def test_with_one_speed_a_side_no_cache_that_the_edge_prefills_beats_both(factor: int) -> None:
    for side in ("edge", "cloud"):
        for border in found(
            model="smollm2-135m", compute={side: factor}, placements=["split"], codecs=["int4"]
        ):
            assert border.beats_text_bps is None or border.beats_edge_bps is None


def test_an_edge_that_cannot_decode_is_beaten_by_nobody_and_unknown_sizes_have_no_border(
    tmp_path: Path,
) -> None:
    compute = {"edge": {"device": "m1-max-llama-3.1-8b", "decode": False}, "cloud": BASE["compute"]["cloud"]}  # type: ignore[index]
    assert {each.beats_edge_bps for each in found(compute=compute)} == {None}
    assert found(placements=["cloud"]) == []


def test_plan_prints_the_borders_and_has_them_as_json() -> None:
    asked = (
        "plan",
        "quick",
        "--set",
        "compute.edge=4",
        "--set",
        "placements=[store, cloud]",
        "--codec",
        "int4",
    )
    text = command(*asked).out
    assert "than the text" in text and "a forecast, which a run measures" in text
    (first, *_) = json.loads(command(*asked, "--json").out)["borders"]
    assert first["codec"] == "int4" and first["placement"] == "store" and first["beats_edge_bps"] > 0
