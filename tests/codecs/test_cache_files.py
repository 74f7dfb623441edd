"""Caches in files of safetensors: read as what they are, coded without a model, and written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from testbed.codecs import alone, cache_files
from testbed.codecs.codec import Codec, decode
from testbed.errors import UsageError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import CACHES, cache_of, make_cache, same_cache
from tests.command import command

CACHE = make_cache("grouped")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "cache.safetensors"
    cache_files.write(path, CACHE)
    return path


@pytest.mark.parametrize("name", [*(name for name in CACHES if name != "unlike"), "uneven"])
def test_what_is_written_is_read_to_the_bit(name: str, tmp_path: Path) -> None:
    cache_files.write(tmp_path / "file", cache_of(name))
    assert same_cache(cache_files.read(tmp_path / "file"), cache_of(name))


@st.composite
def _caches(draw: st.DrawFn) -> KVCache:
    """Random bits, NaN and infinity among them, of random shapes; each layer with positions and a window of its own."""
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16)))
    length = draw(st.integers(1, 40))
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        heads, dim, value_dim = (draw(st.integers(1, 5)) for _ in range(3))
        kept = sorted(draw(st.sets(st.integers(0, length - 1), max_size=length)))
        numbers = np.random.default_rng(draw(st.integers(0, 99)))

        def bits(*shape: int, numbers: Any = numbers) -> Tensor:
            return torch.from_numpy(numbers.integers(-(2**15), 2**15, shape, dtype=np.int16)).view(dtype)

        window = draw(st.none() | st.integers(1, 50))
        keys, values = bits(heads, len(kept), dim), bits(heads, len(kept), value_dim)
        layers.append(KVLayer(keys, values, torch.tensor(kept, dtype=torch.int64), window))
    return KVCache(layers, length)


@given(_caches())
@settings(max_examples=40, deadline=None)
def test_any_cache_survives_file_payload_and_file(cache: KVCache) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cache"
        cache_files.write(path, cache)
        payload = Codec("fp16").encode(cache_files.read(path))
        cache_files.write(path, decode(payload), {"codec": "fp16"})
        assert same_cache(cache_files.read(path), cache)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_cache_are_refused_in_one_line(data: bytes, claimed: int) -> None:
    import tempfile

    whole = save({"layers.0.keys": torch.ones(1, 2, 3).half(), "layers.0.values": torch.ones(1, 2, 3).half()})
    for bad in (data, claimed.to_bytes(8, "little") + data, whole[: len(data) % len(whole)], data + whole):
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(bad)
            try:
                assert bad == whole or cache_files.read(Path(file.name)).layers
            except UsageError as error:
                assert str(error).startswith(file.name) and "\n" not in str(error)


def _named(naming: str) -> dict[str, Tensor]:
    layers = list(enumerate(CACHE.layers))
    if naming == "stacked":
        return {
            kind: torch.stack([getattr(layer, kind) for _, layer in layers]) for kind in ("keys", "values")
        }
    return {
        naming.format(i=i, part=part): tensor[None].contiguous()
        for i, layer in layers
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }


@pytest.mark.parametrize(
    "naming",
    ["past_key_values.{i}.{part}", "present.{i}.{part}", "{part}_cache.{i}", "layers.{i}.{part}s", "stacked"],
)
def test_other_programs_namings_are_the_same_cache(naming: str, tmp_path: Path) -> None:
    save_file(_named(naming), tmp_path / "file")
    read = cache_files.read(tmp_path / "file")
    assert read.length == CACHE.layers[0].tokens
    for ours, theirs in zip(CACHE.layers, read.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert theirs.positions.tolist() == list(range(ours.tokens))


def test_numpy_alone_can_write_one(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((2, 3, 40, 16), dtype=np.float32)
    safetensors.numpy.save_file({"keys": keys, "values": 2 * keys}, tmp_path / "file")
    with pytest.raises(UsageError, match=r"float32.*--dtype"):
        cache_files.read(tmp_path / "file")
    read = cache_files.read(tmp_path / "file", torch.float16)
    assert np.array_equal(read.layers[1].values.numpy(), (2 * keys[1]).astype(np.float16))


KEYS, VALUES = torch.ones(2, 5, 8).half(), torch.ones(2, 5, 8).half()
WHOLE = {"layers.0.keys": KEYS, "layers.0.values": VALUES}
WRONG: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "no values": ({"layers.0.keys": KEYS}, {}, "layer 0 has no values"),
    "a gap": ({"layers.1.keys": KEYS, "layers.1.values": VALUES}, {}, "without a gap"),
    "another's": ({**WHOLE, "lm_head.weight": KEYS}, {}, "'lm_head.weight' is none of a cache"),
    "twice": ({**WHOLE, "key_cache.0": KEYS}, {}, "layer 0 has its keys twice"),
    "positions alone": ({"layers.0.positions": torch.arange(5)}, {}, "layer 0 has no keys"),
    "two formats": ({**WHOLE, "layers.0.values": VALUES.bfloat16()}, {}, "several number formats"),
    "integers": ({**WHOLE, "layers.0.values": VALUES.int()}, {}, "int32"),
    "a batch": ({**WHOLE, "layers.0.keys": torch.ones(2, 2, 5, 8).half()}, {}, r"not \[2, 2, 5, 8\]"),
    "fewer values": ({**WHOLE, "layers.0.values": VALUES[:, :4].contiguous()}, {}, "do not fit together"),
    "positions": ({**WHOLE, "layers.0.positions": torch.arange(4)}, {}, "do not fit together"),
    "float positions": ({**WHOLE, "layers.0.positions": torch.ones(5)}, {}, "int64 numbers, not float32"),
    "a short length": (WHOLE, {"length": "4"}, "length '4'"),
    "no length": (WHOLE, {"length": "-1"}, "length '-1'"),
    "windows": (WHOLE, {"windows": "[1, 2]"}, "windows"),
    "deep windows": (WHOLE, {"windows": "[" * 9000}, "windows"),
    "rope": (WHOLE, {"rope": "theta=nan"}, "rope 'theta=nan'"),
    "a wide rope": (WHOLE, {"rope": "theta=100,dim=10"}, "10 elements in pairs do not fit a head of 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_one_line_and_status_2(name: str, tmp_path: Path) -> None:
    tensors, told, words = WRONG[name]
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "file", told)
    with pytest.raises(UsageError, match=words):
        cache_files.read(tmp_path / "file")
    ended = command("encode", str(tmp_path / "file"), "int4")
    assert ended.status == 2 and ended.out == "" and ended.errors.count("\n") == 1


def test_positions_that_do_not_ascend_are_refused(tmp_path: Path) -> None:
    save_file({**WHOLE, "layers.0.positions": torch.tensor([0, 2, 1, 3, 4])}, tmp_path / "file")
    ended = command("encode", str(tmp_path / "file"), "int4")
    assert ended.status == 2 and "ascend" in ended.errors and ended.errors.count("\n") == 1


def test_losses_are_those_of_the_plain_formula() -> None:
    made = alone.encode(Codec("keynorm@0.5(scope=layer)+int4"), CACHE)
    for kind, loss in (("keys", made.keys), ("values", made.values)):
        own, found = [], []
        for layer, got in zip(CACHE.layers, decode(made.payload).layers, strict=True):
            row = {position: place for place, position in enumerate(layer.positions.tolist())}
            places = [row[position] for position in got.positions.tolist()]
            own.append(getattr(layer, kind)[:, places].double().flatten())
            found.append(getattr(got, kind).double().flatten())
        a, b = torch.cat(own), torch.cat(found)
        assert loss.max == (a - b).abs().max() > 0
        assert loss.relative == pytest.approx(float((a - b).norm() / a.norm()))


def test_losses_of_heads_that_keep_different_tokens_are_small() -> None:
    made = alone.encode(Codec("perhead@0.3(by=keynorm)+int8"), CACHE)
    assert 0 < made.keys.relative < 0.02 and 0 < made.values.relative < 0.02


def test_a_cache_is_encoded_decoded_and_told_of_in_json(written: Path, tmp_path: Path) -> None:
    payload, back = tmp_path / "payload", tmp_path / "back.safetensors"
    ended = command(
        "encode", str(written), "keynorm@0.5+int8", "--out", str(payload), "--json", "--repeats", "1"
    )
    assert ended.status == 0, ended.errors
    told = json.loads(ended.out)
    assert told["payload_bytes"] == payload.stat().st_size
    assert told["cache_bytes"] == 4 * 2 * 3 * 96 * 64 * 2 and told["kept_tokens"] == 48
    assert told["ratio"] == pytest.approx(told["cache_bytes"] / payload.stat().st_size)
    assert min(told[each] for each in ("select_s", "encode_s", "decode_s")) > 0

    ended = command("decode", str(payload), "--out", str(back), "--against", str(written), "--json")
    assert ended.status == 0, ended.errors
    again = json.loads(ended.out)
    assert again["codec"] == told["codec"] and again["errors"] == told["errors"]
    assert same_cache(cache_files.read(back), decode(payload.read_bytes()))


def test_both_say_it_in_lines(written: Path, tmp_path: Path) -> None:
    said = command("encode", str(written), "fp16", "--out", str(tmp_path / "p"), "--repeats", "1").out
    assert "payload" in said and "keys lost    0.000000 of their norm; 0 at most" in said
    assert f"{(tmp_path / 'p').stat().st_size} bytes" in command("decode", str(tmp_path / "p")).out


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ("q2c@0.5", "it needs the question, and a file of keys and values has none of that"),
        ("h2o@0.5", "the attention its tokens pay"),
        ("snapkv@0.5", "the context's queries"),
        ("oracle@0.5", "the gold answer"),
        ("kvzip@0.5", "the context read once more"),
        ("leverage@0.5", "rotary position embedding"),
        ("kvquant", "--rope theta=10000"),
        ("mixed", "protect=auto"),
        ("zip", "unknown method 'zip'"),
    ],
)
def test_what_needs_a_model_is_refused_by_name(codec: str, words: str, written: Path) -> None:
    ended = command("encode", str(written), codec)
    assert ended.status == 2 and words in ended.errors and ended.errors.count("\n") == 1


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_the_rope_that_is_told_is_the_one_that_keys_were_turned_by(pairs: str, tmp_path: Path) -> None:
    """Against complex numbers: keys that were one vector before each was turned are that vector again."""
    plain, angles = torch.randn(16, generator=torch.Generator().manual_seed(1)), torch.arange(64.0)[:, None]
    angles = angles * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    turning = torch.polar(torch.ones_like(angles), angles)
    turned = plain.expand(64, 16).clone()
    pair = turned[:, :8].unflatten(1, (4, 2) if pairs == "neighbours" else (2, 4))
    a, b = pair.unbind(2 if pairs == "neighbours" else 1)
    moved = torch.complex(a, b) * turning
    whole = torch.stack((moved.real, moved.imag), 2 if pairs == "neighbours" else 1).flatten(1)
    keys = torch.cat((whole, turned[:, 8:]), 1)[None].half()
    save_file({"layers.0.keys": keys, "layers.0.values": keys.clone()}, tmp_path / "file")
    layer = cache_files.read(tmp_path / "file", rope=f"theta=100,dim=8,pairs={pairs}").layers[0]
    assert layer.rope is not None
    torch.testing.assert_close(
        layer.rope.turn(layer.keys, layer.positions, back=True)[0], turned, atol=4e-3, rtol=0
    )


def test_a_file_that_is_there_is_not_written_over_and_a_wrong_payload_is_status_2(
    written: Path, tmp_path: Path
) -> None:
    before = written.read_bytes()
    ended = command("encode", str(written), "int4", "--out", str(written))
    assert ended.status == 2 and "exists" in ended.errors and written.read_bytes() == before
    ended = command("decode", str(written), "--out", str(tmp_path / "out"))
    assert (
        ended.status == 2 and "does not start with TBKV" in ended.errors and not (tmp_path / "out").exists()
    )
    ended = command("decode", "/dev/zero")
    assert ended.status == 2 and ended.errors == "testbed: /dev/zero: not a regular file\n"


def test_another_cache_is_no_reference(written: Path, tmp_path: Path) -> None:
    cache_files.write(tmp_path / "other", make_cache("multi-query"))
    assert command("encode", str(written), "int8", "--out", str(tmp_path / "p")).status == 0
    ended = command("decode", str(tmp_path / "p"), "--against", str(tmp_path / "other"))
    assert ended.status == 2 and "4 layers were decoded; the other cache has 3" in ended.errors
