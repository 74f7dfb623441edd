"""docs/adding.md as a newcomer follows it: its files and its lines, and what they then give."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed import kinds
from testbed.analysis import figures
from testbed.analysis.run import load
from testbed.codecs import registry
from testbed.codecs.codec import Codec, decode
from testbed.codecs.spec import parse
from testbed.delivery.delivery import DELIVERIES
from testbed.delivery.policies.policy import POLICIES, Arrival, Rung, Situation
from testbed.endpoints.client import Client
from testbed.errors import EndpointError
from testbed.tasks import task as tasks
from tests.analysis.make_run import make_run
from tests.codecs.caches import make_cache
from tests.codecs.test_selectors import make_evidence
from tests.endpoints.pair import in_this_process
from tests.endpoints.test_wire import request
from tests.tiny_models import tiny_model_directory

PAGE = (Path(__file__).parents[1] / "docs/adding.md").read_text()
REGISTRIES: dict[str, dict[str, Any]] = {
    "SELECTORS": registry.SELECTORS, "QUANTIZERS": registry.QUANTIZERS, "TASKS": tasks.TASKS, "FIGURES": figures.FIGURES,
    "DELIVERIES": DELIVERIES, "POLICIES": POLICIES,
}  # fmt: skip


@pytest.fixture(autouse=True)
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that the page shows is a module, and each line stands in its registry."""
    shown = r'```python\n(.*?)```\n\nand one line in `(\w+)` of `.+?`: `"(\w+)": "(.+?)"`'
    added = re.findall(shown, PAGE, re.DOTALL)
    assert {table for _, table, _, _ in added} == set(REGISTRIES)
    for code, table, name, target in added:
        assert name not in REGISTRIES[table]
        assert len(code.splitlines()) <= 45
        module = target.partition(":")[0]
        made = types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, made)
        exec(compile(code, module, "exec"), made.__dict__)
        monkeypatch.setitem(REGISTRIES[table], name, target)


def test_a_newcomers_selector_is_a_codecs() -> None:
    codec = Codec("first@0.25+int8")
    assert str(parse(str(codec))) == str(codec)
    assert any(found.name == "first" and found.summary for found in registry.describe())
    evidence = make_evidence()
    kept = codec.select(evidence)
    assert kept.tokens == 15
    assert decode(codec.encode(evidence.cache.to(dtype=torch.float16), kept)).layers[0].tokens == 15


@pytest.mark.parametrize("codec", ["sign", "sign+zstd"])
@pytest.mark.parametrize("shape", ["grouped", "odd dimensions", "no tokens"])
def test_a_newcomers_quantizer_codes_every_shape(codec: str, shape: str) -> None:
    cache = make_cache(shape)
    for ours, theirs in zip(decode(Codec(codec).encode(cache)).layers, cache.layers, strict=True):
        assert ours.keys.dtype == theirs.keys.dtype
        assert torch.equal(ours.keys > 0, theirs.keys > 0)


def test_a_newcomers_delivery_brings_the_cloud_the_same_payload_in_its_own_time(tmp_path: Path) -> None:
    pair = in_this_process(tiny_model_directory("llama", tmp_path / "model"))
    outcomes = []
    for delivery, least_s, most_s in (("whole", 0.0, 0.4), ("halves(wait=0.4)", 0.4, 9.0)):
        result = pair.ask("planes", delivery=delivery)
        assert least_s <= result.stages.transmit_s < most_s
        assert "decode" not in result.reused
        outcomes.append((result.answer, result.payload_bytes, pair.outcome(result)))
    assert outcomes[0] == outcomes[1]
    DELIVERIES.pop("halves")
    with pytest.raises(EndpointError, match="the cloud: the request: delivery 'halves': unknown"):
        Client().ask(request(delivery="halves", prefix=pair.prefix), [b""], pair.link)


def test_a_newcomers_policy_goes_by_what_the_link_did() -> None:
    policy = kinds.parse("stepwise(start=2)", POLICIES, "policy")
    assert str(policy) == "stepwise(start=2)"
    arrivals = (Arrival(100_000, 0.0, 1.0), Arrival(100_000, 1.0, 1.5), Arrival(100_000, 1.5, 3.0))
    chunks = ((Rung(100_000), Rung(50_000), Rung(10_000)),)
    levels = [
        policy.choose(Situation(3.0, None, ("int8", "int4", "int2"), chunks, arrivals[:count]))
        for count in range(4)
    ]
    assert levels == [2, 2, 1, 2]


def test_a_newcomers_task_asks_for_what_its_context_says() -> None:
    made = tasks.parse_task("years")
    for example in made.examples(3, 80, lambda text: len(text.split()), 0):
        assert example.answers[0] in example.context
        assert made.score(example.answers[0], example)["score"] == 1


def test_a_newcomers_figure_is_drawn_with_the_others(tmp_path: Path) -> None:
    run = load(
        make_run(tmp_path / "run", profiles=("lte",), codecs=("fp16", "int8"), tasks=("needle",), examples=3)
    )
    written = figures.draw_all(run, ["sizes"])
    assert {path.name for path in written} == {"sizes.png", "sizes.pdf"}
