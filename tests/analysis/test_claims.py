"""Verdicts follow their rules: from rows whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import claims
from analysis.run import load
from testbed.cli import main
from tests.analysis.make_run import make_run
from tests.analysis.test_run_directory import lines, rewrite


def _verdicts(*paths: Path) -> dict[str, list[str]]:
    found, _ = claims.judge([load(p) for p in paths])
    return {claim.name: [v.verdict for v in verdicts] for claim, verdicts in found}


def _made(path: Path, codecs: tuple[str, ...], rise: dict[str, float], n: int = 80, **row: Any) -> Path:
    """Rows whose NLL rises by `rise` on average, with noise between examples."""
    make_run(path, ("5g-edge",), ("fp16",), tasks=("needle",), examples=n, reference_score=1.0)
    plain = [r for r in lines(path) if r["codec"] == "fp16"]
    rng = np.random.default_rng(1)
    rows = []
    for codec in codecs:
        mean = rise.get(codec, 0.0)
        for r in plain:
            nll = r["reference_nll"] + mean * float(rng.uniform(0.5, 1.5))
            rows.append(r | {"codec": codec, "nll": nll, "trial": f"{codec}/{r['example']}", **row})
    rewrite(path, rows)
    return path


def test_a_selector_with_lower_nll_holds_and_the_reverse_fails(tmp_path: Path) -> None:
    codecs = ("q2c@0.25+int8", "snapkv@0.25+int8", "snapkv@0.25(question=true)+int8", "h2o@0.25+int8")
    rise = dict(zip(codecs, (0.5, 1.0, 0.1, 0.5), strict=True))
    found = _verdicts(_made(tmp_path / "run", codecs, rise))
    assert found["q2c-over-snapkv"] == ["holds"]
    assert found["q2c-over-snapkv-aware"] == ["fails"]
    assert found["q2c-over-h2o"] == ["undecided"]


def test_alike_within_the_margin_is_no_advantage(tmp_path: Path) -> None:
    codecs = ("q2c@0.25", "h2o@0.25")
    found = _verdicts(_made(tmp_path / "run", codecs, {"q2c@0.25": 0.001, "h2o@0.25": 0.001}))
    assert found["q2c-over-h2o"] == ["fails"]


def test_lossless_is_a_matter_of_the_margin(tmp_path: Path) -> None:
    assert _verdicts(_made(tmp_path / "a", ("int8",), {"int8": 0.01}))["int8-lossless"] == ["holds"]
    assert _verdicts(_made(tmp_path / "b", ("int8",), {"int8": 0.1}))["int8-lossless"] == ["fails"]


def test_nothing_is_decided_below_fifty_examples(tmp_path: Path) -> None:
    found = _verdicts(_made(tmp_path / "run", ("int8",), {"int8": 0.1}, n=49))
    assert found["int8-lossless"] == ["undecided"]


def test_delta_hurts_where_the_nll_rises(tmp_path: Path) -> None:
    codecs = ("int4", "delta(anchor=10)+int4")
    found = _verdicts(_made(tmp_path / "run", codecs, {"int4": 0.1, "delta(anchor=10)+int4": 0.4}))
    assert found["delta-hurts"] == ["holds"]


def test_a_protected_layer_is_judged_by_the_margin_and_against_other_layers(tmp_path: Path) -> None:
    codecs = ("mixed(protect=3)", "mixed(protect=7)")
    found = _verdicts(_made(tmp_path / "run", codecs, {"mixed(protect=3)": 0.005, "mixed(protect=7)": 0.3}))
    assert found["protected-layer"] == ["holds", "holds"]


def test_q2cs_advantage_is_compared_at_the_longest_and_the_shortest_contexts(tmp_path: Path) -> None:
    codecs = ("q2c@0.25", "snapkv@0.25")
    path = _made(tmp_path / "run", codecs, {"snapkv@0.25": 0.2}, n=120)
    rows = []
    for number, row in enumerate(lines(path)):
        long = number % 2 == 0
        more = 0.5 if long and row["codec"].startswith("snapkv") else 0.0
        rows.append(row | {"context_tokens": 2048 if long else 512, "nll": row["nll"] + more})
    rewrite(path, rows)
    assert _verdicts(path)["q2c-grows"] == ["holds"]


def test_fragility_needs_two_models_that_differ(tmp_path: Path) -> None:
    a = _made(tmp_path / "a", ("int4",), {"int4": 0.01}, model="a")
    b = _made(tmp_path / "b", ("int4",), {"int4": 0.5}, model="b")
    assert _verdicts(a)["int4-fragility"] == []
    assert _verdicts(a, b)["int4-fragility"] == ["holds"]


def test_entropy_coding_is_judged_by_its_bytes(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int4", "int4+zstd", "int4+ans"), {})
    size = {"int4": 1000, "int4+zstd": 950, "int4+ans": 700}
    rewrite(path, [r | {"payload_bytes": size[r["codec"]]} for r in lines(path)])
    found, _ = claims.judge([load(path)])
    coded = {v.what: v.verdict for claim, vs in found for v in vs if claim.name == "entropy-coding-saves"}
    assert coded == {"int4+zstd against int4": "fails", "int4+ans against int4": "holds"}


def test_transmission_is_judged_link_by_link(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ("5g-good", "5g-edge"), ("fp16", "int8"), tasks=("needle",), examples=60)
    path = tmp_path / "run"
    rewrite(path, [r | ({"transmit_s": 0.1} if r["profile"] == "5g-good" else {}) for r in lines(path)])
    found, _ = claims.judge([load(path)])
    shares = {v.what: v.verdict for claim, vs in found for v in vs if claim.name == "transmission-dominates"}
    assert shares == {"fp16 on 5g-good": "fails", "fp16 on 5g-edge": "holds"}


def test_a_task_that_the_full_cache_cannot_do_is_left_out_and_named(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int8",), {"int8": 0.0}, reference_score=0.1)
    found, said = claims.judge([load(path)])
    assert not any(verdicts for _, verdicts in found)
    assert len(said) == 1
    assert "needle is left out: the full cache scores 0.10" in said[0]


def test_holms_correction_spans_a_claims_models_and_tasks() -> None:
    verdicts = [claims.Verdict("c", "m", str(i), "x", "holds", "", 80, p) for i, p in enumerate((0.01, 0.04))]
    first, second = claims.rules.corrected(
        [*verdicts, claims.Verdict("c", "m", "", "x", "holds", "", 80, 0.03)]
    )[:2]
    assert (first.verdict, second.verdict) == ("holds", "undecided")


def test_claims_are_printed_and_given_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _made(tmp_path / "run", ("int8",), {"int8": 0.01})
    with pytest.raises(SystemExit) as ended:
        main(["claims", str(path), "--json"])
    assert ended.value.code == 0
    value = json.loads(capsys.readouterr().out)
    assert {c["claim"] for c in value["claims"]} == {c.name for c in claims.CLAIMS}
    with pytest.raises(SystemExit):
        main(["claims", str(path)])
    assert "holds      smollm2-135m · int8 against full cache: ΔNLL +0.0" in capsys.readouterr().out
