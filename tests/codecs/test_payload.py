"""Bytes from the network: whatever they are, a cache or a PayloadError, and no more memory than they justify."""

from __future__ import annotations

import functools
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import cache_format
from testbed.codecs.cache_format import CacheShape, Header, LayerGroup, PositionList
from testbed.codecs.codec import Codec, decode
from testbed.codecs.layout import lay_out
from testbed.errors import PayloadError
from testbed.models.kvcache import EMPTY, KVCache
from tests.codecs.caches import make_cache, ragged_cache, same_cache, uneven_cache

#: What bytes under a right checksum may do depends on each of these; what a checksum stops does not, but for planes.
SEALED = ("fp16", "int4+zstd", "planes(bits=3)")
CODECS = (
    "fp16",
    "int8",
    "int4",
    "int3(axis=channel)",
    "int4+zstd",
    "fp16+zstd",
    "fp8",
    "kivi(residual=3)",
    "normsep",
    "turbo+zstd",
    "kvquant(outliers=0.1)",
    "mixed(protect=K0.V1)",
    "planes(bits=3)",
    "cachegen(anchor=3)",
    "int4+ans",
    "int4+ans(tables=channel)",
    "fp16+ans",
    "int8+lz4",
    "delta+int4+ans",
)


@functools.cache
def payload(text: str, ragged: bool = False) -> bytes:
    """A small payload; ragged: of layers and heads that hold different tokens, and different numbers of them."""
    layers = [*ragged_cache().layers, *uneven_cache().layers]
    return bytes(Codec(text).encode(KVCache(layers, 200) if ragged else make_cache("odd dimensions")))


def refused(data: bytes | bytearray | memoryview) -> str:
    with pytest.raises(PayloadError) as error:
        decode(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


def sealed(header: Header, body: bytes) -> bytes:
    """A payload whose checksum is right."""
    made, at = cache_format.allocate(header, len(body))
    made[at:] = np.frombuffer(body, dtype=np.uint8)
    return bytes(cache_format.seal(made))


def header(**changes: object) -> Header:
    """Of one fp16 layer of 2 heads, 3 tokens, 4 dimensions: 96 bytes."""
    group = LayerGroup(1, 2, 3, 4, 4, None, [0])
    usual = Header("fp16", 100, "float16", [group], [PositionList(0, 7, 0)], [], 0)
    return msgspec.structs.replace(usual, **changes)


def test_the_hand_made_payload_is_decoded() -> None:
    cache = decode(sealed(header(), bytes(96)))
    assert cache.length == 100
    assert cache.layers[0].positions.tolist() == [7, 8, 9]
    assert cache.layers[0].keys.shape == (2, 3, 4)


@pytest.mark.parametrize("text", SEALED)
def test_every_flipped_bit_is_noticed(text: str) -> None:
    whole = payload(text)
    step = 1 if len(whole) < 1500 else 7
    for bit in range(0, 8 * len(whole), step):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(flipped)


@pytest.mark.parametrize("text", SEALED)
def test_every_truncation_and_every_extension_is_noticed(text: str) -> None:
    whole = payload(text)
    for length in range(len(whole)):
        refused(whole[:length])
    refused(whole + b"\0")
    refused(whole + whole)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)
    refused(
        cache_format.MAGIC
        + struct.pack("<HHIQI", 1, 0, min(20, len(data)), 24 + len(data), zlib.crc32(data))
        + data
    )


@given(st.sampled_from(CODECS), st.booleans(), st.randoms(use_true_random=False))
def test_changed_bytes_under_a_right_checksum_never_crash(
    text: str, ragged: bool, random: random.Random
) -> None:
    """What a checksum does not stop: an attacker's payload. Header, scales, symbols and positions are all met."""
    damaged = np.frombuffer(payload(text, ragged), dtype=np.uint8).copy()
    header_end = 24 + int(damaged[8:12].view("<u4")[0])
    for _ in range(random.randrange(1, 5)):
        start, stop = random.choice([(24, header_end), (24, header_end), (header_end, len(damaged))])
        damaged[random.randrange(start, stop)] = random.choice([0, 1, 0x7F, 0xFF, random.randrange(256)])
    try:
        cache = decode(cache_format.seal(damaged))
    except PayloadError as error:
        assert "\n" not in str(error)
    else:
        assert_sound(cache)
        assert cache.nbytes <= 64 * 4 * len(damaged)


