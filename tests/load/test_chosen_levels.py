"""Levels that are chosen on the way under a load: of what is stored, part by part, by what the link has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.delivery.run_lengths import each
from testbed.experiment import runner
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.experiment.row import STAGES
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.test_scenarios import BASE
from tests.load.unlinked import Unlinked

ASKED: dict[str, Any] = {
    "topology": "star.yaml",
    "placements": "store",
    "context_tokens": 64,
    "examples": 2,
    "max_new_tokens": 2,
    "load": "closed(think=200ms)",
    "duration": "3s",
    "warmup": "1s",
}


@pytest.fixture
def quiet() -> Iterator[None]:
    """Links are not measured."""
    passed = Calibration("n1-hub", "p", "none", (Attempt((), {}),))
    with (
        patch.object(LoadRunner, "_measured", lambda self, profile: passed),
        patch("testbed.experiment.full_load.measured", lambda fabric, plan: None),
    ):
        yield


def ran(folder: Path, **asked: Any) -> list[dict[str, Any]]:
    (folder / "star.yaml").write_text("{kind: star, nodes: 4, profile: 5g-mid}")
    settings = {**BASE, **ASKED, **asked, "topology": str(folder / "star.yaml")}
    started = runner.start(
        make_plan(settings, "t.yaml"), folder / "run", lambda progress: None, accept_uncalibrated=True
    )
    started.execute()
    return list(started.directory.rows())


def of_level(levels: str) -> Counter[str]:
    """How many chunks crossed at each."""
    return Counter(each(levels))


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_every_part_is_sent_at_the_level_that_is_chosen_and_takes_its_own_bytes_and_times(
    tmp_path: Path,
) -> None:
    ladder = "levels=[int8, int4, skip], deadline=20s, chunk=16"
    with patch("testbed.experiment.load_run.Fabric", Unlinked):
        rows = ran(
            tmp_path,
            edges={
                "n1": {"delivery": f"adaptive({ladder}, policy=fixed)"},
                "n2": {"delivery": f"adaptive({ladder}, policy=fixed(level=1))"},
                "n3": {"delivery": f"adaptive({ladder}, policy=mpc)"},
            },
        )
    assert not any(row["error"] for row in rows) and {row["client"] for row in rows} == {"n1", "n2", "n3"}
    first, second, third = ([row for row in rows if row["client"] == client] for client in ("n1", "n2", "n3"))
    for own, levels in ((first, {"int8"}), (second, {"int4"}), (third, {"int8", "int4"})):
        for row in own:
            assert set(of_level(row["levels"])) <= levels and of_level(row["levels"]).total() == 4
            assert (
                row["chunks"] == 4 and row["deadline_s"] == 20 and row["met"] and row["tokens_left_out"] == 0
            )
            assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], abs=1e-5)
            assert row["tokens_kept"] == row["context_tokens"]
            assert row["wire_bytes"] > row["payload_bytes"] and row["score"] is None
    large, small = ({row["payload_bytes"] for row in own} for own in (first, second))
    assert max(small) < 0.7 * min(large)
    assert all(min(small) <= row["payload_bytes"] <= max(large) for row in third)


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.usefixtures("quiet", "own_state")
def test_a_slow_links_edge_takes_coarser_levels_and_leaves_out_what_would_be_late(tmp_path: Path) -> None:
    """64 tokens are 4.3 MB in int8, 2.6 MB in int4: at 20 Mbit/s 1.8 and 1.1 s, at 200 a tenth of that."""
    delivery = "adaptive(levels=[int8, int4, skip], deadline=1500ms, chunk=8, policy=throughput)"
    rows = ran(
        tmp_path,
        profiles="rate=200mbit,delay=5ms",
        edges={"n1": None, "n2": {"profile": "rate=20mbit,delay=5ms"}},
        delivery=delivery,
        duration="8s",
    )
    assert not any(row["error"] for row in rows)
    fast, slow = (
        [row for row in rows if row["client"] == client and not row["warmup"]] for client in ("n1", "n2")
    )
    assert all(of_level(row["levels"]) == {"int8": 8} and row["met"] for row in fast)
    assert all(set(of_level(row["levels"])) != {"int8"} for row in slow)
    for row in slow:
        out = of_level(row["levels"]).get("skip", 0)
        assert (row["tokens_left_out"] > 0) == (out > 0)
        assert row["tokens_kept"] == row["context_tokens"] - row["tokens_left_out"]
        assert row["payload_bytes"] < min(other["payload_bytes"] for other in fast)
    assert sum(bool(row["met"]) for row in slow) > len(slow) / 2
