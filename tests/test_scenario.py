"""Scenario files: what is written is what is run, and a mistake is named with its place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.analysis.describe import conditions
from testbed.codecs.entropy import tables
from testbed.codecs.steps import Part
from testbed.errors import SpecError, UsageError
from testbed.experiment.estimate import Estimator
from testbed.experiment.plan import load_plan, make_plan, moved
from testbed.experiment.results import FORMAT, RunDirectory
from testbed.experiment.scenario import Plan
from testbed.experiment.trial import Reference, Trial, new_row
from testbed.tasks.task import Example

BASE = {"name": "t", "profiles": ["5g-mid"], "tasks": ["needle"], "codecs": ["fp16", "int8"], "examples": 3}


def plan(**changes: object):  # type: ignore[no-untyped-def]
    return make_plan({**BASE, **changes}, "t.yaml")


def codecs_of(made: Plan) -> list[str]:
    return [str(codec) for codec in made.scenario.codecs]


def test_a_trace_is_read_before_anything_is_built_and_its_beginning_is_part_of_the_cell(tmp_path):
    (tmp_path / "link.csv").write_text("time_s,rate_mbps\n0,8\n1,x\n")
    settings = {"name": "t", "tasks": ["needle"], "profiles": [f"trace:{tmp_path}/link.csv"]}
    with pytest.raises(SpecError, match=r"here: profiles\[0\]: trace .*line 3: rate_mbps: 'x'"):
        make_plan(settings, "here")
    (tmp_path / "link.csv").write_text("time_s,rate_mbps\n0,8\n1,16\n")
    trial, run = (make_plan({**settings, "at": at}, "here") for at in ("trial", "run"))
    assert trial.cells(0, 256)[0].identity(trial) != run.cells(0, 256)[0].identity(run)


def diagnosed(cache: Path, protect: str) -> None:
    path = cache / "diagnoses" / "smollm2-135m-int4.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"format": "testbed-diagnosis-1", "model": "smollm2-135m", "protect": protect}
    path.write_text(json.dumps(told))


def test_what_a_diagnosis_says_is_part_of_the_cell_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    found = []
    for protect in ("K3", "K5"):
        diagnosed(tmp_path, protect)
        found.append(plan(codecs=["mixed"]))
    first, second = found
    assert [codecs_of(p) for p in found] == [["mixed(protect=K3)"], ["mixed(protect=K5)"]]
    cells = [p.cells(0, 256)[0].identity(p) for p in found]
    assert cells[0] != cells[1]
    kept = first.scenario.model_dump(mode="json")  # what the manifest has, and --resume reads
    again = make_plan(kept, "manifest.json")
    assert again.cells(0, 256)[0].identity(again) == cells[0]
    assert first.asked == {"mixed(protect=K3)": "mixed"}
    assert moved(second.asked, "smollm2-135m") == []
    assert moved(first.asked, "smollm2-135m") == [
        "codec mixed was mixed(protect=K3) when this run began, and goes on so; it is mixed(protect=K5) by now"
    ]
    (tmp_path / "diagnoses" / "smollm2-135m-int4.json").unlink()
    (gone,) = moved(first.asked, "smollm2-135m")
    assert "it cannot be looked up by now" in gone and "has no diagnosis yet" in gone
    assert moved(None, "smollm2-135m") == []


def test_what_tables_a_file_holds_is_part_of_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    file, found = tmp_path / "mine.tables", []
    part = Part(0, "keys", 1, 4, 2, "float16")
    for occurred in (1, 2):
        made = tables.count("a test", [(2, part, np.full((2, 4), occurred) * [1, 2, 3, 4])] * occurred)
        _, kept = tables.KEPT.save(made)
        file.write_bytes(kept.read_bytes())
        found.append(codecs_of(plan(codecs=[f"int2+ans(table={file})"]))[0])
        assert found[-1] == f"int2+ans(table={tables.KEPT.load(file)[0]})"
    assert found[0] != found[1]


def test_a_codec_and_what_refers_to_it_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    diagnosed(tmp_path, "K3")
    with pytest.raises(SpecError, match=r"codecs: 'mixed\(protect=K3\)' is listed twice"):
        plan(codecs=["mixed", "mixed(protect=K3)"])
    with pytest.raises(SpecError, match=r"codecs: 'mixed' is listed twice \(it is 'mixed\(protect=K3\)'\)"):
        plan(codecs=["mixed(protect=K3)", "mixed"])


def test_shipped_scenarios_are_valid_and_keep_their_promises() -> None:
    default = load_plan("5g")
    assert len(default.profiles) >= 4
    assert set(default.scenario.placements) == {"store", "cloud", "edge"}
    assert {kind.name for kind in default.scenario.delivery} == {"whole", "adaptive"}
    examples = {task.name: default.scenario.examples_of(i) for i, task in enumerate(default.tasks)}
    assert examples["passages"] >= 20 and examples["needle"] >= 10
    quick = load_plan("quick")
    assert (len(quick.profiles), len(quick.scenario.codecs), quick.scenario.examples) == (2, 2, 3)
    adaptive = load_plan("5g-adaptive").scenario
    assert {kind.policy.name for kind in adaptive.delivery} >= {
        "oracle",
        "mpc",
        "ewma",
        "throughput",
        "fixed",
    }  # type: ignore[attr-defined]


CLAIMS = sorted((Path(__file__).parents[1] / "scenarios" / "claims").glob("*.yaml"))


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_a_claims_scenario_is_valid_and_fixes_its_rule_in_advance(path: Path) -> None:
    made = load_plan(str(path))
    assert made.scenario.name == f"claim-{path.stem}"
    rule = path.read_text().partition("name:")[0]
    assert all(word in rule for word in ("Rule, fixed in advance", "undecided", "95 %", "n >= "))


def test_a_sweep_has_every_combination_once() -> None:
    made = plan(
        profiles=["5g-mid", "lte"], placements=["split", "cloud", "edge"], context_tokens=[64, 128], repeats=2
    )
    cells = [cell for batch in made.batches() for cell in made.cells(*batch)]
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 + 2 + 2)
    assert made.trials == len(cells) * 3 * 2
    assert len({cell.identity(made) for cell in cells}) == len(cells)


def test_a_cell_keeps_its_identity_when_other_parts_of_the_sweep_change() -> None:
    few, many = plan(), plan(profiles=["lte", "5g-mid"], codecs=["int4", "int8", "fp16"], examples=50)
    found = {cell.identity(many) for cell in many.cells(0, 256)}
    assert {cell.identity(few) for cell in few.cells(0, 256)} < found


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ([{}, {"seed": 1}, {"model": "gemma3-270m"}], [0, 1, 2]),
        (
            [{}, {"prompt": "plain:2"}, {"prompt": "plain:0"}, {"prompt": "chat"}],
            [0, 0, 2, 3],
        ),  # auto is plain:2
        ([{}, *({"compute": each} for each in ({"edge": 1}, {"edge": 4}, {"cloud": 4}))], [0, 0, 2, 3]),
        (
            [
                {"compute": {"edge": each}}
                for each in (4, {"prefill": 4, "decode": 4}, {"prefill": 4}, {"prefill": 4, "decode": False})
            ],
            [0, 0, 2, 3],
        ),
    ],
)
def test_what_changes_an_answer_or_a_time_is_part_of_a_cells_identity_and_what_is_the_same_is_none(
    changes: list[dict[str, object]], alike: list[int]
) -> None:
    made = [plan(**each) for each in changes]
    identities = [each.cells(0, 256)[0].identity(each) for each in made]
    assert [identities.index(identity) for identity in identities] == alike
    assert str(plan(prompt="chat").prompt) == "chat:0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "shout"}, r"t.yaml: prompt: .*write auto, plain or chat"),
        ({"compute": {"edge": 0.5}}, r"t.yaml: compute.edge: '0.5' is no factor of 1 to 1000"),
        (
            {"compute": {"edge": {"decod": 2}}},
            r"t.yaml: compute.edge: unknown key 'decod'; did you mean 'decode'",
        ),
        (
            {"compute": {"edge": {"decode": False}}, "placements": ["split", "edge"]},
            r"t.yaml: placements: compute.edge has `decode: no`, .* in placement 'edge'; leave that placement out",
        ),
        (
            {"compute": {"cloud": {"decode": False}}},
            r"compute.cloud has `decode: no`, .* in placement 'split'",
        ),
        ({"compute": {"edge": float("inf")}}, r"t.yaml: compute.edge"),
        ({"profils": ["lte"]}, r"t.yaml: unknown key 'profils'; did you mean 'profiles'"),
        ({"profiles": ["rate=5mb"]}, r"t.yaml: profiles\[0\]: .*'mb'"),
        ({"profiles": ["6g"]}, r"t.yaml: profiles\[0\]: .*6g"),
        ({"codecs": ["fp16", "q2x@0.25"]}, r"t.yaml: codecs\[1\]: .*q2x"),
        ({"codecs": ["int8", "int8"]}, r"codecs: 'int8' is listed twice"),
        ({"profiles": ["lte", "lte"]}, r"listed twice"),
        ({"tasks": ["needle", {"task": "needle"}]}, r"tasks: .*'needle'.* is listed twice"),
        ({"placements": ["split", "cloud", "split"]}, r"placements: 'split' is listed twice"),
        ({"context_tokens": [256, 256]}, r"context_tokens: '256' is listed twice"),
        ({"placements": ["moon"]}, r"t.yaml: placements\[0\]"),
        ({"emulator": "ns3"}, r"t.yaml: emulator: unknown emulator 'ns3'; use one of auto, netem, userspace"),
        ({"tasks": ["noodle"]}, r"t.yaml: tasks\[0\]: .*noodle"),
        ({"tasks": [{"task": "needle", "sharpness": 3}]}, r"t.yaml: tasks\[0\]: .*sharpness"),
        ({"tasks": [{"needle": 1}]}, r"t.yaml: tasks\[0\]: write a task's name"),
        ({"examples": 0}, r"t.yaml: examples"),
        ({"examples": "many"}, r"t.yaml: examples.*many"),
        ({"timeout": "5 parsec"}, r"t.yaml: timeout: .*parsec"),
        ({"timeout": 20}, r"t.yaml: timeout: time 20 has no unit"),
        (
            {"profiles": [{"rate": "10mbit", "delay": 20}]},
            r"t.yaml: profiles\[0\]: delay: time 20 has no unit",
        ),
        (
            {"traffic": [{"from": "cloud", "to": "edge", "start": 5}]},
            r"traffic\[0\].*start: time 5 has no unit",
        ),
        ({"topology": "nowhere"}, r"t.yaml: topology: .*nowhere"),
        ({"edge": "moon"}, r"t.yaml: edge: .*'moon'"),
        ({"edge": "cloud"}, r"same node"),
        ({"link": "moon"}, r"t.yaml: link: .*'moon'"),
        ({"links": {"moon": "lte"}}, r"no link 'moon'"),
        ({"model": "./moon"}, r"t.yaml: model: model './moon': there is no such directory"),
        ({"device": {"edge": "cpu", "fog": "cpu"}}, r"device: unknown key 'fog'"),
        ({"name": "../../etc"}, r"t.yaml: name"),
        ({"codecs": ["delta+kivi"]}, r"codecs: delta: a closed loop needs .* kivi does not. Use loop=open"),
    ],
)
def test_a_mistake_is_named_with_its_place(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        plan(**changes)
    assert "\n" not in str(caught.value)


def test_a_scenarios_timeout_reads_back_from_its_settings_also_from_those_of_older_runs(
    tmp_path: Path,
) -> None:
    made = plan(timeout="90s")
    kept = made.scenario.model_dump(mode="json")
    assert make_plan(kept, "manifest.json").scenario.timeout == 90.0
    directory = RunDirectory.create(tmp_path / "run")
    directory.write("manifest.json", {"format": FORMAT, "settings": kept | {"timeout": 90.0}})
    assert make_plan(directory.settings(), "manifest.json").scenario.timeout == 90.0


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match=r"x.yaml: tasks is missing"):
        make_plan({"name": "x", "profiles": ["lte"]}, "x.yaml")


def test_the_command_line_changes_a_scenario() -> None:
    made = load_plan(
        "quick",
        assignments=["device.edge=cpu", "context_tokens=[64, 96]", "seed=7"],
        codecs=("int8",),
        links={"access": "rate=5mbit,delay=1ms"},
        examples=2,
    )
    assert made.scenario.device.edge == "cpu"
    assert made.scenario.device.cloud == "auto"
    assert made.scenario.context_tokens == [64, 96]
    assert (made.scenario.seed, codecs_of(made), made.scenario.examples) == (7, ["int8"], 2)
    assert [p.up.rate_bps for p in made.profiles] == [5e6]
    again = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert [p.text() for p in again.profiles] == [p.text() for p in made.profiles]


@pytest.mark.parametrize(
    "text", ["[1, 2", "a: &x 1\nb: *x\n", "a: 1\na: 2\n", "- 1\n", "\x00", "!!python/object:os.system {}"]
)
def test_a_file_that_is_no_scenario_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        load_plan(str(path))


@example({"codecs": []})
@given(
    st.dictionaries(
        st.sampled_from([*BASE, "links", "device", "timeout"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_settings_make_a_plan_or_a_typed_error(changes: dict[str, object]) -> None:
    try:
        assert plan(**changes).trials >= 1
    except UsageError as error:
        assert "\n" not in str(error)


def test_background_traffic_is_part_of_what_a_cell_is() -> None:
    flows = [
        {"from": "edge2", "to": "cloud", "kind": "udp", "rate": "20mbit", "start": "1s", "stop": "30s"},
        {"from": "cloud", "to": "edge2"},
    ]
    made = plan(topology="shared-bottleneck", edge="edge1", link="backhaul", traffic=flows)
    quiet = plan(topology="shared-bottleneck", edge="edge1", link="backhaul")
    udp, tcp = made.flows()
    assert (udp.source, udp.target, udp.rate_bps, udp.start_s, udp.stop_s) == (
        "edge2",
        "cloud",
        20e6,
        1.0,
        30.0,
    )
    assert (tcp.kind, tcp.rate_bps, tcp.stop_s) == ("tcp", None, None)
    assert made.cells(0, 256)[0].identity(made) != quiet.cells(0, 256)[0].identity(quiet)
    assert make_plan(made.scenario.model_dump(mode="json"), "again").flows() == [udp, tcp]


@pytest.mark.parametrize(
    ("flow", "says"),
    [
        ({"from": "edge", "to": "clod"}, r"traffic\[0\].to: topology edge-cloud has no node 'clod'"),
        ({"from": "edge"}, r"traffic\[0\]: to is missing"),
        ({"from": "edge", "to": "cloud", "kind": "quic"}, r"traffic\[0\]: kind: .*'iperf3' \(got 'quic'\)"),
        ({"from": "edge", "to": "cloud", "kind": "udp"}, r"traffic\[0\]: rate is missing"),
        ({"from": "edge", "to": "cloud", "rate": "fast"}, r"traffic\[0\]: rate: "),
        (
            {"from": "edge", "to": "cloud", "start": "2s", "stop": "1s"},
            r"traffic\[0\]: stop: not after start",
        ),
        ({"from": "edge", "to": "edge"}, r"traffic\[0\]: a flow from 'edge' to itself"),
        ({"from": "edge", "to": "cloud", "speed": 1}, r"traffic\[0\]: unknown key 'speed'"),
    ],
)
def test_traffic_that_does_not_do_is_refused_by_its_place(flow: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError, match=f"t.yaml: {says}"):
        plan(traffic=[flow])


@pytest.mark.parametrize(
    ("text", "codecs"),
    [
        ("[q2c@0.25(pool=1, scope=global)+int8]", ["q2c@0.25(scope=global, pool=1)+int8"]),
        ("[int8, q2c@0.25(pool=1, scope=global)+int8, fp16]", ["int8", "q2c@0.25(scope=global, pool=1)+int8", "fp16"]),
        ('["q2c@0.25(pool=1, scope=global)+int8", int8]', ["q2c@0.25(scope=global, pool=1)+int8", "int8"]),
    ],
)  # fmt: skip
def test_commas_in_a_codecs_parentheses_do_not_end_it_on_the_command_line(
    text: str, codecs: list[str]
) -> None:
    assert codecs_of(load_plan("quick", assignments=[f"codecs={text}"])) == codecs


def test_a_codec_that_yaml_has_split_is_shown_as_it_has_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "split.yaml"
    path.write_text("profiles: [lte]\ntasks: [needle]\ncodecs: [int8, q2c@0.25(pool=1, scope=global)+int8]\n")
    with pytest.raises(
        SpecError, match=r'codecs\[1\].*quote it, as \["q2c@0.25\(pool=1, scope=global\)\+int8"\]'
    ):
        load_plan(str(path))


def test_a_seed_is_a_number_that_every_process_can_take() -> None:
    with pytest.raises(SpecError, match="seed"):
        load_plan("quick", assignments=[f"seed={2**63}"])


@pytest.mark.parametrize(
    ("changes", "replayed"),
    [
        ({}, [False, False]),
        ({"reuse": "prefill"}, [False, False]),
        ({"compute": {"edge": 2}}, [False, False]),
        ({"delivery": "stream"}, [True, True]),
        ({"connection": "reuse"}, [True, True]),
        ({"traffic": [{"from": "cloud", "to": "edge", "kind": "tcp"}]}, [True, True]),
        ({"profiles": ["5g-mid", "delay=5ms,sine:10mbit..30mbit*2s"]}, [False, True]),
        ({"profiles": ["5g-mid", "delay=5ms,sine:10mbit..30mbit*2s"], "at": "run"}, [True, True]),
        ({"profiles": ["5g-mid", "delay=5ms,sine:10mbit..30mbit*2s"], "at": "example"}, [False, True]),
    ],
)
def test_what_is_taken_over_is_waited_for_where_time_matters(
    changes: dict[str, object], replayed: list[bool]
) -> None:
    made = plan(**{"profiles": ["5g-mid", "lte"], "codecs": ["fp16"], **changes})
    assert [made.replays(cell) for cell in made.cells(0, 256)] == replayed


def test_a_task_may_have_a_number_of_examples_of_its_own() -> None:
    made = plan(tasks=["needle", {"task": "passages", "examples": 3}], examples=2, codecs=["fp16"])
    assert [made.scenario.examples_of(task) for task in (0, 1)] == [2, 3]
    assert made.trials == (2 + 3) * len(made.cells(0, 256))
    alone = plan(tasks=["passages"], codecs=["fp16"])
    assert made.cells(1, 256)[0].identity(made) == alone.cells(0, 256)[0].identity(alone)
    assert make_plan(made.scenario.model_dump(mode="json"), "manifest.json").trials == made.trials
    assert load_plan("5g", assignments=["tasks=[{task: needle, examples: 9}]"], examples=4).trials == 4 * len(
        load_plan("5g", assignments=["tasks=[needle]"]).cells(0, 256)
    )
    for number in (0, "many", True):
        with pytest.raises(SpecError, match="`examples` of a task"):
            plan(tasks=[{"task": "needle", "examples": number}])
    with pytest.raises(SpecError, match="listed twice"):
        plan(tasks=["needle", {"task": "needle", "examples": 3}])


@pytest.mark.parametrize(
    "beside", ["profile: 'delay=1ms,sine:10mbit..30mbit*2s'", "profile: wan, pcap: true"]
)
def test_another_link_that_changes_or_is_captured_makes_time_matter(tmp_path: Path, beside: str) -> None:
    (tmp_path / "net.yaml").write_text(
        "nodes: [edge, router, cloud]\nlinks:\n"
        "  - {name: access, a: edge, b: router, profile: wan}\n"
        f"  - {{name: backhaul, a: router, b: cloud, {beside}}}\n"
    )
    made = plan(topology=str(tmp_path / "net.yaml"), link="access")
    assert all(made.replays(cell) for cell in made.cells(0, 256))


def test_the_forecast_knows_that_what_is_replayed_takes_its_time() -> None:
    many = {"profiles": ["5g-mid", "lte", "wan", "wifi"], "placements": ["cloud"], "model": "smollm2-135m"}
    shared, replayed, none = (
        Estimator(plan(**many, **more)).compute_s(plan(**many, **more).cells(0, 256)[0])
        for more in ({"reuse": "all"}, {"reuse": "all", "connection": "reuse"}, {"reuse": "none"})
    )
    assert shared < replayed == none


def test_the_forecast_takes_a_slow_traces_mean_and_ends_a_request_at_its_timeout(tmp_path: Path) -> None:
    took = {}
    for bps in (1600, 400, 4):
        trace = tmp_path / f"{bps}.csv"
        trace.write_text(f"time_s,rate_mbps\n0,{bps / 1e6:f}\n1,{bps / 1e6:f}\n")
        made = plan(profiles=[f"trace:{trace}"], placements=["cloud"], context_tokens=64, timeout="300s")
        cell = made.cells(0, 64)[0]
        took[bps] = Estimator(made).transmit_s(cell), Estimator(made).payload_bytes(cell) * 8 / bps
    for bps in (1600, 400):
        assert took[bps][0] == pytest.approx(took[bps][1], rel=0.1)
    assert took[4][0] == 300.0


def test_a_row_has_the_mean_rate_of_a_trace_slower_than_any_steady_link(tmp_path: Path) -> None:
    (tmp_path / "slow.csv").write_text("time_s,rate_mbps\n0,0.0004\n1,0.0004\n")
    made = plan(profiles=[f"delay=5ms,trace:{tmp_path / 'slow.csv'}"], placements=["cloud"])
    trial = Trial(made.cells(0, 256)[0], "", 0, 0, 0, Example("1", "", "?", ("x",)), "x")
    row = new_row(trial, made, "userspace", Reference(), True)
    assert row.rate_up_bps == row.rate_down_bps == pytest.approx(400)
    shown = conditions(pd.DataFrame([dataclasses.asdict(row) | {"trace_s": 0.0}]))
    assert shown.startswith("means of a trace: 0.0004 Mbit/s · 5 ms one way")
