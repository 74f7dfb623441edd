"""Mixed precision, and the words and files that say what is protected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import cache_format
from testbed.codecs.codec import Codec, decode
from testbed.codecs.diagnosed import FORMAT, default_path, read_places, write_places
from testbed.codecs.layout import expected_bytes
from testbed.codecs.spec import parse
from testbed.errors import PayloadError, SpecError
from tests.codecs.caches import make_cache, same_bits

places = st.sets(st.tuples(st.sampled_from(["keys", "values"]), st.integers(0, 40)))


@given(places)
def test_places_read_back_from_the_word_they_are_written_as(found: set[tuple[str, int]]) -> None:
    assert read_places(write_places(found)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "word, expected",
    [
        ("none", set()),
        ("K3", {("keys", 3)}),
        ("K3.V7.12", {("keys", 3), ("values", 7), ("keys", 12), ("values", 12)}),
        ("V0-2", {("values", 0), ("values", 1), ("values", 2)}),
    ],
)
def test_words_name_keys_values_and_ranges(word: str, expected: set[tuple[str, int]]) -> None:
    assert read_places(word) == expected
    assert read_places(write_places(read_places(word))) == expected


@pytest.mark.parametrize("word", ["K", "3K", "K3-1", "K3..V2", "Q1", "K999", "nothing"])
def test_other_words_are_refused_with_an_example(word: str) -> None:
    with pytest.raises(SpecError, match=r"write layers such as K3.V7.12"):
        parse(f"mixed(protect={word})")


def test_protected_parts_are_decoded_as_the_finer_quantizer_does() -> None:
    cache = make_cache("grouped")
    mixed = decode(Codec("mixed(low=2, high=8, protect=K1.3)").encode(cache))
    coarse, fine = decode(Codec("int2").encode(cache)), decode(Codec("int8").encode(cache))
    for i in range(4):
        assert same_bits(mixed.layers[i].keys, (fine if i in (1, 3) else coarse).layers[i].keys)
        assert same_bits(mixed.layers[i].values, (fine if i == 3 else coarse).layers[i].values)


def test_coarse_parts_may_have_a_scale_for_each_token() -> None:
    cache = make_cache("grouped")
    mixed = decode(Codec("mixed(scale=token, protect=K1)").encode(cache))
    coarse, fine = (
        decode(Codec("int4(group=0, symmetric=true)").encode(cache)),
        decode(Codec("int8").encode(cache)),
    )
    for i in range(4):
        assert same_bits(mixed.layers[i].keys, (fine if i == 1 else coarse).layers[i].keys)
        assert same_bits(mixed.layers[i].values, coarse.layers[i].values)


def test_the_published_form_keeps_protected_layers_at_their_16_bits() -> None:
    cache = make_cache("grouped")
    mixed = decode(Codec("mixed(high=16, protect=1, scale=token)").encode(cache))
    coarse = decode(Codec("int4(group=0, symmetric=true)").encode(cache))
    for i in range(4):
        assert same_bits(mixed.layers[i].keys, (cache if i == 1 else coarse).layers[i].keys)
        assert same_bits(mixed.layers[i].values, (cache if i == 1 else coarse).layers[i].values)
    layers = [(4, 128, 128, None)] * 28
    bits = [
        16
        * expected_bytes(parse(f"mixed(high=16, protect=0, scale={scale})"), layers, 4096)
        / expected_bytes(parse("fp16"), layers, 4096)
        for scale in ("token", "symmetric", "group")
    ]  # 27 layers of 4 bits and one of 16 are 4.43 without scales
    assert bits == pytest.approx([4.43 + 27 / 28 * scales for scales in (16 / 128, 0.5, 1.0)], rel=0.001)


def test_integers_of_four_bits_are_the_published_formula() -> None:
    """s = max|t| / 7 of each token and head, q = clamp(round(t / s), -8, 7)."""
    cache = make_cache("grouped")
    found = decode(Codec("int4(group=0, symmetric=true)").encode(cache)).layers[0].keys.float()
    t = cache.layers[0].keys.float()
    s = (t.abs().amax(-1, keepdim=True) / 7).half().float()
    assert torch.allclose(found, (t / s).round().clamp(-8, 7) * s, atol=1e-3, rtol=2e-3)


def diagnosis(path: Path, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "model": "some-model", "protect": "K0.V2", **changes}))
    return path


def test_a_diagnosis_file_is_read_and_the_payload_names_the_layers_itself(tmp_path: Path) -> None:
    path = diagnosis(tmp_path / "found.json")
    codec = Codec(f"mixed(protect={path})", "some-model")
    assert str(codec) == "mixed(protect=K0.V2)"
    payload = codec.encode(make_cache("grouped"))
    path.unlink()
    header, _ = cache_format.unseal(payload)
    assert header.codec == "mixed(protect=K0.V2)"
    assert decode(payload).layers[0].keys.dtype == torch.float16


def test_auto_is_the_models_own_diagnosis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match="run `testbed diagnose some-model --bits 4`"):
        Codec("mixed", "some-model")
    diagnosis(default_path("some-model", 4))
    assert str(Codec("mixed", "some-model")) == "mixed(protect=K0.V2)"
    with pytest.raises(SpecError, match="run `testbed diagnose some-model --bits 2`"):
        Codec("mixed(low=2)", "some-model")
    with pytest.raises(SpecError, match="run `testbed diagnose some-model --bits 4 --scale token`"):
        Codec("mixed(scale=token)", "some-model")
    diagnosis(default_path("some-model", 4, "token"), protect="V1")
    assert str(Codec("mixed(scale=token)", "some-model")) == "mixed(protect=V1, scale=token)"
    with pytest.raises(SpecError, match="needs to know the model"):
        Codec("mixed")


def test_a_path_as_a_models_name_stays_within_the_directory_of_diagnoses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    for name in ("../../etc/passwd", "/models/tiny", "org/name", ".."):
        assert default_path(name, 4).parent == tmp_path / "diagnoses"


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        ("no json", "not a JSON file"),
        ("[1]", "not a file that `testbed diagnose` wrote"),
        (json.dumps({"format": FORMAT}), "does not say what to protect"),
        (json.dumps({"format": FORMAT, "protect": "auto"}), "does not say what to protect"),
        (json.dumps({"format": FORMAT, "protect": "K3..4"}), "write layers such as"),
        (json.dumps({"format": FORMAT, "protect": "K3", "model": "other"}), "it is of model 'other'"),
    ],
)
def test_a_file_that_is_no_diagnosis_is_refused_in_one_line(
    tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "found.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError) as error:
        Codec(f"mixed(protect={path})", "some-model")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["auto", "/etc/passwd", "./found.json"])
def test_a_payload_that_refers_to_a_file_is_refused_and_the_file_not_read(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec
    import numpy as np

    monkeypatch.chdir(tmp_path)
    diagnosis(tmp_path / "found.json")
    header, body = cache_format.unseal(Codec("mixed(protect=K0)").encode(make_cache("grouped")))
    forged = msgspec.structs.replace(header, codec=f"mixed(protect={word})")
    payload, at = cache_format.allocate(forged, len(body))
    payload[at:] = np.frombuffer(body, dtype=np.uint8)
    with pytest.raises(PayloadError, match="refers to something outside the payload"):
        decode(cache_format.seal(payload))


def test_the_expected_size_counts_what_is_protected() -> None:
    layers = [(3, 64, 64, None)] * 30
    sizes = [
        expected_bytes(parse(f"mixed(protect={word})"), layers, 1024) for word in ("none", "0-9", "0-29")
    ]
    assert sizes[0] == pytest.approx(expected_bytes(parse("int4"), layers, 1024), rel=0.001)
    assert sizes[2] == pytest.approx(expected_bytes(parse("int8"), layers, 1024), rel=0.001)
    assert sizes[1] == pytest.approx((2 * sizes[0] + sizes[2]) / 3, rel=0.001)
