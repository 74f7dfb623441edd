"""kvpress's presses as selectors: real ones where that package is installed, and a plain word where it is not."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from testbed.codecs import CodecError, registry
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, gather, prefill_for
from testbed.codecs.select import press
from testbed.codecs.spec import parse
from testbed.errors import SpecError
from testbed.models.loading import load_model

installed = pytest.mark.skipif(bool(press.unavailable()), reason=press.unavailable())


@pytest.fixture
def looked_up_anew() -> Iterator[None]:
    press.unavailable.cache_clear()
    yield
    press.unavailable.cache_clear()


@pytest.mark.usefixtures("looked_up_anew")
def test_a_press_without_the_package_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SpecError, match=r"kvpress is not installed \(pip install") as caught:
        parse("kvpress:SnapKV@0.5+int8")
    assert "\n" not in str(caught.value)
    listed = [found for found in registry.describe() if found.name.startswith("kvpress:")]
    assert [found.name for found in listed] == ["kvpress:PRESS"]
    assert "is not installed" in listed[0].unavailable and "kvpress:SnapKV@0.5" in listed[0].summary


@pytest.mark.usefixtures("looked_up_anew")
def test_transformers_that_kvpress_does_not_take_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"kvpress": "0.5.5", "transformers": "5.23.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["torch<3", 'fire; extra == "x"', "transformers<5.3,>=4.56"],
    )
    with pytest.raises(SpecError, match=r"takes transformers <5\.3,>=4\.56, and 5\.23\.0 is installed"):
        parse("kvpress:SnapKV@0.5")
    versions["transformers"] = "5.2.0"
    press.unavailable.cache_clear()
    assert press.unavailable() == ""


def test_a_press_says_what_it_misses() -> None:
    cache = gathered_nothing().cache
    with pytest.raises(CodecError, match="needs what layer 0's attention is given"):
        press.Press(0.5).scores(Evidence(cache=cache, scaling=lambda layer: 1.0), 0)


def gathered_nothing() -> Evidence:
    from tests.codecs.caches import make_cache

    return Evidence(cache=make_cache("grouped"), scaling=lambda layer: 1.0)


@installed
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("kvpress:SnapKV@0.25(window_size=16)", "snapkv@0.25(window=16, kernel=5, pool=mean)"),
        ("kvpress:TOVA@0.25", "tova@0.25"),
        ("kvpress:ExpectedAttention@0.25", "expected@0.25"),
        ("kvpress:Knorm@0.25+int8", "keynorm@0.25+int8"),
        ("kvpress:KeyDiff@0.25", "keydiff@0.25"),
    ],
)
def test_what_a_press_keeps_arrives_as_ours_does(
    tiny_model: Callable[[str], Path], family: str, theirs: str, ours: str
) -> None:
    model = load_model(str(tiny_model(family)), threads=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 380, (200,), generator=generator).tolist()
    arrived = []
    for text in (theirs, ours):
        codec = Codec(text)
        assert str(parse(text)) == str(codec.spec)
        prefilled = prefill_for(model, codec.needs, ids, None)
        kept = codec.select(gather(model, codec.needs, None, prefilled, ()))
        arrived.append(decode(codec.encode(prefilled.cache, kept)))
    for mine, other in zip(*(cache.layers for cache in arrived), strict=True):
        places = torch.zeros(2, mine.kv_heads, len(ids), dtype=torch.bool)
        for row, layer in zip(places, (mine, other), strict=True):
            row.scatter_(1, layer.positions.expand(layer.kv_heads, -1), True)
        assert float((places[0] == places[1]).float().mean()) > 0.995


@installed
def test_every_score_press_is_listed_with_its_parameters_and_paper() -> None:
    found = {each.name: each for each in registry.describe() if each.name.startswith("kvpress:")}
    assert {"kvpress:SnapKV", "kvpress:ExpectedAttention", "kvpress:Knorm", "kvpress:TOVA"} <= set(found)
    assert "kvpress:PyramidKV" not in found  # which prunes by more than a score
    snapkv = {each.name: each.default for each in found["kvpress:SnapKV"].parameters}
    assert snapkv == {"scope": "head", "window_size": 64, "kernel_size": 5}
    assert "2404.14469" in found["kvpress:SnapKV"].source
