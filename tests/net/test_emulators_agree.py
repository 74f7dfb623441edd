"""What the comparison of the two emulators sends, and how it judges, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emulators_agree import PROFILES, merge, sizes, summary
from testbed.net.emulators.netem.support import HONOURED
from testbed.net.profile.profile import parse_profile


def row(number: int, *ratios: float) -> dict[str, Any]:
    return {"number": number, "ratios": list(ratios), "median_ratio": sorted(ratios)[len(ratios) // 2]}


def test_fifty_transfers_of_one_to_twenty_megabytes_are_the_same_for_whoever_asks() -> None:
    asked = [size for number in range(len(PROFILES)) for size in sizes(number, 5, 1)]
    assert len(PROFILES) == 10 and len(set(asked)) == 50
    assert all(1e6 <= size <= 20e6 for size in asked)
    assert asked[:5] == sizes(0, 5, 1) != sizes(0, 5, 2)


@pytest.mark.parametrize("text", PROFILES)
def test_both_emulators_can_honour_every_profile_and_none_loses_by_chance(text: str) -> None:
    profile = parse_profile(text)
    assert profile.up.loss == profile.down.loss == 0
    assert set(profile.up.beyond_the_basics()) <= HONOURED


def test_they_agree_where_every_profiles_median_and_that_of_all_are_within_three_percent() -> None:
    assert summary([row(1, 1.0, 1.02, 1.5), row(2, 0.98, 1.0, 1.0)])["agree"]
    assert not summary([row(1, 1.0, 1.04, 1.5), row(2, 0.98, 1.0, 1.0)])["agree"]
    assert summary([row(1, 0.9, 1.0, 1.01)])["transfers"] == 3


def test_what_was_measured_last_counts(tmp_path: Path) -> None:
    for name, made in (("a", [row(2, 1.1), row(1, 1.0)]), ("b", [row(2, 1.01)])):
        (tmp_path / name).write_text(json.dumps({"profiles": made}))
    rows = {found["number"]: found["ratios"] for found in merge([tmp_path / "a", tmp_path / "b"])}
    assert rows == {1: [1.0], 2: [1.01]}
