"""Tables that were counted beforehand: named by their content, checked on both sides, and worth their name in bytes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs.codec import Codec, decode
from testbed.codecs.entropy import tables
from testbed.codecs.spec import parse
from testbed.diagnosis.tables import Counts, add_counts
from testbed.errors import PayloadError, SpecError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import SHAPES, make_cache, ragged_cache, same_cache


def channelled(tokens: int, seed: int) -> KVCache:
    """Two layers whose channels are of different spread, and alike from seed to seed."""
    spread = 2.0 ** torch.randint(-4, 4, (2, 1, 64), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    made = [(torch.randn(2, tokens, 64, generator=generator) * spread).half() for _ in range(4)]
    layers = [KVLayer(made[i], made[i + 1], torch.arange(tokens)) for i in (0, 2)]
    return KVCache(layers, tokens)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: where its tables are."""
    monkeypatch.setattr(tables.KEPT, "directory", lambda: tmp_path)
    tables.KEPT.known.cache_clear()
    return tmp_path


def counted(text: str, *caches: KVCache) -> tuple[str, Path]:
    counts: Counts = {}
    for cache in caches:
        add_counts(counts, Codec(text), cache)
    return tables.KEPT.save(tables.count(text, [counts[at] for at in sorted(counts)]))


@pytest.mark.parametrize("text", ["int4", "int3", "int8(group=32)", "cachegen"])
def test_tables_of_other_contexts_save_a_small_payload_its_own(machine: Path, text: str) -> None:
    name, _ = counted(text, channelled(400, 1), channelled(400, 2))
    cache = channelled(60, 3)
    payload = Codec(f"{text}+ans(table={name})").encode(cache)
    assert len(payload) < 0.98 * len(Codec(f"{text}+ans").encode(cache))
    assert same_cache(decode(payload), decode(Codec(text).encode(cache)))
    assert bytes(Codec(f"{text}+ans(table={name})").encode(channelled(60, 3))) == bytes(payload)


def test_tables_do_for_symbols_that_they_never_saw_and_for_caches_of_any_shape(machine: Path) -> None:
    constant = make_cache("grouped")
    for layer in constant.layers:
        layer.keys.fill_(1.0)
        layer.values.fill_(1.0)
    name, _ = counted("int4", constant)
    for cache in [*(make_cache(shape) for shape in SHAPES), ragged_cache()]:
        payload = Codec(f"int4+ans(table={name})").encode(cache)
        assert same_cache(decode(payload), decode(Codec("int4").encode(cache)))
        assert len(payload) <= len(Codec("int4+ans").encode(cache)) + 2 * len(cache.layers) + 48


def test_a_file_becomes_the_hash_of_what_it_says(machine: Path, tmp_path: Path) -> None:
    name, path = counted("int4", channelled(100, 1))
    elsewhere = tmp_path / "mine.tables"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    codec = Codec(f"int4+ans(table={elsewhere})")
    assert str(codec) == f"int4+ans(table={name})"
    assert path.is_file()  # where a decoder on this machine looks


def test_a_decoder_without_the_tables_refuses_them_by_name(machine: Path) -> None:
    name, path = counted("int4", channelled(100, 1))
    payload = Codec(f"int4+ans(table={name})").encode(channelled(100, 2))
    other, wrong = counted("int4", channelled(100, 7))
    path.unlink()
    tables.KEPT.known.cache_clear()
    with pytest.raises(PayloadError, match=f"the tables {name} are not on this machine"):
        decode(payload)
    path.write_bytes(wrong.read_bytes())
    with pytest.raises(PayloadError, match=f"holds the tables {other}, not {name}"):
        decode(payload)


def test_an_encoder_without_the_tables_or_their_file_says_so(machine: Path) -> None:
    with pytest.raises(SpecError, match="not on this machine"):
        Codec(f"int4+ans(table={'0' * 32})").encode(channelled(20, 1))
    with pytest.raises(SpecError, match=r"missing\.tables: No such file"):
        Codec("int4+ans(table=missing.tables)")


def test_a_payload_that_names_a_file_is_refused(machine: Path) -> None:
    from tests.codecs.test_payload import header, sealed

    with pytest.raises(PayloadError, match="refers to something outside"):
        decode(sealed(header(codec="fp16+ans(table=/etc/passwd)", coded=[48, 48]), bytes(96)))


@given(st.binary(max_size=200))
def test_any_bytes_as_a_file_are_tables_or_one_line(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(SpecError) as error:
            tables.KEPT.load(Path(file.name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, says",
    [
        ((4, 1, 2, bytes([255] * 31)), "another number"),
        ((4, 1, 2, bytes([255] * 31 + [0])), "nobody counts"),
        ((4, 1, 2, bytes([254] * 32)), "nobody counts"),
        ((8, 1024, 1 << 14, b""), "another number"),
        ((9, 1, 1, b""), "<= 8"),
    ],
)
def test_a_file_of_other_frequencies_than_are_counted_is_refused(
    tmp_path: Path, part: tuple[object, ...], says: str
) -> None:
    path = tmp_path / "made.tables"
    path.write_bytes(msgspec.msgpack.encode((tables.FORMAT, "", [part])))
    with pytest.raises(SpecError, match=says):
        tables.KEPT.load(path)
    path.write_bytes(b"\0" * ((64 << 20) + 1))
    with pytest.raises(SpecError, match="larger than"):
        tables.KEPT.load(path)


def test_what_both_sides_must_have_beforehand_is_counted_and_named_by_its_content(machine: Path) -> None:
    name, path = counted("int4", channelled(400, 1))
    by_file, by_name = (parse(f"int4+ans(table={word})").bound() for word in (path, name))
    assert str(by_file) == str(by_name) == f"int4+ans(table={name})"
    assert by_file.shared_bytes == path.stat().st_size > 2 * 4 * 64 * 16
    for text in ("int4+ans", "mixed(protect=K0)", "kvquant+zstd", "q2c@0.5"):
        assert parse(text).shared_bytes == 0
    with pytest.raises(SpecError, match="are not on this machine"):
        parse(f"int4+ans(table={'0' * 32})").shared_bytes  # noqa: B018
