"""Device profiles as files: those that are shipped, those that are written, and those that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed import lookup, strict_yaml
from testbed.errors import SpecError
from testbed.models.presets import PRESETS
from testbed.models.shapes import SHAPES
from testbed.speed.files import CodecTimes, Device, Way, device_from, load_device, shipped_devices
from testbed.speed.times import DeviceTimes

SHIPPED = Path(__file__).parents[2] / "devices"
RIGHT = {
    "device": "a board",
    "model": "qwen2.5-7b",
    "dtype": "float16",
    "basis": "measured",
    "source": "here",
    "prefill": [[16, "20ms"], [32, "30ms"]],
    "decode": [[16, "9ms"]],
}


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=40)


def points() -> st.SearchStrategy[tuple[tuple[int, float], ...]]:
    return st.dictionaries(st.integers(1, 1 << 24), st.floats(1e-9, 1e6), min_size=1, max_size=9).map(
        lambda found: tuple(sorted(found.items()))
    )


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_profile_is_of_a_model_that_can_be_named_and_says_its_source(path: Path) -> None:
    device = load_device(path.stem)
    assert device.times.model in {*SHAPES, *PRESETS}
    assert path.stem.endswith(device.times.model)
    assert len(device.source) > 40
    assert path in {found.resolve() for found in shipped_devices()}
    assert device.times.pass_s(device.times.prefill[0][0]) == pytest.approx(device.times.prefill[0][1])


@given(
    points(),
    st.just(()) | points(),
    WORDS,
    st.dictionaries(WORDS, st.tuples(points(), points()), max_size=3),
    st.dictionaries(st.sampled_from(get_args(Way)), st.floats(1, 1e18), max_size=5),
)
def test_a_profile_that_is_written_reads_back(
    prefill: tuple[tuple[int, float], ...],
    decode: tuple[tuple[int, float], ...],
    words: str,
    codecs: dict[str, Any],
    copies: dict[str, float],
) -> None:
    times = DeviceTimes("x", words, prefill, decode)
    more = tuple(CodecTimes(codec, *ways) for codec, ways in codecs.items()), tuple(copies.items())
    made = Device("x", words, "float16", "measured", words, times, *more)
    assert device_from(strict_yaml.parse(made.text(), "x.yaml"), "x.yaml", "x") == made
    assert made.digest == Device("x", words, "float16", "measured", words, times).digest


def test_a_profile_is_found_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(RIGHT))
    with lookup.beside(tmp_path / "scenario.yaml"):
        assert load_device("board.yaml").name == "board"
    with pytest.raises(SpecError, match="no device profile 'board'"):
        load_device("board")
    with pytest.raises(SpecError, match="a directory or a pipe"):
        load_device(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prefil": []}, "b.yaml: unknown key 'prefil'; did you mean 'prefill'"),
        ({"model": None}, "b.yaml: model: "),
        ({"basis": "guessed"}, "b.yaml: basis: .*'measured' or 'published'"),
        ({"prefill": []}, "b.yaml: prefill: "),
        ({"prefill": [[16, 0.02]]}, "b.yaml: prefill.0.: time 0.02 has no unit"),
        ({"prefill": [["16", "20ms"]]}, r"write \[TOKENS, TIME\]"),
        ({"prefill": [[16, "20ms", 3]]}, r"write \[TOKENS, TIME\]"),
        ({"prefill": [[True, "20ms"]]}, r"write \[TOKENS, TIME\]"),
        ({"prefill": [[0, "20ms"]]}, r"write \[TOKENS, TIME\]"),
        ({"prefill": [[16, "0s"]]}, "takes no time"),
        ({"prefill": [[16, "-1s"]]}, "is negative"),
        ({"codecs": {"int8": {"encode": [[16, "1ms"]]}}}, "b.yaml: codecs.int8: decode is missing"),
        ({"codecs": {"int8": {"encode": [[16, "1ms"], [8, "1ms"]], "decode": [[16, "1ms"]]}}}, r"codecs.int8.encode\[1\]: 8 t"),
        ({"copies": {"within": "5"}}, "copies.within: rate '5' has no unit"),
        ({"copies": {"within": "0bit"}}, "copies.within: .*is no rate of a copy"),
        ({"copies": {"sideways": "1gbit"}}, "copies"),
        ({"decode": [[16, "9ms"], [16, "8ms"]]}, r"b.yaml: decode\[1\]: 16 tokens behind 16; they must ascend"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_place(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint) as found:
        device_from({**RIGHT, **change}, "b.yaml", "b")
    assert "\n" not in str(found.value)


def test_what_is_no_mapping_or_lacks_a_key_is_refused() -> None:
    with pytest.raises(SpecError, match=r"b.yaml: expected a mapping"):
        device_from([1], "b.yaml", "b")
    with pytest.raises(SpecError, match=r"b.yaml: source is missing"):
        device_from({k: v for k, v in RIGHT.items() if k != "source"}, "b.yaml", "b")
