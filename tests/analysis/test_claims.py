"""Verdicts follow their rules: from rows whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.analysis import claims
from testbed.analysis.claims.rules import Verdict, corrected
from testbed.analysis.run import load
from testbed.codecs import registry
from testbed.errors import UsageError
from testbed.experiment.plan import load_plan
from testbed.experiment.trial import task_label
from tests.analysis.conftest import Command
from tests.analysis.make_load import make_load
from tests.analysis.make_run import change, lines, losing, make_run, rewrite, write_manifest


def judged(*paths: Path) -> dict[str, list[Verdict]]:
    return {claim.name: verdicts for claim, verdicts in claims.judge([load(path) for path in paths])[0]}


def verdicts(claim: str, *paths: Path) -> list[str]:
    return [verdict.verdict for verdict in judged(*paths)[claim]]


@pytest.mark.parametrize(
    ("rise", "known"),
    [
        (
            {"q2c@0.25+int8": 0.5, "snapkv@0.25+int8": 1.0, "snapkv@0.25(question=true)+int8": 0.1, "h2o@0.25+int8": 0.5},
            {"q2c-over-snapkv": ["holds"], "q2c-over-snapkv-aware": ["fails"], "q2c-over-h2o": ["undecided"]},
        ),
        ({"q2c@0.25": 0.001, "h2o@0.25": 0.001}, {"q2c-over-h2o": ["fails"]}),  # alike is no advantage
        ({"int8": 0.01}, {"int8-lossless": ["holds"]}),
        ({"int8": 0.1}, {"int8-lossless": ["fails"]}),
        ({"int4": 0.1, "delta(anchor=10)+int4": 0.4}, {"delta-hurts": ["holds"]}),
        ({"q2c@0.25": 0.0, "snapkv@0.25": 0.2}, {"q2c-grows": []}),  # one length says nothing of growth
    ],
)  # fmt: skip
def test_rows_whose_truth_is_known_get_their_rules_verdicts(
    tmp_path: Path, rise: dict[str, float], known: dict[str, list[str]]
) -> None:
    path = losing(tmp_path / "run", rise)
    assert {claim: verdicts(claim, path) for claim in known} == known


def test_nothing_is_decided_below_fifty_examples_and_of_times_below_twenty(tmp_path: Path) -> None:
    assert verdicts("int8-lossless", losing(tmp_path / "run", {"int8": 0.1}, n=49)) == ["undecided"]
    for n, verdict in ((19, "undecided"), (20, "holds")):
        path = make_run(tmp_path / str(n), ("5g-edge",), ("fp16",), tasks=("needle",), examples=n)
        assert verdicts("transmission-dominates", path) == [verdict]


def test_what_failed_is_said_beside_verdicts_on_what_was_answered(tmp_path: Path) -> None:
    run = losing(tmp_path / "run", {"int8": 0.01})
    rewrite(run, [r | {"error": "timed out"} if i < 20 else r for i, r in enumerate(lines(run))])
    _, left_out = claims.judge([load(run)])
    assert any("20 trials failed (int8 20 of" in one and "left out, so that" in one for one in left_out)


def test_rare_large_losses_are_no_lossless_setting(tmp_path: Path) -> None:
    """The mean of a hundred is within the margin, although a tenth of them lose a nat each token."""
    path = losing(tmp_path / "run", {"int8": 0.0}, n=100)
    noise = iter(np.random.default_rng(3).normal(-0.12, 0.01, 100))
    rare = [row | {"nll": row["nll"] + (1.0 if i % 10 == 0 else next(noise))} for i, row in enumerate(lines(path))]  # fmt: skip
    rewrite(path, rare)
    (verdict,) = judged(path)["int8-lossless"]
    assert verdict.verdict == "undecided"
    assert "10% [5%, 18%] lose more than 0.2" in verdict.figures


PUBLISHED = {
    "q2c": "q2c@0.25(scope=global, layers=last, sinks=0, pool=1)+fp16",
    "snapkv": "snapkv@0.25(scope=global, layers=last, window=0, kernel=1, question=true)+fp16",
    "h2o": "h2o@0.25(scope=global, layers=last, question=true)+fp16",
}


def test_forms_are_judged_among_their_kind_and_two_of_a_ratio_apart(tmp_path: Path) -> None:
    own = ("q2c@0.25+fp16", "snapkv@0.25+fp16", "snapkv@0.25(question=true)+fp16", "h2o@0.25+fp16")
    rise = dict.fromkeys((*PUBLISHED.values(), *own), 0.0) | {PUBLISHED["q2c"]: 0.9, own[0]: 0.1}
    compared = {name: [v.what for v in vs] for name, vs in judged(losing(tmp_path / "run", rise)).items()}
    assert {name: what for name, what in compared.items() if name.startswith("q2c-over")} == {
        "q2c-over-snapkv-published": [f"{PUBLISHED['q2c']} against {PUBLISHED['snapkv']}"],
        "q2c-over-snapkv": [f"{own[0]} against {own[1]}"],
        "q2c-over-snapkv-aware": [f"{own[0]} against {own[2]}"],
        "q2c-over-h2o-published": [f"{PUBLISHED['q2c']} against {PUBLISHED['h2o']}"],
        "q2c-over-h2o": [f"{own[0]} against {own[3]}"],
    }
    rise = {"q2c@0.25+fp16": 0.2, "q2c@0.25(scope=global, pool=1)+fp16": 1.0, "h2o@0.25+fp16": 0.5}
    assert {v.what: v.verdict for v in judged(losing(tmp_path / "two", rise))["q2c-over-h2o"]} == {
        "q2c@0.25+fp16 against h2o@0.25+fp16": "holds",
        "q2c@0.25(scope=global, pool=1)+fp16 against h2o@0.25+fp16": "fails",
    }


def diagnose(run: Path, damage: str, model: str = "smollm2-135m") -> Path:
    (run / "diagnosis.json").write_text(json.dumps({"model": model, "published": {"damage": damage}}))
    return run


@pytest.mark.parametrize(("protected", "verdict"), [(0.101, "holds"), (0.05, "fails"), (0.001, "fails")])
def test_where_the_damage_is_spread_a_protected_layer_has_to_do_nothing(
    tmp_path: Path, protected: float, verdict: str
) -> None:
    rise = {"int4": 0.1, "mixed(protect=3)": protected, "mixed(protect=7)": 0.1}
    path = losing(tmp_path / "run", rise, n=200)
    halves = ("protected-layer-distributed", "protected-layer")
    assert [verdicts(half, diagnose(path, "distributed")) for half in halves] == [[verdict], []]
    other = "holds" if protected == 0.001 else "fails"
    assert [verdicts(half, diagnose(path, "concentrated")) for half in halves] == [[], [other]]


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
    (found,) = judged(losing(tmp_path / "run", rise))["protected-layer"]
    assert found.verdict == verdict
    assert ("nothing to restore" in found.figures) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("damage", "named"),
    [("robust", "int4"), ("concentrated", "mixed(protect=3)"), ("distributed", "int8"), ("", None)],
)
def test_the_guide_is_judged_by_what_it_names_for_the_diagnosis(
    tmp_path: Path, damage: str, named: str | None
) -> None:
    others = dict.fromkeys(("int4", "mixed(protect=3)", "mixed(protect=7)", "int8"), 0.3)
    for rise, verdict in ((0.005, "holds"), (0.3, "fails")):
        run = losing(tmp_path / verdict, others | ({named: rise} if named else {}))
        found = judged(diagnose(run, damage))["guide-loses-nothing"]
        expected = [(f"{named}, for damage that is {damage}", verdict)] if named else []
        assert [(one.what, one.verdict) for one in found] == expected


def test_a_run_of_one_length_has_the_tasks_of_one_of_several(tmp_path: Path) -> None:
    """Of two models one was asked at 256 tokens alone, the other at 256 and at 512."""
    one, several = (
        losing(tmp_path / name, {"int4": rise}, model=name) for name, rise in (("a", 0.0), ("b", 0.5))
    )
    change(several, lambda row: {"task": "needle@256"})
    assert verdicts("int4-fragility", one, several) == []
    write_manifest(one, settings={"context_tokens": [256]})
    assert verdicts("int4-fragility", one, several) == ["holds"]
    write_manifest(one, settings={"context_tokens": 512})
    assert verdicts("int4-fragility", one, several) == []


def test_protections_are_judged_against_int4_with_scales_of_their_kind(tmp_path: Path) -> None:
    plain = ("int4", "int4(group=0, symmetric=true)")
    of_groups = ("mixed(protect=3)", "mixed(protect=7)")
    of_tokens = ("mixed(protect=3, scale=token)", "mixed(protect=7, scale=token)")
    rise = dict(zip([*plain, *of_groups, *of_tokens], (0.001, 0.5, 0.001, 0.001, 0.004, 0.5), strict=True))
    found = judged(losing(tmp_path / "run", rise))["protected-layer"]
    assert [(one.what.split(" against")[0], one.verdict) for one in found] == [
        (of_groups[0], "undecided"),
        (of_tokens[0], "holds"),
    ]


@pytest.mark.parametrize(("per_doubling", "verdict"), [(0.1, "holds"), (-0.1, "fails"), (0.0, "undecided")])
def test_an_advantage_or_a_damage_grows_where_each_examples_slope_is_positive(
    tmp_path: Path, per_doubling: float, verdict: str
) -> None:
    """60 questions at 256, 512 and 1024 tokens; SnapKV loses 0.2 nats at 256, and so much more with each doubling."""
    path = losing(tmp_path / "run", {"q2c@0.25": 0.0, "snapkv@0.25": 0.2}, n=60)
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
    (growth,) = judged(path)["q2c-grows"]
    assert f"grows by {per_doubling:.3f}" in growth.figures.replace("-0.000", "0.000")
    assert (growth.verdict, growth.n) == (verdict, 60)
    rewrite(path, [row | {"codec": "int4"} for row in lines(path) if row["codec"].startswith("snapkv")])
    assert verdicts("int4-grows", path) == [verdict]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(0.01, 0.5, "holds"), (0.3, 0.301, "undecided"), (0.01, 0.012, "fails")],
    # ±0.02 takes more examples than these, at the spread of a loss of 0.3
)
def test_fragility_needs_two_models_that_differ_on_the_tasks_of_both(
    tmp_path: Path, first: float, second: float, verdict: str
) -> None:
    a, b = (
        losing(tmp_path / model, {"int4": rise}, model=model) for model, rise in (("a", first), ("b", second))
    )
    assert verdicts("int4-fragility", a) == []
    assert verdicts("int4-fragility", a, b) == [verdict]
    hard = [row | {"task": "hard", "nll": row["nll"] + 3, "trial": "h" + row["trial"]} for row in lines(a)]
    rewrite(a, lines(a) + hard)
    other = [row | {"task": "hard", "reference_score": 0.0, "trial": "h" + row["trial"]} for row in lines(b)]
    rewrite(b, lines(b) + other)
    assert verdicts("int4-fragility", a, b) == [verdict]


def test_examples_of_different_seeds_are_not_paired(tmp_path: Path) -> None:
    first, second = losing(tmp_path / "a", {"q2c@0.25": 0.1}), losing(tmp_path / "b", {"h2o@0.25": 0.9})
    assert verdicts("q2c-over-h2o", first, second) == ["holds"]
    write_manifest(second, settings={"seed": 1})
    assert [verdict.n for verdict in judged(first, second)["q2c-over-h2o"]] == [0]


@pytest.mark.parametrize(
    ("kept", "what"),
    [
        ({"inputs": {"task file rows.jsonl": "%"}}, "task file rows.jsonl"),
        ({"inputs": {"model tiny": "%"}}, "model tiny"),
        ({"traces": {"walk.csv": {"sha256": "%"}}}, "trace walk.csv"),
    ],
)
def test_runs_that_read_unlike_things_by_one_name_are_not_pooled_and_said_to_be_compared(
    tmp_path: Path, command: Command, kept: dict[str, Any], what: str
) -> None:
    runs = [losing(tmp_path / name / "run", {"int8": 0.01}) for name in "ab"]
    for run, digest in zip(runs, "01", strict=True):
        write_manifest(run, **json.loads(json.dumps(kept).replace("%", digest)))
    with pytest.raises(UsageError, match=f"run: not the same in both: {what}; judge runs"):
        judged(*runs)
    assert f"not the same in both, though named alike: {what}\n" in command("compare", *runs)[1]
    change(runs[1], lambda row: {"task": "other"})  # whose rows are nobody's pairs
    _, (said,) = claims.judge([load(run) for run in runs])
    assert said == f"not the same in all of these runs: {what} (those that differ share no task)"
    change(runs[1], lambda row: {"task": "needle"})
    write_manifest(runs[1], **json.loads(json.dumps(kept).replace("%", "0")))
    assert verdicts("int8-lossless", *runs) == ["holds"]
    assert "named alike" not in command("compare", *runs)[1]


def test_entropy_coding_is_judged_by_its_bytes_whatever_the_answers_are_worth(tmp_path: Path) -> None:
    size = {"int4": 1000, "int4+zstd": 950, "int4+ans": 700}
    path = losing(tmp_path / "run", dict.fromkeys(size, 0.0), reference_score=0.0)
    change(path, lambda row: {"payload_bytes": size[row["codec"]]})
    coded = {v.what: v.verdict for v in judged(path)["entropy-coding-saves"]}
    assert coded == {"int4+zstd against int4": "fails", "int4+ans against int4": "holds"}


@pytest.mark.parametrize("coder", registry.CODERS)
def test_every_coder_of_the_registry_is_told_from_its_quantizer(tmp_path: Path, coder: str) -> None:
    codecs = ("int4", f"int4+{coder}", "delta+int4", f"delta+int4+{coder}")
    found = judged(losing(tmp_path / "run", dict.fromkeys(codecs, 0.0)))
    compared = {claim: {verdict.what for verdict in verdicts} for claim, verdicts in found.items()}
    assert compared["entropy-coding-saves"] == {
        f"int4+{coder} against int4",
        f"delta+int4+{coder} against delta+int4",
    }
    assert compared["delta-spreads"] == {f"bytes of delta+int4+{coder} against int4+{coder}"}


def test_transmission_is_set_against_prefill_and_quantization_link_by_link(tmp_path: Path) -> None:
    links = ("5g-good", "5g-edge")
    path = make_run(tmp_path / "run", links, ("fp16", "int8"), tasks=("needle",), examples=30)
    change(path, lambda row: {"transmit_s": 0.1} if row["profile"] == "5g-good" else {})
    shares = {v.what: v.verdict for v in judged(path)["transmission-dominates"]}
    assert shares == {"fp16 on 5g-good": "fails", "fp16 on 5g-edge": "holds"}
    times = {"transmit_s": 2.676, "prefill_s": 0.06, "select_s": 0.0, "encode_s": 0.002}
    behind = {"decode_s": 0.1, "first_token_s": 0.05, "generate_s": 1.0}
    change(path, lambda row: times | behind)
    verdict, _ = judged(path)["transmission-dominates"]
    assert "takes 43 times prefill and quantization" in verdict.figures
    assert "2.2 times all compute" in verdict.figures


def test_q2c_is_free_where_the_question_belongs_to_the_prefill(tmp_path: Path) -> None:
    """Of a selection of 0.33 s, 0.3 s are the question's pass: 0.03 of 1.3 s are left."""
    path = losing(tmp_path / "run", {"q2c@0.25": 0.0})
    change(path, lambda row: {"prefill_s": 1.0, "select_s": 0.33, "question_s": 0.3})
    (verdict,) = judged(path)["q2c-free"]
    assert verdict.verdict == "holds"
    assert "takes 0.023 of the prefill of context and question" in verdict.figures
    assert "with the question's pass 0.33 of the context's" in verdict.figures
    change(path, lambda row: {"question_s": None})
    assert verdicts("q2c-free", path) == ["undecided"]  # rows of before do not tell


