"""Verdicts follow their rules: from rows whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.analysis import claims
from testbed.analysis.run import load
from testbed.cli import main
from testbed.codecs import registry
from testbed.experiment.plan import load_plan
from testbed.experiment.trial import task_label
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


def test_rare_large_losses_are_no_lossless_setting(tmp_path: Path) -> None:
    """The mean of a hundred is within the margin, although a tenth of them lose a nat each token."""
    path = _made(tmp_path / "run", ("int8",), {"int8": 0.0}, n=100)
    rng = np.random.default_rng(3)
    noise = rng.normal(-0.12, 0.01, 100)
    rewrite(
        path, [r | {"nll": r["nll"] + (1.0 if i % 10 == 0 else noise[i])} for i, r in enumerate(lines(path))]
    )
    found, _ = claims.judge([load(path)])
    (one,) = (v for claim, vs in found for v in vs if claim.name == "int8-lossless")
    assert one.verdict == "undecided"
    assert "10% [5%, 18%] lose more than 0.2" in one.figures


def test_nothing_is_decided_below_fifty_examples(tmp_path: Path) -> None:
    found = _verdicts(_made(tmp_path / "run", ("int8",), {"int8": 0.1}, n=49))
    assert found["int8-lossless"] == ["undecided"]


def test_delta_hurts_where_the_nll_rises(tmp_path: Path) -> None:
    codecs = ("int4", "delta(anchor=10)+int4")
    found = _verdicts(_made(tmp_path / "run", codecs, {"int4": 0.1, "delta(anchor=10)+int4": 0.4}))
    assert found["delta-hurts"] == ["holds"]


def test_two_forms_of_q2c_at_one_ratio_are_judged_apart(tmp_path: Path) -> None:
    codecs = ("q2c@0.25+fp16", "q2c@0.25(scope=global, pool=1)+fp16", "h2o@0.25+fp16")
    rise = dict(zip(codecs, (0.2, 1.0, 0.5), strict=True))
    found, _ = claims.judge([load(_made(tmp_path / "run", codecs, rise))])
    verdicts = {v.what: v.verdict for claim, vs in found for v in vs if claim.name == "q2c-over-h2o"}
    assert verdicts == {
        "q2c@0.25+fp16 against h2o@0.25+fp16": "holds",
        "q2c@0.25(scope=global, pool=1)+fp16 against h2o@0.25+fp16": "fails",
    }


PUBLISHED = {
    "q2c": "q2c@0.25(scope=global, layers=last, sinks=0, pool=1)+fp16",
    "snapkv": "snapkv@0.25(scope=global, layers=last, window=0, kernel=1, question=true)+fp16",
    "h2o": "h2o@0.25(scope=global, layers=last, question=true)+fp16",
}


def test_the_published_forms_are_judged_among_themselves(tmp_path: Path) -> None:
    own = ("q2c@0.25+fp16", "snapkv@0.25+fp16", "snapkv@0.25(question=true)+fp16", "h2o@0.25+fp16")
    path = _made(tmp_path / "run", (*PUBLISHED.values(), *own), {PUBLISHED["q2c"]: 0.9, own[0]: 0.1})
    found, _ = claims.judge([load(path)])
    compared = {claim.name: [v.what for v in vs] for claim, vs in found if claim.number in ("1", "2")}
    assert compared == {
        "q2c-over-snapkv-published": [f"{PUBLISHED['q2c']} against {PUBLISHED['snapkv']}"],
        "q2c-over-snapkv": [f"{own[0]} against {own[1]}"],
        "q2c-over-snapkv-aware": [f"{own[0]} against {own[2]}"],
        "q2c-over-h2o-published": [f"{PUBLISHED['q2c']} against {PUBLISHED['h2o']}"],
        "q2c-over-h2o": [f"{own[0]} against {own[3]}"],
    }


def _diagnosis(run: Path, damage: str) -> Path:
    told = {"model": "smollm2-135m", "published": {"damage": damage}}
    (run / "diagnosis.json").write_text(json.dumps(told))
    return run


@pytest.mark.parametrize(
    ("protected", "verdict"),
    [(0.101, "holds"), (0.05, "fails"), (0.001, "fails")],
)
def test_where_the_damage_is_spread_a_protected_layer_has_to_do_nothing(
    tmp_path: Path, protected: float, verdict: str
) -> None:
    codecs = ("int4", "mixed(protect=3)", "mixed(protect=7)")
    rise = dict(zip(codecs, (0.1, protected, 0.1), strict=True))
    path = _diagnosis(_made(tmp_path / "run", codecs, rise, n=200), "distributed")
    found = _verdicts(path)
    assert found["protected-layer-distributed"] == [verdict]
    assert found["protected-layer"] == []
    concentrated = _verdicts(_diagnosis(path, "concentrated"))
    assert concentrated["protected-layer-distributed"] == []
    assert concentrated["protected-layer"] == ["holds" if protected == 0.001 else "fails"]


@pytest.mark.parametrize(
    ("int4", "protected", "others", "verdict"),
    [
        (0.3, 0.005, 0.3, "holds"),
        (0.3, 0.1, 0.3, "fails"),  # better than other layers, but not lossless
        (0.3, 0.006, 0.005, "fails"),  # lossless, but so is any other layer
        (0.3, 0.015, 0.005, "fails"),  # another layer is better
        (0.01, 0.005, 0.01, "undecided"),  # nothing to restore
    ],
)
def test_a_protected_layer_has_to_restore_what_int4_loses_and_other_layers_do_not(
    tmp_path: Path, int4: float, protected: float, others: float, verdict: str
) -> None:
    codecs = ("int4", "mixed(protect=3)", "mixed(protect=7)", "mixed(protect=9)")
    rise = dict(zip(codecs, (int4, protected, others, others), strict=True))
    found, _ = claims.judge([load(_made(tmp_path / "run", codecs, rise))])
    (one,) = (v for claim, vs in found for v in vs if claim.name == "protected-layer")
    assert one.verdict == verdict
    assert ("nothing to restore" in one.figures) == (verdict == "undecided")


def test_protections_are_judged_against_int4_with_scales_of_their_kind(tmp_path: Path) -> None:
    plain = ("int4", "int4(group=0, symmetric=true)")
    of_groups = ("mixed(protect=3)", "mixed(protect=7)")
    of_tokens = ("mixed(protect=3, scale=token)", "mixed(protect=7, scale=token)")
    rise = dict(zip([*plain, *of_groups, *of_tokens], (0.001, 0.5, 0.001, 0.001, 0.004, 0.5), strict=True))
    found, _ = claims.judge([load(_made(tmp_path / "run", tuple(rise), rise))])
    verdicts = [v for claim, vs in found for v in vs if claim.name == "protected-layer"]
    assert [(one.what.split(" against")[0], one.verdict) for one in verdicts] == [
        (of_groups[0], "undecided"),
        (of_tokens[0], "holds"),
    ]


def _lengths(path: Path, per_doubling: float) -> Path:
    """60 questions at 256, 512 and 1024 tokens; SnapKV loses 0.2 nats at 256, and so much more with each doubling."""
    codecs = ("q2c@0.25", "snapkv@0.25")
    _made(path, codecs, {"snapkv@0.25": 0.2}, n=60)
    rows = []
    for number, row in enumerate(lines(path)):
        for doublings in range(3):
            tokens = 256 << doublings
            # Examples differ in their slopes, whose mean is as asked.
            slope = per_doubling + (0.05 if number % 2 else -0.05)
            more = doublings * slope if row["codec"].startswith("snapkv") else 0.0
            known = {
                "task": f"needle@{tokens}",
                "context_tokens": tokens,
                "trial": f"{row['trial']}/{tokens}",
            }
            rows.append(row | known | {"nll": row["nll"] + more})
    rewrite(path, rows)
    return path


@pytest.mark.parametrize(("per_doubling", "verdict"), [(0.1, "holds"), (-0.1, "fails"), (0.0, "undecided")])
def test_q2cs_advantage_grows_where_each_examples_slope_is_positive(
    tmp_path: Path, per_doubling: float, verdict: str
) -> None:
    found, _ = claims.judge([load(_lengths(tmp_path / "run", per_doubling))])
    (one,) = (v for claim, vs in found for v in vs if claim.name == "q2c-grows")
    assert f"grows by {per_doubling:.3f}" in one.figures.replace("-0.000", "0.000")
    assert (one.verdict, one.n) == (verdict, 60)


def test_q2cs_advantage_at_one_length_says_nothing_of_growth(tmp_path: Path) -> None:
    codecs = ("q2c@0.25", "snapkv@0.25")
    assert _verdicts(_made(tmp_path / "run", codecs, {"snapkv@0.25": 0.2}))["q2c-grows"] == []


@pytest.mark.parametrize(("per_doubling", "verdict"), [(0.1, "holds"), (-0.1, "fails"), (0.0, "undecided")])
def test_int4s_damage_grows_where_each_examples_slope_is_positive(
    tmp_path: Path, per_doubling: float, verdict: str
) -> None:
    path = _lengths(tmp_path / "run", per_doubling)
    rewrite(path, [r | {"codec": "int4"} for r in lines(path) if r["codec"].startswith("snapkv")])
    assert _verdicts(path)["int4-grows"] == [verdict]


def test_fragility_needs_two_models_that_differ(tmp_path: Path) -> None:
    a = _made(tmp_path / "a", ("int4",), {"int4": 0.01}, model="a")
    b = _made(tmp_path / "b", ("int4",), {"int4": 0.5}, model="b")
    assert _verdicts(a)["int4-fragility"] == []
    assert _verdicts(a, b)["int4-fragility"] == ["holds"]


def test_two_models_that_lose_alike_are_not_told_apart(tmp_path: Path) -> None:
    a = _made(tmp_path / "a", ("int4",), {"int4": 0.3}, model="a")
    b = _made(tmp_path / "b", ("int4",), {"int4": 0.301}, model="b")
    assert _verdicts(a, b)["int4-fragility"] == [
        "undecided"
    ]  # ±0.02 takes more examples than these, at such a spread
    c = _made(tmp_path / "c", ("int4",), {"int4": 0.01}, model="c")
    d = _made(tmp_path / "d", ("int4",), {"int4": 0.012}, model="d")
    assert _verdicts(c, d)["int4-fragility"] == ["fails"]


def test_two_models_are_compared_on_the_tasks_that_both_can_do(tmp_path: Path) -> None:
    a = _made(tmp_path / "a", ("int4",), {"int4": 0.01}, model="a")
    hard = [r | {"task": "hard", "nll": r["nll"] + 3, "trial": "h" + r["trial"]} for r in lines(a)]
    rewrite(a, lines(a) + hard)
    b = _made(tmp_path / "b", ("int4",), {"int4": 0.012}, model="b")
    other = [r | {"task": "hard", "reference_score": 0.0, "trial": "h" + r["trial"]} for r in lines(b)]
    rewrite(b, lines(b) + other)
    assert _verdicts(a, b)["int4-fragility"] == ["fails"]


def test_examples_of_different_seeds_are_not_paired(tmp_path: Path) -> None:
    first = _made(tmp_path / "a", ("q2c@0.25",), {"q2c@0.25": 0.1})
    second = _made(tmp_path / "b", ("h2o@0.25",), {"h2o@0.25": 0.9})
    assert _verdicts(first, second)["q2c-over-h2o"] == ["holds"]
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps(manifest | {"settings": {"seed": 1}}))
    found, _ = claims.judge([load(first), load(second)])
    assert [v.n for claim, vs in found for v in vs if claim.name == "q2c-over-h2o"] == [0]


def test_entropy_coding_is_judged_by_its_bytes(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int4", "int4+zstd", "int4+ans"), {})
    size = {"int4": 1000, "int4+zstd": 950, "int4+ans": 700}
    rewrite(path, [r | {"payload_bytes": size[r["codec"]]} for r in lines(path)])
    found, _ = claims.judge([load(path)])
    coded = {v.what: v.verdict for claim, vs in found for v in vs if claim.name == "entropy-coding-saves"}
    assert coded == {"int4+zstd against int4": "fails", "int4+ans against int4": "holds"}


@pytest.mark.parametrize("coder", registry.CODERS)
def test_every_coder_of_the_registry_is_told_from_its_quantizer(tmp_path: Path, coder: str) -> None:
    codecs = ("int4", f"int4+{coder}", "delta+int4", f"delta+int4+{coder}")
    found, _ = claims.judge([load(_made(tmp_path / "run", codecs, {}))])
    compared = {claim.name: {v.what for v in vs} for claim, vs in found}
    assert compared["entropy-coding-saves"] == {
        f"int4+{coder} against int4",
        f"delta+int4+{coder} against delta+int4",
    }
    assert compared["delta-spreads"] == {f"bytes of delta+int4+{coder} against int4+{coder}"}


def test_transmission_is_set_against_prefill_and_quantization(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-edge",), ("fp16",), tasks=("needle",), examples=30)
    times = {"transmit_s": 2.676, "prefill_s": 0.06, "select_s": 0.0, "encode_s": 0.002}
    behind = {"decode_s": 0.1, "first_token_s": 0.05, "generate_s": 1.0}
    rewrite(path, [r | times | behind for r in lines(path)])
    found, _ = claims.judge([load(path)])
    (one,) = (v for claim, vs in found for v in vs if claim.name == "transmission-dominates")
    assert "takes 43 times prefill and quantization" in one.figures
    assert "2.2 times all compute" in one.figures


def test_q2c_is_free_where_the_question_belongs_to_the_prefill(tmp_path: Path) -> None:
    """Of a selection of 0.33 s, 0.3 s are the question's pass: 0.03 of 1.3 s are left."""
    path = _made(tmp_path / "run", ("q2c@0.25",), {})
    times = {"prefill_s": 1.0, "select_s": 0.33, "question_s": 0.3}
    rewrite(path, [r | times for r in lines(path)])
    found, _ = claims.judge([load(path)])
    (one,) = (v for claim, vs in found for v in vs if claim.name == "q2c-free")
    assert one.verdict == "holds"
    assert "takes 0.023 of the prefill of context and question" in one.figures
    assert "with the question's pass 0.33 of the context's" in one.figures
    rewrite(path, [{k: v for k, v in r.items() if k != "question_s"} for r in lines(path)])
    assert _verdicts(path)["q2c-free"] == ["undecided"]  # rows of before do not tell


