from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import registry
from testbed.codecs.select import Selector
from testbed.codecs.spec import LONGEST, CodecSpec, parse
from testbed.errors import SpecError
from testbed.kinds import parameters

NAMES = [name for table in registry.STAGES.values() for name in table]


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("fp16", "fp16"),
        ("int8", "int8"),
        ("int4(group=32)", "int4"),
        ("int4(group=64)", "int4(group=64)"),
        ("q2c@0.25+int8", "q2c@0.25+int8"),
        ("q2c@.25", "q2c@0.25+fp16"),
        ("q2c@25%+int8", "q2c@0.25+int8"),
        ("snapkv@0.50(window=32)+int4+zstd", "snapkv@0.5+int4+zstd"),
        ("snapkv@1(question=true, pool=mean)", "snapkv@1(pool=mean, question=true)+fp16"),
        (" h2o @ 0.5 ( recent = 0.25 ) + int8 ", "h2o@0.5(recent=0.25)+int8"),
        ("h2o@0.5(recent=1e+0)", "h2o@0.5(recent=1)+fp16"),
        ("zstd(level=-3)", "fp16+zstd(level=-3)"),
        ("window@0.1()", "window@0.1+fp16"),
        ("random@0.5(scope=head)+int4", "random@0.5(scope=head)+int4"),
    ],
)
def test_a_codec_is_printed_in_its_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)
    assert hash(parse(canonical)) == hash(parse(text))


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "cannot read ''"),
        (
            "q2x@0.25+int8",
            "codec 'q2x@0.25+int8': unknown method 'q2x'; did you mean 'q2c'? (selectors: q2c,",
        ),
        ("q2c+int8", "q2c needs the fraction of tokens it keeps, such as q2c@0.25"),
        ("q2c@0", "ratio is 0, but must be above 0 and at most 1"),
        ("q2c@1.5", "1.5"),
        ("q2c@-0.5", "-0.5"),
        ("q2c@nan", "nan"),
        ("q2c@0.25kb", "0.25kb"),
        ("int8@0.5", "int8 is a quantizer and takes no @ratio"),
        ("int8+q2c@0.25", "write q2c@0.25+int8"),
        ("zstd+int8", "write int8+zstd"),
        ("int8+int4", "int8 and int4 are both quantizers"),
        ("q2c@0.5+h2o@0.5", "q2c and h2o are both selectors"),
        ("int4(bits=4)", "int4 has no parameter 'bits'; it takes group, symmetric, axis"),
        ("int4(group)", "'group' is not key=value"),
        ("int4(group=)", "expected a whole number"),
        ("int4(group=1.5)", "expected a whole number"),
        ("int4(group=1)", "group is 1, but must be 0 (the whole axis) or from 2 to 4096"),
        ("int4(group=32, group=32)", "group is given twice"),
        ("int4(symmetric=yes)", "expected true or false"),
        ("snapkv@0.5(pool=min)", "expected one of max, mean"),
        ("snapkv@0.5(kernel=4)", "kernel is 4, but must be odd"),
        ("q2c(ratio=0.5)", "needs the fraction"),
        ("q2c@0.5(ratio=0.5)", "write the ratio as q2c@0.5"),
        ("window@0.5(scope=head)", "window has no parameter 'scope'"),
        ("fp16()(", "cannot read"),
        ("int8+", "cannot read ''"),
        ("int8++zstd", "cannot read"),
        ("int8;zstd", "cannot read 'int8;zstd'"),
        ("int4(group=99999999999999999999)", "expected a whole number"),
        ("q2c@0.5(sinks=5000)", "sinks is 5000, but must be from 0 to 4096"),
        ("x" * 10_000, f"10000 characters, but a codec has at most {LONGEST}"),
        ("int8\n+zstdx", "unknown method 'zstdx'; did you mean 'zstd'?"),
    ],
)
def test_a_wrong_codec_is_refused_in_one_line_that_names_the_part(text: str, says: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text)
    message = str(error.value)
    assert says in message
    assert message.startswith("codec ")
    assert "\n" not in message
    assert len(message) < 600


@st.composite
def specs(draw: st.DrawFn) -> CodecSpec:
    chosen = {}
    for stage, table in registry.STAGES.items():
        if table and (stage == "quantizer" or draw(st.booleans())):
            method = registry.find(draw(st.sampled_from(sorted(table))))
            values = {p.name: draw(_values(p.name, p.type, p.choices)) for p in parameters(method)}
            if values.get("layers") == "last":  # which makes one list for all
                values["scope"] = "global"
            if "form" in values and values["scope"] != "head":  # merged runs are a head's own
                values["form"] = "cam"
            chosen[stage] = method(**values)
    return CodecSpec(**{"selector": None, "transform": None, "coder": None, **chosen})


