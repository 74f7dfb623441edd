"""Finding the layers that cannot stand few bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from testbed.cli import cli
from testbed.codecs.quantize.protection import Place
from testbed.codecs.spec import parse
from testbed.diagnosis.choose import Loss, holds, smallest_set, surely_lost, verdict

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


def diagnose(model: Path, out: Path, *more: str) -> dict[str, Any]:
    arguments = [
        "diagnose",
        str(model),
        "--examples",
        "2",
        "--context-tokens",
        "150",
        "--bits",
        "2",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(cli, [*arguments, "--json", "--threads", "1", *more], catch_exceptions=False)
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
    assert {path.name for path in tmp_path.iterdir()} == {
        "found.json",
        "found-layer_sensitivity.png",
        "found-layer_sensitivity.pdf",
    }


def test_a_wrong_request_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    program = "import sys; from testbed.cli import main; main(sys.argv[1:])"
    for arguments, says in (
        (["no-such-model"], "unknown model 'no-such-model'"),
        (["smollm2-135m", "--bits", "4", "--high", "4"], "--high 4 must be more than --bits 4"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, "diagnose", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