def test_text_is_compared_with_the_fastest_codec_that_loses_little(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", ("5g-mid",), ("int8", "q2c@0.25+int4"), tasks=("needle",), examples=30)
    change(path, lambda row: {"reference_score": 1.0})  # q2c@0.25+int4 is the faster, but loses 0.35
    (verdict,) = judged(path)["kv-worth-sending"]
    assert verdict.what == "int8 against sending the text, on 5g-mid"


@pytest.mark.parametrize(
    ("shared", "n", "verdict"),
    [(0.9, 50, "holds"), (0.9, 49, "undecided"), (0.75, 50, "fails"), (0.84, 50, "undecided")],
)
def test_a_scout_has_to_choose_what_the_answering_model_would(
    tmp_path: Path, shared: float, n: int, verdict: str
) -> None:
    """Judged are Q2C's choices of three quarters by another model alone, each form apart."""
    path = make_run(tmp_path / "run", ("5g-edge",), ("fp16",), ("split",), ("needle",), examples=n)
    rng, rows = np.random.default_rng(2), []
    of_two = {"placement": "scout", "model": "large"}
    for codec, scout in (
        ("q2c@0.75(scope=global)", "small"),
        ("q2c@0.75(scope=global, layers=last, sinks=0, pool=1)", "small"),
        ("q2c@0.25(scope=global)", "small"),
        ("random@0.75", "small"),
        ("q2c@0.75(scope=global)", ""),
    ):
        for row in lines(path):
            own = {"codec": codec, "edge_model": scout, "choice_overlap": shared + float(rng.normal(0, 0.02))}
            rows.append(row | of_two | own | {"trial": f"{len(rows)}"})
    rewrite(path, rows)
    found = judged(path)["scout-overlap"]
    assert [(v.verdict, v.n) for v in found] == [(verdict, n)] * 2
    assert [v.what for v in found] == [
        "q2c@0.75(scope=global) by small",
        "q2c@0.75(scope=global, layers=last, sinks=0, pool=1) by small",
    ]
    assert found[0].figures.endswith("; by chance 75%")


#: which claims each scenario of scenarios/claims is for
SCENARIOS = {
    "q2c": {claim.name for claim in claims.CLAIMS if claim.number in ("1", "2")},
    "int8": {"int8-lossless"},
    "int4": {"int4-fragility"},
    "protected-layer": {"protected-layer", "protected-layer-distributed", "guide-loses-nothing"},
    "delta": {"delta-hurts", "delta-spreads"},
    "transmission": {"transmission-dominates"},
    "q2c-free": {"q2c-free"},
    "context-length": {"q2c-grows", "int4-grows"},
    "entropy-coding": {"entropy-coding-saves"},
    "scout": {"scout-overlap"},
    "text-and-prefill": {"kv-worth-sending"},
}
LOADED = {"capacity": {"compression-buys-capacity"}, "allocation": {"model-aware-meets-deadlines"}}
ASKED_IN_ONE = ("int8", "int4", "protected-layer", "delta", "entropy-coding")
SCENARIOS["quantization"] = set().union(*(SCENARIOS[name] for name in ASKED_IN_ONE))


def test_every_number_of_the_study_is_judged_or_said_to_be_untestable_and_has_a_scenario() -> None:
    numbers = {claim.number for claim in claims.CLAIMS} | {number for number, *_ in claims.NOT_YET}
    assert numbers == {"-", *map(str, range(1, 17))}
    asked = SCENARIOS | LOADED
    assert set().union(*asked.values()) == {claim.name for claim in claims.CLAIMS}
    assert {p.stem for p in Path("scenarios/claims").glob("*.yaml")} == set(asked)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenarios_rows_are_what_its_claims_ask_for(tmp_path: Path, name: str) -> None:
    plan = load_plan(f"scenarios/claims/{name}.yaml")
    runs = []
    for model, damage in (("smollm2-135m", "distributed"), ("gemma3-270m", "concentrated")):
        path = make_run(tmp_path / model, ("5g-mid",), ("fp16",), ("split",), ("needle",), examples=50)
        (like, *_) = lines(path)
        rows = []
        for task, tokens in plan.batches():
            for cell in plan.cells(task, tokens):
                known = {
                    "model": model,
                    "task": task_label(plan, task, tokens),
                    "codec": cell.codec_text,
                    "placement": cell.placement,
                    "profile": cell.profile.name,
                    "context_tokens": tokens,
                    "reference_score": 1.0,
                    "edge_model": "" if plan.scenario.one_model else plan.scenario.models.edge,
                    "choice_overlap": 0.9 if cell.placement == "scout" else None,
                }
                rows += [like | known | {"example": str(i), "trial": f"{len(rows) + i}"} for i in range(50)]
        rewrite(path, rows)
        runs.append(load(diagnose(path, damage, model)))
    found, left_out = claims.judge(runs)
    assert {claim.name for claim, verdicts in found if verdicts} >= SCENARIOS[name]
    assert left_out == []


def test_capacity_is_compared_by_the_ends_of_intervals_where_arrivals_are_poissons(tmp_path: Path) -> None:
    path = make_load(tmp_path / "run")
    change(path, lambda row: {"ttft_s": row["ttft_s"] / 2})  # within 1 s in place of 2
    (verdict,) = judged(path)["compression-buys-capacity"]
    assert verdict.verdict == "holds" and verdict.what == "int4 against fp16, 5g-mid, fifo"
    assert "requests a second against 0.3" in verdict.figures and "more than 9.81 [4.97" in verdict.figures
    change(path, lambda row: {"codec": {"fp16": "int4", "int4": "fp16"}[row["codec"]]})
    (verdict,) = judged(path)["compression-buys-capacity"]
    assert verdict.verdict == "fails"
    few = [row for row in lines(path) if row["arrived_at"] < 100]
    rewrite(path, few)
    (verdict,) = judged(path)["compression-buys-capacity"]
    assert verdict.verdict == "undecided" and verdict.n < 60


def test_the_scenario_of_capacity_asks_for_what_its_rule_compares() -> None:
    plan = load_plan("scenarios/claims/capacity.yaml")
    assert (
        len(plan.profiles) == 1 and str(plan.scenario.codecs[0]) == "fp16" and len(plan.scenario.codecs) >= 3
    )
    rates = [load.rate for load in plan.scenario.load]  # type: ignore[attr-defined]
    assert rates == sorted(rates) and min(rates) * plan.scenario.duration >= 60


def rounds(path: Path, late: dict[str, float], count: int = 20) -> Path:
    """A run of rounds of a large and a small cache (16 and 4 s over the whole cell): by allocation, when the large one's first
    token came, in seconds; the small one's after 5 s; each one's connection after the round began."""
    make_run(path, ("5g-mid",), ("fp16", "int4"), ("split",), ("needle",), examples=1)
    large, small = lines(path)
    rows: list[dict[str, Any]] = []
    for allocate, seconds in late.items():
        for turn in range(-1, count):
            about = {"load": "rounds(every=40s)", "allocate": allocate, "cell": allocate, "repeat": 0}
            about |= {"arrived_at": 40.0 * (turn + 1), "warmup": turn < 0, "replayed": True, "reused": ""}
            for edge, (like, payload, took) in enumerate(((large, 16e6, seconds), (small, 4e6, 5.0))):
                own = {
                    "client": f"edge{edge + 1}",
                    "trial": f"{allocate}/{turn}/{edge}",
                    "ttft_s": took,
                    "e2e_s": took,
                }
                own |= {"payload_bytes": payload, "rate_up_bps": 8e6, "deadline_s": None, "amortized_s": None}
                rows.append(like | about | own)
    rewrite(path, rows)
    write_manifest(path, settings={"name": "rounds", "warmup": "40s", "duration": f"{40 * count}s"})
    return path


@pytest.mark.parametrize(
    ("reserved", "aware", "count", "verdict"),
    [
        (32.5, 20.5, 20, "holds"),  # by 25 s: 1.25 times the 20 s that both take over the whole cell
        (32.5, 25.1, 20, "fails"),
        (20.0, 20.5, 20, "fails"),  # what equal reservations meet, nothing turns
        (32.5, 20.5, 19, "undecided"),
    ],
)
def test_an_allocation_is_judged_by_rounds_in_which_every_edge_is_in_time(
    tmp_path: Path, reserved: float, aware: float, count: int, verdict: str
) -> None:
    path = rounds(tmp_path / "run", {"reserved": reserved, "model-aware": aware}, count)
    (found,) = judged(path)["model-aware-meets-deadlines"]
    assert (found.verdict, found.n) == (verdict, count)
    assert found.what == "model-aware against reserved, 5g-mid"
    assert "deadline 25 s" in found.figures and "all 2 edges" in found.figures


def test_a_round_in_which_one_was_refused_is_not_in_time(tmp_path: Path) -> None:
    path = rounds(tmp_path / "run", {"reserved": 32.5, "model-aware": 20.5})
    gone = {"ttft_s": None, "e2e_s": None, "refused": True, "error": "no room"}
    change(path, lambda row: gone if row["trial"] == "model-aware/3/1" else {})
    (found,) = judged(path)["model-aware-meets-deadlines"]
    assert found.verdict == "undecided" and "in 95% [75%, 100%] of rounds against 0%" in found.figures


def test_the_scenario_of_allocation_asks_for_what_its_rule_compares() -> None:
    plan = load_plan("scenarios/claims/allocation.yaml")
    assert {"reserved", "model-aware"} <= {str(each) for each in plan.scenario.allocate}
    (load,) = plan.scenario.load
    begun = [a.at for a in load.arrivals(["a"], plan.scenario.warmup + plan.scenario.duration, "")]  # type: ignore[attr-defined]
    assert sum(at >= plan.scenario.warmup for at in begun) >= 20
    assert len({str(edge.codec) for edge in plan.edges}) == 3 and len(plan.edges) == 4


def test_a_task_that_the_full_cache_cannot_do_is_left_out_and_named(tmp_path: Path) -> None:
    path = losing(tmp_path / "run", {"int8": 0.0}, reference_score=0.05)
    found, (left_out,) = claims.judge([load(path)])
    assert not any(verdicts for _, verdicts in found)
    assert "needle is left out: the full cache scores 0.05" in left_out


def test_holms_correction_spans_a_claims_models_and_tasks() -> None:
    family = [Verdict("m", str(i), "x", "holds", "", 80, p) for i, p in enumerate((0.01, 0.04, 0.03))]
    assert [verdict.verdict for verdict in corrected(family)] == ["holds", "undecided", "undecided"]


def test_holms_correction_counts_what_stays_undecided_too(tmp_path: Path) -> None:
    codecs = ("int4", "delta+int4", "delta(loop=open)+int4")
    path = losing(tmp_path / "run", dict.fromkeys(codecs, 0.0))
    rng = np.random.default_rng(2)
    noise = {codec: iter(rng.normal(0.26 * (codec == "delta+int4"), 1.0, 80)) for codec in codecs}
    change(path, lambda row: {"nll": row["nll"] + next(noise[row["codec"]])})
    found = judged(path)["delta-hurts"]
    assert len(found) == 2
    assert all(np.isfinite(verdict.p) for verdict in found)


def test_claims_are_printed_and_given_as_json(tmp_path: Path, command: Command) -> None:
    path = losing(tmp_path / "run", {"int8": 0.01})
    status, out, _ = command("claims", path, "--json")
    assert status == 0
    assert {c["claim"] for c in json.loads(out)["claims"]} == {c.name for c in claims.CLAIMS}
    assert "holds      smollm2-135m · int8 against full cache: ΔNLL +0.0" in command("claims", path)[1]
    row = command("claims", path, "--markdown")[1].splitlines()[2]
    start = "| `int8-lossless` | smollm2-135m | int8 against full cache | holds | 80 | ΔNLL +0.0"
    assert row.startswith(start)