numbers = st.integers(-2, 20) | st.sampled_from([2**16, 2**22, 2**31, 2**32 - 1, 2**63 - 1])
lists = st.lists(numbers, max_size=3)
groups = st.tuples(numbers, numbers, numbers, numbers, numbers, st.none() | numbers, lists)
codes = st.tuples(numbers, numbers, numbers)
codecs = st.sampled_from([*CODECS, "nonsense", "q2c@0.5+int4", "zstd"])
formats = st.sampled_from(["float16", "bfloat16", "float64"])
headers = st.tuples(
    codecs, numbers, formats, st.lists(groups, max_size=3), st.lists(codes, max_size=3), lists, numbers
)


@given(headers, st.binary(max_size=300))
def test_any_header_is_checked_against_the_bytes_behind_it(fields: tuple[object, ...], body: bytes) -> None:
    packed = msgspec.msgpack.encode(fields)
    gap = -(24 + len(packed)) % 8
    total = 24 + len(packed) + gap + len(body)
    prefix = struct.pack("<4sHHIQI", cache_format.MAGIC, cache_format.VERSION, 0, len(packed), total, 0)
    made = np.frombuffer(prefix + packed + bytes(gap) + body, dtype=np.uint8).copy()
    try:
        cache = decode(cache_format.seal(made))
    except PayloadError:
        return
    assert_sound(cache)
    assert cache.nbytes <= 64 * 4 * len(made)


def assert_sound(cache: KVCache) -> None:
    """What a model relies on."""
    for layer in cache.layers:
        heads, tokens = layer.keys.shape[:2]
        assert layer.values.shape[:2] == (heads, tokens)
        assert layer.positions.shape in ((tokens,), (heads, tokens))
        for row in layer.positions.expand(heads, -1) if layer.counts else [layer.positions]:
            held = row[row != EMPTY] if layer.counts else row
            assert bool((held.diff(dim=-1) > 0).all())
            assert not held.numel() or 0 <= int(held.min()) <= int(held.max()) < cache.length


def huge(**changes: object) -> Header:
    group = LayerGroup(512, 1024, 1 << 22, 1 << 14, 1 << 14, None, [0])
    return header(groups=[group], length=1 << 22, **changes)