def _values(name: str, kind: str, choices: tuple[str, ...]) -> st.SearchStrategy:
    by_name = {
        "ratio": st.floats(0, 1, exclude_min=True),
        "recent": st.floats(0, 1),
        "floor": st.floats(0, 1),
        "first": st.floats(0, 1),
        "window": st.integers(0, 65536),
        "sinks": st.integers(0, 4096),
        "level": st.integers(1, 4),
        "group": st.integers(2, 4096),
        "bits": st.sampled_from([2, 3, 4, 8]),
        "outliers": st.floats(0, 0.5),
        "extra": st.integers(0, 7),
        "low": st.sampled_from([2, 3]),
        "high": st.sampled_from([4, 8, 16]),
        "table": st.sampled_from(["none", "0f" * 16, "some/where.tables"]),
        "protect": st.sampled_from(["auto", "none", "K0", "K3.V7.12", "K0-5.11", "some/where.json"]),
        "residual": st.integers(0, 65536),
        "seed": st.integers(0, 2**31 - 1),
        "anchor": st.integers(2, 4096),
        "filters": st.sampled_from(["own", "0f" * 16, "some/where.filters"]),
        "keep": st.floats(0.125, 1),
        "basis": st.sampled_from(["own", "0f" * 16, "some/where.bases"]),
        "of": st.sampled_from(["fp16", "int8", "int4"]),
        "plan": st.sampled_from(["auto", "none", "0f" * 16, "some/where.sensitivity"]),
        "keys": st.sampled_from(["none", "0", "09az"]),
        "values": st.sampled_from(["none", "z"]),
        "by": st.sampled_from(["q2c", "keynorm", "lagkv"]),
    }
    odd = st.integers(0, 511).map(lambda n: 2 * n + 1)
    if choices:
        return st.sampled_from(choices)
    return st.booleans() if kind == "bool" else by_name.get(name, odd)


@given(specs())
def test_every_spec_reads_back_from_what_it_prints(spec: CodecSpec) -> None:
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)


fragments = st.sampled_from(
    [*NAMES, "+", "@", "(", ")", "=", ",", "0.5", "group", "pool", " ", "é", "\n", "1e999"]
)


@given(st.text(max_size=80) | st.lists(fragments, max_size=12).map("".join))
def test_any_text_is_a_codec_or_a_spec_error(text: str) -> None:
    try:
        spec = parse(text)
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert parse(str(spec)) == spec


def test_specs_and_the_catalogue_need_no_torch() -> None:
    program = (
        "import json, sys, time; started = time.perf_counter()\n"
        "from testbed.codecs import registry; from testbed.codecs import spec\n"
        "took = time.perf_counter() - started\n"
        "spec.parse('q2c@0.25+int4+zstd'); registry.describe()\n"
        "from testbed.codecs.layout import expected_bytes\n"
        "size = expected_bytes(spec.parse('int8'), [(3, 64, 64, None)] * 30, 1024)\n"
        "print(json.dumps([size, sorted({m.partition('.')[0] for m in sys.modules})]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    size, modules = json.loads(output)
    assert not {"torch", "numpy", "transformers", "zstandard"} & set(modules)
    assert size == pytest.approx(1024 * 30 * 2 * 3 * (64 + 2), rel=0.001)


def test_every_method_describes_itself() -> None:
    described = {found.name: found for found in registry.describe() if not found.name.startswith("kvpress:")}
    assert list(described) == NAMES
    for name, description in described.items():
        method = registry.find(name)
        assert method.name == name
        assert method.stage == description.stage == registry.stage_of(name)
        assert 20 < len(description.summary) < 130
        assert description.source
        assert description.takes_ratio == (description.stage == "selector")
    snapkv = {parameter.name: parameter.default for parameter in described["snapkv"].parameters}
    own = {"window": 32, "kernel": 7, "pool": "max", "question": False}
    assert snapkv == {"scope": "head", "layers": "all", **own}


@dataclass(frozen=True)
class EverySecond(Selector):
    """Even tokens first: a selector in a few lines."""

    name: ClassVar[str] = "every-second"
    source: ClassVar[str] = "this test"

    def always(self, tokens: int, budget: int) -> range:
        return range(0, tokens, 2)


def test_a_new_selector_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from testbed.codecs.codec import Codec, decode
    from testbed.codecs.evidence import Evidence
    from tests.codecs.caches import make_cache

    monkeypatch.setitem(registry.SELECTORS, "every-second", f"{__name__}:EverySecond")
    cache = make_cache("grouped")
    codec = Codec("every-second@0.25+int8")
    kept = codec.select(Evidence(cache=cache, scaling=lambda layer: 1.0))
    decoded = decode(codec.encode(cache, kept))
    assert decoded.layers[1].positions.tolist() == list(range(57, 57 + 48, 2))
