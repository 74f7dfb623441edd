"""Scenarios of devices that are not here and of models that are a shape: what fits together, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.codecs import registry
from testbed.codecs.codec import Codec
from testbed.codecs.spec import parse
from testbed.errors import SpecError, UsageError
from testbed.experiment import inputs
from testbed.experiment.estimate import Estimator
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Plan
from testbed.experiment.trial import Reference, Trial, new_row
from testbed.models.kvcache import KVCache
from testbed.models.shape import ShapeModel
from testbed.models.shapes import SHAPES
from testbed.tasks.task import Example
from tests.models.test_shape import SMALL

EDGE, CLOUD = "device:m1-max-llama-3.1-8b", "device:rtx-4090-llama-3.1-8b"
BASE = {
    "name": "t",
    "profiles": ["rate=100mbit,delay=5ms"],
    "tasks": ["needle"],
    "codecs": ["int4"],
    "model": "shape:llama-3.1-8b",
    "compute": {"edge": EDGE, "cloud": CLOUD},
    "context_tokens": [1024],
}


def plan(**changes: Any) -> Plan:
    return make_plan({**BASE, **changes}, "t.yaml")


def profile(folder: Path, name: str = "board", **changes: Any) -> Path:
    about = {
        "device": "a board",
        "model": "llama-3.1-8b",
        "dtype": "float16",
        "basis": "measured",
        "source": "here",
        "prefill": [[512, "1s"]],
        "decode": [[512, "90ms"]],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**about, **changes}))
    return path


def test_a_row_names_the_shape_and_both_devices() -> None:
    made = plan()
    cell = made.cells(0, 1024)[0]
    trial = Trial(cell, "c", 0, 0, 0, Example("e", "", "", ("a",)), "a")
    row = new_row(trial, made, "netem", Reference(), True)
    assert (row.model, row.edge_device, row.cloud_device) == (
        "shape:llama-3.1-8b",
        "m1-max-llama-3.1-8b",
        "rtx-4090-llama-3.1-8b",
    )
    assert (row.edge_slowdown, row.edge_decode_slowdown) == (1.0, 1.0)


def test_a_settings_file_of_a_plan_makes_the_same_plan(tmp_path: Path) -> None:
    profile(tmp_path, decode=[])
    edge = {"device": str(tmp_path / "board.yaml")}
    made = plan(compute={"edge": edge, "cloud": CLOUD})
    again = make_plan(made.scenario.model_dump(mode="json"), "again.yaml")
    assert again.scenario == made.scenario and again.devices == made.devices
    assert made.scenario.compute.edge.decode is None  # the profile has no times of decoding


def test_a_cell_is_another_where_a_device_takes_other_times_and_the_same_wherever_its_file_lies(
    tmp_path: Path,
) -> None:
    found = []
    for folder, took in (("a", "1s"), ("b", "1s"), ("c", "2s")):
        (tmp_path / folder).mkdir()
        path = profile(tmp_path / folder, prefill=[[512, took]])
        made = plan(compute={"edge": f"device:{path}", "cloud": CLOUD})
        found.append(made.cells(0, 1024)[0].identity(made))
    assert found[0] == found[1] != found[2]


def test_a_profile_that_changed_is_an_input_that_changed(tmp_path: Path) -> None:
    path = profile(tmp_path)
    made = plan(compute={"edge": f"device:{path}", "cloud": CLOUD})
    before = inputs.described(made)
    inputs.check_unchanged(before, made)
    profile(tmp_path, source="there")
    with pytest.raises(UsageError, match=r"device profile .*board.yaml: has changed since this run began"):
        inputs.check_unchanged(before, made)


def test_the_bytes_that_are_expected_are_those_of_the_true_shape() -> None:
    made = plan(codecs=["fp16"])
    shape = SHAPES["llama-3.1-8b"]
    foretold = Estimator(made).payload_bytes(made.cells(0, 1024)[0])
    assert foretold == pytest.approx(1024 * shape.kv_bytes_per_token, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "shape:llama-9"}, r"t.yaml: model: unknown shape 'llama-9'; did you mean shape:llama"),
        ({"compute": {"edge": EDGE}}, r"t.yaml: compute.cloud: model shape:llama-3.1-8b computes nothing"),
        ({"compute": {"edge": 4, "cloud": CLOUD}}, r"t.yaml: compute.edge: model shape:.* computes nothing"),
        ({"compute": {"edge": "device:moon", "cloud": CLOUD}}, r"t.yaml: compute.edge: no device profile 'moon'"),
        ({"model": "shape:qwen2.5-7b"}, r"compute.edge: device m1-max.* for model llama-3.1-8b, and this one is qwen2.5-7b"),
        ({"context_tokens": [16_385]}, r"t.yaml: compute.edge: device m1-max.*: prefill was measured up to 8192 tokens"),
        ({"codecs": ["int4+zstd"]}, r"t.yaml: codecs: 'int4\+zstd': what coder zstd makes of a cache depends on its values"),
        ({"codecs": ["int4+lz4"]}, "what coder lz4 makes"),
        ({"codecs": ["int4+ans"]}, "what coder ans makes"),
        ({"codecs": ["cachegen"]}, "what coder ans makes"),
        ({"delivery": ["adaptive(levels=[int8, cachegen])"]}, r"t.yaml: delivery: 'cachegen': what coder ans makes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_with_its_place(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint) as found:
        plan(**changes)
    assert "\n" not in str(found.value)


def test_a_real_model_is_waited_for_where_it_is_known_beforehand_what_arrives(tmp_path: Path) -> None:
    path = profile(tmp_path, model="smollm2-135m")
    real = {"model": "smollm2-135m", "compute": {"edge": f"device:{path}"}, "placements": ["split", "edge"]}
    made = plan(**real, delivery=["whole", "stream"])
    cells = made.cells(0, 1024)
    assert [made.rehearses(cell) for cell in cells] == [cell.placement != "edge" for cell in cells]
    assert not any(shape.rehearses(cell) for shape in [plan()] for cell in shape.cells(0, 1024))
    with pytest.raises(
        SpecError, match=r"compute.edge: device board .* with deliveries whole and stream; 'meet'"
    ):
        plan(**real, delivery=["meet"])
    with pytest.raises(SpecError, match=r"compute.edge: what device board .* that takes reuse: all"):
        plan(**real, reuse="prefill")


def test_an_edge_of_a_device_without_times_of_decoding_makes_no_answer(tmp_path: Path) -> None:
    path = profile(tmp_path, decode=[])
    with pytest.raises(SpecError, match=r"compute.edge has `decode: no`"):
        plan(compute={"edge": f"device:{path}", "cloud": CLOUD}, placements=["edge"])


@pytest.mark.parametrize(
    "name", [n for n in registry.QUANTIZERS if n not in ("best", "cachegen", "lossless", "kvtc")]
)
def test_what_every_other_quantizer_makes_of_a_shape_is_as_large_whatever_the_values(name: str) -> None:
    model = ShapeModel(SMALL)
    codec = Codec(parse({"mixed": "mixed(protect=K1)"}.get(name, name)))
    cache = model.prefill(range(100), None).cache
    others = [layer.slice(0) for layer in cache.layers]
    for layer in others:
        layer.keys, layer.values = layer.keys.flip(1) * 3, (layer.values.float() ** 3).half()
    sizes = [len(codec.encode(model.knowing_ropes(one))) for one in (cache, KVCache(others, cache.length))]
    assert sizes[0] == sizes[1]