FORGED = {
    "shapes beyond the bytes": (huge(), bytes(96), "the header's shapes take"),
    "coded parts beyond their bytes": (
        huge(codec="fp16+zstd", coded=[1 << 41] * 1024),
        bytes(96),
        "the header's shapes take",
    ),
    "parts said to shrink without bound": (
        header(
            codec="fp16+zstd",
            groups=[LayerGroup(1, 1, 1 << 22, 1, 1, None, [0])],
            length=1 << 22,
            coded=[48, 48],
        ),
        bytes(96),
        "more bytes than any encoder writes",
    ),
    "too many layers": (header(groups=[LayerGroup(512, 1, 0, 1, 1, None, [0])] * 2), b"", "1024 layers"),
    "positions past the length": (header(length=9), bytes(96), "behind the 9 tokens"),
    "a list that is not there": (header(lists=[]), bytes(96), "position lists for a layer"),
    "another number of lists than heads": (
        header(groups=[LayerGroup(1, 2, 3, 4, 4, None, [0, 0, 0])]),
        bytes(96),
        "3 position lists for a layer of 2 heads",
    ),
    "an unknown codec": (header(codec="fp17"), bytes(96), "unknown method 'fp17'"),
    "a bitmap of other tokens": (
        header(lists=[PositionList(1, 7, 1)]),
        bytes(96) + b"\xff",
        "holds 9 tokens instead of 3",
    ),
    "bytes of a transform without one": (header(transform_bytes=4), bytes(100), "transform"),
    "coded parts without a coder": (header(coded=[48, 48]), bytes(96), "2 coded parts in a payload"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_is_refused_before_memory_is_taken(name: str) -> None:
    forged, body, says = FORGED[name]
    data = sealed(forged, body)
    tracemalloc.start()
    try:
        assert says in refused(data)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def bomb(frame: bytes, tokens: int) -> bytes:
    """fp16+zstd, keys and values of `tokens` × 1, each coded as `frame`."""
    shape = LayerGroup(1, 1, tokens, 1, 1, None, [0])
    coded = header(codec="fp16+zstd", groups=[shape], length=tokens + 8, coded=[len(frame)] * 2)
    return sealed(coded, frame * 2)


def test_a_compression_bomb_is_refused() -> None:
    plain = bytes(2_000_000)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(plain)
    sized = zstandard.ZstdCompressor(write_content_size=True).compress(plain)
    assert "more bytes than any encoder writes" in refused(bomb(unsized, 1_000_000))
    tokens = 30 * len(unsized)  # within the bound on the header; the frame holds far more
    assert "zstd" in refused(bomb(unsized, tokens))
    assert "no encoder of ours" in refused(bomb(sized, 30 * len(sized)))
    assert "zstd" in refused(bomb(b"not zstd at all!", 100))


def test_a_constant_cache_shrinks_only_as_far_as_decoders_accept() -> None:
    cache = make_cache("grouped")
    for layer in cache.layers:
        layer.keys.fill_(1.0)
        layer.values.fill_(-2.0)
    assert same_cache(decode(Codec("fp16+zstd").encode(cache)), cache)
    assert same_cache(decode(Codec("int4+zstd").encode(cache)), decode(Codec("int4").encode(cache)))


@pytest.mark.slow
def test_decoding_takes_memory_in_proportion_to_the_cache() -> None:
    """In a process of its own: peak resident memory while 40 MB of forged and true payloads are decoded."""
    program = (
        "import resource, torch\n"
        "from tests.codecs.test_payload import sealed, huge, refused\n"
        "from testbed.codecs.codec import Codec; from testbed.codecs.codec import decode\n"
        "from testbed.models.kvcache import KVCache; from testbed.models.kvcache import KVLayer\n"
        "layers = [KVLayer(torch.ones(4, 1000, 64).half(), torch.ones(4, 1000, 64).half(), torch.arange(1000))] * 20\n"
        "payload = bytes(Codec('fp16').encode(KVCache(layers, 1000)))\n"
        "decode(payload)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(5): decode(payload)\n"
        "refused(sealed(huge(), bytes(1_000_000)))\n"
        "print(len(payload) // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    size, grown = map(int, output.split())
    assert grown < 2 * size


#: Forged payloads of 2 MB: how each asks for memory that its bytes do not justify. Layers of one head and one element would.
DEMANDS = {
    "a range of positions for each head": (
        {"codec": "int2(axis=channel, group=0)+zstd", "length": 1 << 22},
        lambda: [LayerGroup(1, 60, 1 << 21, 1, 1, None, list(range(60)))],
        lambda: [PositionList(0, i, 0) for i in range(60)],
        b"",
    ),
    "a range of positions for each layer": (
        {"codec": "int2(axis=channel, group=0)+zstd", "length": 1 << 22},
        lambda: [LayerGroup(1, 1, 1 << 18, 1, 1, None, [i]) for i in range(512)],
        lambda: [PositionList(0, i, 0) for i in range(512)],
        b"",
    ),
    "one list for many heads": (
        {"codec": "int2(axis=channel, group=0)+zstd", "length": 1 << 22},
        lambda: [LayerGroup(1, 500, 1 << 18, 1, 1, None, [0] * 499 + [1])],
        lambda: [PositionList(2, 0, (1 << 18) - 1), PositionList(0, 0, 0)],
        bytes((1 << 18) - 1),
    ),
    "a bitmap of more than it should hold": (
        {"codec": "fp16", "length": 1 << 22},
        lambda: [LayerGroup(1, 1, 2, 1, 1, None, [0])],
        lambda: [PositionList(1, 0, 2_000_000)],
        b"\xff" * 2_000_000,
    ),
}


def demanding(name: str) -> bytes:
    """The payload of about 2 MB with a right checksum."""
    fields, groups, lists, positions = DEMANDS[name]
    made = header(**fields, groups=groups(), lists=lists())
    codec = Codec(made.codec)
    layout = lay_out(made.parts(), codec.quantizer)
    coded = [-(-piece.symbol_bytes // 64) for piece in layout.pieces] if codec.coder else []
    symbols = sum(coded) if coded else layout.symbol_bytes
    return sealed(msgspec.structs.replace(made, coded=coded), bytes(layout.side_bytes + symbols) + positions)


@pytest.mark.parametrize("name", DEMANDS)
def test_positions_take_no_more_memory_than_the_payload_justifies(name: str) -> None:
    """In a process of its own: the peak of resident memory while a forged payload is refused."""
    program = (
        "import resource, sys, torch\n"
        "from tests.codecs.test_payload import demanding, payload, refused\n"
        "from testbed.codecs.codec import decode\n"
        "decode(payload('int4+zstd')), decode(payload('fp16'))\n"
        "made = demanding(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(refused(made), file=sys.stderr)\n"
        "print(len(made) // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = [sys.executable, "-c", program, name]
    output = subprocess.run(run, capture_output=True, text=True, check=True, timeout=100).stdout
    size, grown = map(int, output.split())
    assert size < 4_000
    assert grown < 64 * size


def test_a_payload_of_another_model_is_refused_before_its_parts_are_read() -> None:
    cache = make_cache("sliding layers")
    shape = CacheShape(tuple((1, 64, 64, layer.window) for layer in cache.layers), cache.length)
    good = bytes(Codec("int4+zstd").encode(cache))
    assert same_cache(decode(good, "cpu", shape), decode(good))
    others = [
        replace(shape, length=cache.length - 1),
        replace(shape, layers=shape.layers[1:]),
        replace(shape, layers=((2, 64, 64, 24), *shape.layers[1:])),
        replace(shape, layers=((1, 64, 64, None), *shape.layers[1:])),
        replace(shape, layers=((1, 64, 65, 24), *shape.layers[1:])),
    ]
    made, body = cache_format.unseal(memoryview(good))
    broken = sealed(made, b"\xaa" * len(body))  # which would be refused for another reason, were it read
    for other in others:
        for data in (good, broken):
            with pytest.raises(PayloadError, match="another model's cache"):
                decode(data, "cpu", other)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_like_object_is_decoded_and_left_alone(kind: type) -> None:
    data = kind(bytearray(payload("fp16")))
    cache = decode(data)
    cache.layers[0].keys.zero_()
    assert bytes(data) == payload("fp16")


def test_a_payload_at_an_odd_address_is_decoded() -> None:
    shifted = memoryview(b"x" + payload("int8"))[1:]
    assert same_cache(decode(shifted), decode(payload("int8")))


@pytest.mark.parametrize("text", ["fp16", "int8", "int4(group=32)", "int4+zstd"])
def test_heads_of_different_numbers_of_tokens_cross_as_each_of_them_alone(text: str) -> None:
    cache, codec = uneven_cache(), Codec(text)
    payload = codec.encode(cache)
    # Only tokens that are there become bytes: five heads' worth in either uneven layer, at two bytes an element or less.
    assert len(payload) <= len(codec.encode(KVCache([cache.layers[1]], 200))) + 2 * 5 * 128 * 2 + 512
    decoded = decode(payload)
    for before, after in zip(cache.layers, decoded.layers, strict=True):
        assert torch.equal(before.positions, after.positions) and before.counts == after.counts
        for head in range(3):
            held = before.positions.expand(3, -1)[head] != EMPTY
            alone = replace(
                before,
                keys=before.keys[head : head + 1, held],
                values=before.values[head : head + 1, held],
                positions=before.positions.expand(3, -1)[head, held],
            )
            expected = decode(codec.encode(KVCache([alone], 200))).layers[0]
            assert torch.equal(after.keys[head, held], expected.keys[0])
            assert torch.equal(after.values[head, held], expected.values[0])
            assert not after.keys[head, ~held].any()


def test_the_checksum_does_not_depend_on_how_many_threads_sum_it() -> None:
    torch.manual_seed(0)
    large = np.frombuffer(torch.rand(2_000_000).numpy().tobytes(), dtype=np.uint8).copy()
    sums, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums.append(bytes(cache_format.seal(large)[:24]))
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1]