def test_transmission_is_judged_link_by_link(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ("5g-good", "5g-edge"), ("fp16", "int8"), tasks=("needle",), examples=60)
    path = tmp_path / "run"
    rewrite(path, [r | ({"transmit_s": 0.1} if r["profile"] == "5g-good" else {}) for r in lines(path)])
    found, _ = claims.judge([load(path)])
    shares = {v.what: v.verdict for claim, vs in found for v in vs if claim.name == "transmission-dominates"}
    assert shares == {"fp16 on 5g-good": "fails", "fp16 on 5g-edge": "holds"}


def test_times_decide_from_twenty_examples_on(tmp_path: Path) -> None:
    for n, verdict in ((19, "undecided"), (20, "holds")):
        path = make_run(tmp_path / str(n), ("5g-edge",), ("fp16",), tasks=("needle",), examples=n)
        assert _verdicts(path)["transmission-dominates"] == [verdict]


def test_bytes_and_times_are_judged_whatever_the_answers_are_worth(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int4", "int4+ans"), {}, reference_score=0.0)
    rewrite(path, [r | {"payload_bytes": 700 if r["codec"] == "int4+ans" else 1000} for r in lines(path)])
    assert _verdicts(path)["entropy-coding-saves"] == ["holds"]


def test_text_is_compared_with_the_fastest_codec_that_loses_little(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-mid",), ("int8", "q2c@0.25+int4"), tasks=("needle",), examples=30)
    rewrite(
        path, [r | {"reference_score": 1.0} for r in lines(path)]
    )  # q2c@0.25+int4 is the faster, but loses 0.35
    found, _ = claims.judge([load(path)])
    (one,) = (v for claim, vs in found for v in vs if claim.name == "kv-worth-sending")
    assert one.what == "int8 against sending the text, on 5g-mid"


#: which claims each scenario of scenarios/claims is for
SCENARIOS = {
    "quantization": {
        "int8-lossless",
        "int4-fragility",
        "protected-layer",
        "protected-layer-distributed",
        "delta-hurts",
        "delta-spreads",
        "entropy-coding-saves",
    },
    "q2c": {claim.name for claim in claims.CLAIMS if claim.number in ("1", "2")},
    "int8": {"int8-lossless"},
    "int4": {"int4-fragility"},
    "protected-layer": {"protected-layer", "protected-layer-distributed"},
    "delta": {"delta-hurts", "delta-spreads"},
    "transmission": {"transmission-dominates"},
    "q2c-free": {"q2c-free"},
    "context-length": {"q2c-grows", "int4-grows"},
    "entropy-coding": {"entropy-coding-saves"},
    "text-and-prefill": {"kv-worth-sending"},
}


def test_every_number_of_the_study_is_judged_or_said_to_be_untestable() -> None:
    numbers = {claim.number for claim in claims.CLAIMS} | {number for number, *_ in claims.NOT_YET}
    assert numbers == {"-", *map(str, range(1, 17))}


def test_every_claim_has_a_scenario_and_every_scenario_a_claim() -> None:
    assert set().union(*SCENARIOS.values()) == {c.name for c in claims.CLAIMS}
    assert {p.stem for p in Path("scenarios/claims").glob("*.yaml")} == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenarios_rows_are_what_its_claims_ask_for(tmp_path: Path, name: str) -> None:
    plan = load_plan(f"scenarios/claims/{name}.yaml")
    runs = []
    for model, damage in (("smollm2-135m", "distributed"), ("gemma3-270m", "concentrated")):
        path = make_run(tmp_path / model, ("5g-mid",), ("fp16",), ("split",), ("needle",), examples=50)
        (like, *_) = lines(path)
        rows = []
        for task, tokens in plan.batches():
            label = task_label(plan, task, tokens)
            for cell in plan.cells(task, tokens):
                known = {
                    "model": model,
                    "task": label,
                    "codec": cell.codec_text,
                    "placement": cell.placement,
                    "profile": cell.profile.name,
                    "context_tokens": tokens,
                    "reference_score": 1.0,
                }
                rows += [like | known | {"example": str(i), "trial": f"{len(rows) + i}"} for i in range(50)]
        rewrite(path, rows)
        told = {"model": model, "published": {"damage": damage}}
        (path / "diagnosis.json").write_text(json.dumps(told))
        runs.append(load(path))
    found, said = claims.judge(runs)
    assert {claim.name for claim, verdicts in found if verdicts} >= SCENARIOS[name]
    assert said == []


def test_a_task_that_the_full_cache_cannot_do_is_left_out_and_named(tmp_path: Path) -> None:
    path = _made(tmp_path / "run", ("int8",), {"int8": 0.0}, reference_score=0.05)
    found, said = claims.judge([load(path)])
    assert not any(verdicts for _, verdicts in found)
    assert len(said) == 1
    assert "needle is left out: the full cache scores 0.05" in said[0]


def test_holms_correction_spans_a_claims_models_and_tasks() -> None:
    verdicts = [claims.Verdict("c", "m", str(i), "x", "holds", "", 80, p) for i, p in enumerate((0.01, 0.04))]
    first, second = claims.rules.corrected(
        [*verdicts, claims.Verdict("c", "m", "", "x", "holds", "", 80, 0.03)]
    )[:2]
    assert (first.verdict, second.verdict) == ("holds", "undecided")


def test_holms_correction_counts_what_stays_undecided_too(tmp_path: Path) -> None:
    codecs = ("int4", "delta+int4", "delta(loop=open)+int4")
    path = _made(tmp_path / "run", codecs, {})
    rng = np.random.default_rng(2)
    noise = {c: rng.normal(0.0 if c != "delta+int4" else 0.26, 1.0, 80) for c in codecs}
    seen = dict.fromkeys(codecs, 0)
    rows = []
    for row in lines(path):
        codec = row["codec"]
        rows.append(row | {"nll": row["nll"] + noise[codec][seen[codec]]})
        seen[codec] += 1
    rewrite(path, rows)
    found, _ = claims.judge([load(path)])
    verdicts = [v for claim, vs in found for v in vs if claim.name == "delta-hurts"]
    assert len(verdicts) == 2
    assert all(np.isfinite(v.p) for v in verdicts)


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
    with pytest.raises(SystemExit):
        main(["claims", str(path), "--markdown"])
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith(
        "| `int8-lossless` | smollm2-135m | int8 against full cache | holds | 80 | ΔNLL +0.0"
    )
