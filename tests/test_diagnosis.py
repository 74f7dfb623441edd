"""Finding the layers that cannot stand few bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from testbed.cli import cli
from testbed.codecs.diagnosed import Place
from testbed.codecs.entropy import tables as known_tables
from testbed.codecs.spec import parse
from testbed.diagnosis import published, run, tables
from testbed.diagnosis.choose import Loss, Outcome, best_form, holds, smallest_set, surely_lost, verdict
from testbed.diagnosis.variants import Outcomes
from tests.command import command

PLACES: list[Place] = [(kind, layer) for layer in range(10) for kind in ("keys", "values")]


def losing(fragile: set[Place]) -> Callable[[frozenset[Place]], Loss]:
    """Every fragile place that is not protected costs a tenth of a nat on each of five examples."""

    def loss(protected: frozenset[Place]) -> Loss:
        lost = 0.1 * len(fragile - protected)
        return Loss((lost,) * 5, (lost,) * 5)

    return loss


def within(loss: Loss) -> bool:
    return holds(loss, "nll", 0.05)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 11, 20])
def test_the_smallest_set_is_what_is_fragile_and_no_more(count: int) -> None:
    fragile = set(PLACES[:count])
    assert smallest_set(PLACES, losing(fragile), within) == (fragile, True)


def test_places_that_were_ranked_too_high_are_dropped_again() -> None:
    fragile = {PLACES[1], PLACES[4]}
    assert smallest_set(PLACES, losing(fragile), within) == (fragile, True)


def test_a_loss_that_no_set_avoids_is_said_so() -> None:
    found, held = smallest_set(PLACES, lambda protected: Loss((1.0,) * 5, (0.0,) * 5), within)
    assert (found, held) == (frozenset(PLACES), False)
    assert "no set holds" in verdict(found, held, 20, 4, 8, "0-9")
    assert surely_lost(Loss((1.0,) * 5, (0.0,) * 5), "nll", 0.05)


def test_examples_that_are_too_few_to_tell_are_said_to_be() -> None:
    scattered = Loss((0.4, -0.3, 0.4, -0.3), (0.0,) * 4)
    assert not holds(scattered, "nll", 0.05) and not surely_lost(scattered, "nll", 0.05)
    assert verdict(frozenset(PLACES), False, 20, 4, 8, "0-9", surely=False).startswith("undecided: ")


def test_an_uncertain_loss_does_not_hold() -> None:
    """The mean is within epsilon, the far end of its interval is not."""
    assert holds(Loss((0.0, 0.0, 0.0, 0.0), (0.0,) * 4), "nll", 0.05)
    assert not holds(Loss((0.2, -0.2, 0.2, -0.2), (0.0,) * 4), "nll", 0.05)
    assert holds(Loss((0.2, -0.2, 0.2, -0.2), (0.0,) * 4), "score", 0.05)


@pytest.mark.parametrize(
    "protected, says",
    [
        ([], "no bottleneck: int4 everywhere"),
        (PLACES[:1], "bottleneck: "),
        (PLACES[:12], "no bottleneck: the loss is spread"),
    ],
)
def test_the_verdict_calls_few_places_a_bottleneck_and_many_none(protected: list[Place], says: str) -> None:
    assert verdict(frozenset(protected), True, 20, 4, 8, "K0").startswith(says)


def outcomes(*scores: float, kl: float = 0.1) -> list[Outcome]:
    return [Outcome(kl, 1.0, score) for score in scores]


FULL = outcomes(1.0, 0.5, 0.5, 0.0)  # 2.0 points together


@pytest.mark.parametrize(
    "whole, layers, damage, found",
    [
        ((1.0, 0.5, 0.4, 0.0), [(1.0, 0.5, 0.5, 0.0), (1.0, 0.4, 0.5, 0.0)], "robust", []),  # 5 % together
        ((0.5, 0.5, 0.5, 0.0), [(1.0, 0.5, 0.5, 0.0), (0.93, 0.5, 0.5, 0.0)], "concentrated", [1]),
        (
            (0.5, 0.5, 0.5, 0.0),
            [(1.0, 0.5, 0.45, 0.0), (0.95, 0.5, 0.5, 0.0)],
            "distributed",
            [],
        ),  # 2.5 % each
        ((0.5, 0.5, 0.5, 0.0), [(1.0, 0.4, 0.5, 0.0), (0.9, 0.5, 0.5, 0.0)], "concentrated", [0, 1]),
    ],
)
def test_the_published_rule_asks_for_five_percent_together_and_three_alone(
    whole: tuple[float, ...], layers: list[tuple[float, ...]], damage: str, found: list[int]
) -> None:
    said = published.judge(FULL, outcomes(*whole), [outcomes(*scores) for scores in layers])
    assert (said["damage"], said["layers"]) == (damage, found)
    assert published.protected(said) == (".".join(map(str, found)).replace("0.1", "0-1") or "none")


def test_the_published_ratio_counts_no_scales() -> None:
    """(27 layers × 4 bits + 1 × 16) / 28 / 16 = 27.7 %; a scale of 16 bits for 128 elements makes that 28.4 %."""
    said = {"layers": [0], "each": [{}] * 28}
    found = published.sizes(said, 4, 4 + 16 / 128)
    assert found["without_scales"] == pytest.approx(0.277, abs=0.0005)
    assert found["with_scales"] == pytest.approx(0.284, abs=0.0005)


def test_a_layer_that_costs_as_much_and_changes_more_is_the_worst() -> None:
    alone = [outcomes(1.0, 0.5, 0.5, 0.0, kl=kl) for kl in (0.1, 0.3, 0.2)]
    assert published.judge(FULL, FULL, alone)["worst"] == 1


def diagnose(model: Path, out: Path, *more: str) -> dict[str, Any]:
    settings = {"examples": "2", "context-tokens": "150", "bits": "2", "threads": "1", "out": str(out)}
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(
        cli, ["diagnose", str(model), *options, "--json", *more], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_a_tiny_model_is_diagnosed_into_a_file_that_mixed_reads(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    found = diagnose(tiny_model("gemma3"), out)
    assert [(place["layer"], place["kind"]) for place in found["places"]] == [
        (layer, kind) for layer in range(3) for kind in ("keys", "values")
    ]
    whole = found["all_quantized"]["kl"]["mean"]
    assert whole > 0
    assert all(0 <= place["damage"]["kl"]["mean"] < 5 for place in found["places"])
    assert found["sets"][0]["protect"] == "none"
    codec = parse(f"mixed(low=2, protect={out})").bound(found["model"])
    assert str(codec) == str(parse(f"mixed(low=2, protect={found['protect']})"))
    forms = {form["codec"]: form for form in found["forms"]}
    assert list(forms) == ["int2(symmetric=true)", "int2(group=0, symmetric=true)", "int2"]
    # Judged at their true bytes; 16 elements a head: a group is no longer than a token's own.
    assert [form["bits_per_element"] for form in forms.values()] == [3.0, 3.0, 4.0]
    losses = [form["nll"]["mean"] for form in forms.values()]
    assert losses[0] == losses[1] != losses[2]
    assert (
        found["all_quantized"]["nll"]["mean"] != 0
    )  # of the examples that rank; forms: of those that choose, too
    assert {path.name for path in tmp_path.iterdir()} == {
        "found.json",
        "found-layer_sensitivity.png",
        "found-layer_sensitivity.pdf",
    }


@pytest.mark.slow
def test_the_published_rule_quantizes_each_layer_alone_with_a_scale_a_token_and_protects_at_16_bits(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    found = diagnose(tiny_model("llama"), out, "--rule", "published")
    assert (found["scale"], found["high"]) == ("token", 16)
    assert [one["layer"] for one in found["published"]["each"]] == [0, 1, 2]
    assert all(one["kl"] > 0 for one in found["published"]["each"])
    assert found["published"]["damage"] in ("robust", "concentrated", "distributed")
    assert str(parse(f"mixed(low=2, high=16, protect={out}, scale=token)").bound(found["model"]))


def test_the_smallest_form_that_holds_is_the_one_to_take() -> None:
    def form(codec: str, bits: float, mean: float, holds: bool) -> dict[str, Any]:
        return {"codec": codec, "bits_per_element": bits, "nll": {"mean": mean}, "holds": holds}

    forms = [form("a", 4.25, 0.5, False), form("b", 4.5, 0.01, True), form("c", 5.0, 0.0, True)]
    assert best_form(forms) == "the smallest form that holds: b (4.50 bits an element)"
    assert best_form(forms[:1]) == "no form holds by itself; the smallest loss has a"


def test_a_diagnosis_foretells_its_time_before_it_begins_and_after_each_example() -> None:
    said: list[str] = []

    probe = SimpleNamespace(outcome=lambda widths: None, full=None)
    learns = Outcomes(dict.fromkeys(range(5), lambda variants: None))  # type: ignore[arg-type, return-value]
    times = iter([0.0, 4.0, 9.0, 30.0, 50.0, 90.0])  # 4 s to prefill, and 5 s an outcome
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("testbed.diagnosis.run.time", SimpleNamespace(monotonic=lambda: next(times)))
        request = SimpleNamespace(examples=3)
        work = SimpleNamespace(
            request=request, examples=[None] * 3, variants_of=lambda example: probe, say=said.append
        )
        run._rank(work, [learns], ", then more")
    assert said == [
        "example 1 of 3 prefilled; about 87 s at least to rank, then more",
        "example 1 of 3 ranked, 30 s; about 60 s more to rank, then more",
        "example 2 of 3 ranked, 50 s; about 25 s more to rank, then more",
        "example 3 of 3 ranked, 90 s",
    ]


def test_tables_are_counted_in_the_prompt_of_the_run(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another prefix every key turns: tables of one prompt are not those of another."""
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    names = {}
    for prompt in ("auto", "plain:2", "plain:0"):
        out = tmp_path / f"{prompt}.tables"
        asked = [str(tiny_model("llama")), "int4", "--examples", "1", "--context-tokens", "100"]
        assert tables.main([*asked, "--prompt", prompt, "--out", str(out)]) == 0
        _, made = known_tables.KEPT.load(out)
        names[prompt] = [part.data for part in made.parts]
        assert f"in prompt {'plain:2' if prompt == 'auto' else prompt}" in made.of
    assert names["auto"] == names["plain:2"] != names["plain:0"]
    assert tables.main([*asked, "--prompt", "letter"]) == 2


def test_a_wrong_request_is_refused_before_a_model_is_loaded() -> None:
    for arguments, says in (
        (["no-such-model"], "unknown model 'no-such-model'"),
        (["smollm2-135m", "--bits", "4", "--high", "4"], "--high 4 must be more than --bits 4"),
    ):
        done = command("diagnose", *arguments)
        assert done.status == 2
        assert says in done.errors
        assert done.errors.count("\n") == 1
