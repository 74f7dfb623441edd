"""The radio's joules of a request, against the model's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from testbed.analysis import energy, summary
from testbed.analysis.run import load
from tests.analysis.make_run import make_run


def test_a_megabyte_in_two_seconds_over_lte_takes_what_the_published_model_says() -> None:
    # 4 Mbit/s at 438.39 mW per Mbit/s and 1,288.04 mW, for two seconds.
    assert energy.RADIOS["lte"].joules(1e6, 2.0) == pytest.approx(2 * (4 * 0.43839 + 1.28804))


def test_what_crossed_no_link_that_says_so_has_no_joules() -> None:
    rows = pd.DataFrame(
        {"wire_bytes": [1e6, None, 1e6], "connect_s": [0.1, 0.1, None], "busy_transmit_s": [1.9, 1.9, 1.9]}
    )
    found = energy.per_request(rows, energy.RADIOS["wifi"])
    assert found[0] == pytest.approx(8 * 0.28317 + 2 * 0.13286)
    assert found[1:].isna().all()


def test_the_summary_has_the_mean_of_each_cell(tmp_path: Path) -> None:
    run = load(make_run(tmp_path, ("5g-mid",), ("int8",), ("split",), ("passages",), examples=4))
    (line,) = summary.summarise(run).to_dict("records")
    expected = energy.per_request(run.rows, energy.RADIOS["lte"]).mean()
    assert expected > 0 and line["radio_lte_j"] == pytest.approx(expected)
    assert line["radio_wifi_j"] < line["radio_lte_j"]
