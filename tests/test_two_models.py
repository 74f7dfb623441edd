"""A model of its own for each side: how it is written, what it changes, and what needs one model on both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import SpecError, UsageError
from testbed.experiment import inputs
from testbed.experiment.estimate import Estimator
from testbed.experiment.plan import make_plan, override
from testbed.experiment.results import RunDirectory
from testbed.experiment.runner import Runner, begin, resume
from testbed.experiment.scenario import Plan
from testbed.experiment.session import in_one_process
from testbed.experiment.sides import Models
from testbed.guide.guide import unlinked

BASE: dict[str, Any] = {"name": "t", "profiles": ["5g-mid"], "tasks": ["needle"]}
TWO = {"edge": "smollm2-135m", "cloud": "gemma3-270m"}
CHOOSES = "q2c@0.25(scope=global)"


def plan(**changes: Any) -> Plan:
    return make_plan({**BASE, **changes}, "t.yaml")


def identities(made: Plan) -> list[str]:
    return [cell.identity(made) for cell in made.cells(0, 256)]


def test_two_models_are_written_by_side_and_stay_so() -> None:
    made = plan(model=TWO, placements=["cloud", "scout", "edge"], codecs=CHOOSES)
    assert made.scenario.models == Models(**TWO) and not made.scenario.one_model
    written = made.scenario.model_dump(mode="json")
    assert written["model"] == TWO
    again = make_plan(written, "manifest.json")
    assert again.scenario == made.scenario and identities(again) == identities(made)
    settings: dict[str, Any] = {}
    override(settings, ["model={edge: smollm2-135m, cloud: gemma3-270m}"])
    assert settings["model"] == TWO


def test_one_model_is_written_as_it_was_and_its_cells_are_what_they_were() -> None:
    one, both = plan(model="smollm2-135m"), plan(model={"edge": "smollm2-135m", "cloud": "smollm2-135m"})
    assert both.scenario == one.scenario and one.scenario.one_model
    assert one.scenario.model_dump(mode="json")["model"] == "smollm2-135m"
    # As the version before two models had it.
    assert identities(one) == identities(both) == ["2853c9a4383b"]
    assert identities(plan(model=TWO, placements="cloud")) != identities(plan(placements="cloud"))


@pytest.mark.parametrize(
    "model", [7, "", {"edge": "a"}, {"edge": "a", "cloud": 3}, ["a", "b"], {"cloud": "a"}]
)
def test_a_model_that_is_none_is_told_how_one_is_written(model: object) -> None:
    with pytest.raises(SpecError, match=r"t.yaml: model: .*\{edge: MODEL, cloud: MODEL\}"):
        plan(model=model)


@pytest.mark.parametrize("placement", ["split", "store"])
def test_a_cache_of_two_models_is_refused(placement: str) -> None:
    with pytest.raises(SpecError, match=rf"placements: '{placement}' needs one model on both sides"):
        plan(model=TWO, placements=["cloud", placement])


def test_a_scout_takes_selectors_alone_that_choose_one_list() -> None:
    for codec in ("fp16", "q2c@0.25", f"{CHOOSES}+int8", f"{CHOOSES}+zstd", "pyramid@0.5(scope=global)"):
        with pytest.raises(SpecError, match=r"codecs: .*is for no placement here: placement 'scout' takes"):
            plan(placements=["cloud", "scout"], codecs=[CHOOSES, codec])
    with pytest.raises(SpecError, match=r"takes a selector alone .*, and there is none"):
        plan(placements=["split", "scout"], codecs=["int8"])
    made = plan(placements=["split", "scout"], codecs=["int8", CHOOSES, "random@0.5"])
    cells = [(cell.placement, cell.codec_text) for cell in made.cells(0, 256)]
    assert cells == [
        ("split", "int8"),
        ("split", f"{CHOOSES}+fp16"),
        ("split", "random@0.5+fp16"),
        ("scout", CHOOSES),
        ("scout", "random@0.5"),
    ]
    assert all(made.replays(cell) for cell in made.cells(0, 256) if cell.placement == "scout")
    sent = {cell.placement: Estimator(made).payload_bytes(cell) for cell in made.cells(0, 256)}
    assert 0 < sent["scout"] < 4 * 256


def test_a_scout_is_refused_where_a_part_may_be_lost_or_a_model_is_waited_for() -> None:
    with pytest.raises(SpecError, match="may lose parts, and placement 'scout' needs text and choice both"):
        plan(placements="scout", codecs=CHOOSES, transport="datagram", profiles=["rate=5mbit,delay=5ms"])
    devices = dict.fromkeys(("edge", "cloud"), "device:two-cores-smollm2-135m")
    with pytest.raises(SpecError, match="is not waited for in placement 'scout' while model smollm2-135m"):
        plan(placements="scout", codecs=CHOOSES, compute=devices)


def test_both_models_are_looked_for_beside_the_scenario_and_are_inputs_of_the_run(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    paths = {"edge": str(tiny_model("llama small")), "cloud": str(tmp_path / "own")}
    shutil.copytree(tiny_model("llama"), paths["cloud"])
    made = plan(model=paths, placements="scout", codecs=CHOOSES)
    run = begin(made, tmp_path / "run")
    kept = run.manifest()["inputs"]
    assert set(kept) == {f"model {path}" for path in paths.values()}
    resume(run.path, None, False)  # type: ignore[arg-type]
    (Path(paths["cloud"]) / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="own: has changed since this run began"):
        inputs.check_unchanged(kept, made)


def ran(model: object, out: Path, **changes: Any) -> RunDirectory:
    about = {"context_tokens": 200, "examples": 2, "threads": 1, "max_new_tokens": 6}
    made = unlinked({**BASE, "model": model, **about, **changes}, "t.yaml")
    directory = begin(made, out)
    Runner(made, directory, lambda *_: None, opening=in_one_process).execute()
    return directory


def test_a_run_of_two_models_compares_all_with_the_clouds_own_answer(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    small, large = str(tiny_model("llama small")), str(tiny_model("llama"))
    two = ran(
        {"edge": small, "cloud": large}, tmp_path / "two",
        placements=["cloud", "scout", "edge"], codecs=[CHOOSES, "random@0.5"],
    )  # fmt: skip
    alone = {
        model: {row["example"]: row for row in ran(model, tmp_path / name, placements="edge").rows()}
        for name, model in (("small", small), ("large", large))
    }
    rows = list(two.rows())
    assert [row["error"] for row in rows] == [""] * 2 * 4
    for row in rows:
        example = row["example"]
        full = alone[large][example]
        assert (row["model"], row["edge_model"]) == (large, small)
        assert row["reference_answer"] == full["reference_answer"]
        assert row["reference_nll"] == pytest.approx(full["reference_nll"], abs=1e-5)
        assert (row["kv_bytes"], row["context_tokens"]) == (full["kv_bytes"], full["context_tokens"])
        if row["placement"] == "edge":
            assert row["answer"] == alone[small][example]["answer"] and row["kl"] is None
            assert row["nll"] == pytest.approx(alone[small][example]["nll"], abs=1e-5)
        elif row["placement"] == "cloud":
            assert row["answer"] == full["answer"] and row["kl"] == pytest.approx(0, abs=1e-5)
        else:
            assert 0 <= row["choice_overlap"] <= 1 and row["kl"] > 0
            assert row["payload_bytes"] < 2 * row["context_tokens"] + 100 and row["bits_per_element"] == 0
            assert row["tokens_kept"] == round(
                row["context_tokens"] * (0.5 if "random" in row["codec"] else 0.25)
            )
            assert row["busy_prefill_s"] > 0 and row["busy_prefill_s"] >= row["prefill_s"]
        assert (row["choice_overlap"] is None) == (row["placement"] != "scout")
    assert {row["edge_model"] for row in alone[large].values()} == {""}


def test_models_of_two_tokenizers_are_refused_by_name(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    models = {"edge": str(tiny_model("llama")), "cloud": str(tiny_model("gemma2"))}
    with pytest.raises(UsageError, match=r"llama \(edge\) and .*gemma2 \(cloud\) have different tokenizers"):
        ran(models, tmp_path / "run", placements="cloud")
