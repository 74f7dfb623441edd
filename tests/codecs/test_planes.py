"""Bit planes: every beginning of a payload is a coarser cache, or says which plane is missing."""

from __future__ import annotations

import random
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import cache_format
from testbed.codecs.codec import Beginning, Codec, Decoder, decode
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache
from tests.codecs.caches import CACHES, cache_of, make_cache, same_cache
from tests.codecs.test_quantizers import group_bounds

TEXTS = ("planes", "planes(bits=3, group=0)", "planes(bits=2)+zstd")


def small_cache() -> KVCache:
    """One layer of few elements, so that every byte's turn comes soon."""
    layer = make_cache("odd dimensions").layers[0].slice(0, 6)
    return KVCache([layer], int(layer.positions[-1]) + 1)


def base_bytes(payload: bytes) -> int:
    """Header, scales and positions: what the prefix says."""
    return int(struct.unpack_from("<Q", payload, 12)[0])


def decode_beginning(payload: bytes | bytearray | memoryview) -> Beginning:
    decoder = Decoder()
    decoder.feed(payload)
    return decoder.ready()


def beginning(payload: bytes | memoryview) -> Beginning | str:
    try:
        return decode_beginning(payload)
    except PayloadError as error:
        return str(error)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", CACHES)
def test_a_whole_payload_is_as_good_as_the_integers(bits: int, name: str) -> None:
    cache = cache_of(name)
    for coder in ("", "+zstd"):
        payload = Codec(f"planes(bits={bits}){coder}").encode(cache)
        expected = decode(Codec(f"int{bits}(group=32, symmetric=false)").encode(cache))
        assert same_cache(decode(payload), expected)
        whole = decode_beginning(payload)
        assert (whole.planes, whole.of, whole.missing) == (bits, bits, "")


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_a_payload_cut_at_every_byte_decodes_or_says_what_is_missing(text: str) -> None:
    cache = small_cache()
    payload = bytes(Codec(text).encode(cache))
    bits = Codec(text).quantizer.bits  # type: ignore[attr-defined]
    planes, errors = [], []
    for length in range(len(payload)):
        found = beginning(payload[:length])
        if isinstance(found, str):
            assert not planes  # once a first plane was there, every longer beginning decodes
            assert "\n" not in found
            if length >= base_bytes(payload):
                assert re.match(rf"plane 1 of {bits} is missing: \d+ of its \d+ bytes arrived", found)
        else:
            planes.append(found.planes)
            errors.append(
                max(
                    float((a.keys.double() - b.keys.double()).abs().max())
                    for a, b in zip(found.cache.layers, cache.layers, strict=True)
                )
            )
            assert found.missing.startswith(f"plane {found.planes + 1} of {bits} is missing")
            assert same_positions(found.cache, cache)
        with pytest.raises(PayloadError):
            decode(payload[:length])
    assert planes == sorted(planes)
    assert set(planes) == set(range(1, bits))
    assert errors[-1] <= errors[0]


def same_positions(a: KVCache, b: KVCache) -> bool:
    return all(torch.equal(x.positions, y.positions) for x, y in zip(a.layers, b.layers, strict=True))


def cut_after(payload: bytes, planes: int, cache: KVCache) -> bytes:
    """The payload's beginning with that many whole planes: shapes say how long an uncoded plane is."""
    size = sum(-(-x.numel() // 8) for layer in cache.layers for x in (layer.keys, layer.values))
    return payload[: base_bytes(payload) + planes * (size + 8 * -(-size // (1 << 14)))]


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (3, 0)])
@pytest.mark.parametrize("name", [name for name in CACHES if name != "no tokens"])
def test_each_plane_halves_the_bound(bits: int, group: int, name: str) -> None:
    """With k of B planes an element is the middle of 2^(B-k) levels: off by at most that many half steps and its own half."""
    cache = cache_of(name)
    payload = bytes(Codec(f"planes(bits={bits}, group={group})").encode(cache))
    mean_errors = []
    for planes in range(1, bits + 1):
        found = decode_beginning(cut_after(payload, planes, cache))
        assert found.planes == planes
        total, count = 0.0, 0
        for ours, theirs in zip(found.cache.layers, cache.layers, strict=True):
            for x, back in ((theirs.keys, ours.keys), (theirs.values, ours.values)):
                if not x.numel():
                    continue
                final = group_bounds(x, bits, group, False, "token")
                # the final bound holds half a step; so many more steps may the middle be off, and be rounded with 16 bits
                unsure = 2.0 ** (bits - planes - 1) if planes < bits else 0.0
                bound = final * (1 + 2 * unsure) + 2 * torch.finfo(x.dtype).eps * x.double().abs().amax()
                assert bool(((back.double() - x.double()).abs() <= bound).all())
                total, count = total + float((back.double() - x.double()).abs().sum()), count + x.numel()
        mean_errors.append(total / count)
    assert mean_errors == sorted(mean_errors, reverse=True)


def test_a_plane_that_arrived_in_part_refines_the_elements_it_reaches() -> None:
    cache = make_cache("multi-head bf16")
    cache = KVCache(cache.layers * 2, cache.length)  # 204,800 elements: a plane is 25,600 bytes in two chunks
    payload = bytes(Codec("planes").encode(cache))
    two, three = (decode_beginning(cut_after(payload, n, cache)) for n in (2, 3))
    between = decode_beginning(cut_after(payload, 3, cache)[:-1])
    assert between.planes == 2
    assert between.missing == "plane 3 of 8 is missing: 16384 of its 25600 bytes arrived"
    early, late = between.cache.layers[0].keys, between.cache.layers[3].values
    assert torch.equal(early, three.cache.layers[0].keys)
    assert torch.equal(late, two.cache.layers[3].values)


@pytest.mark.parametrize("text", TEXTS)
def test_every_flipped_bit_behind_the_header_is_noticed(text: str) -> None:
    payload = bytes(Codec(text).encode(small_cache()))
    for bit in range(8 * base_bytes(payload), 8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            decode(flipped)


def test_chunks_cannot_change_places() -> None:
    cache = make_cache("odd dimensions")
    payload = bytes(Codec("planes").encode(cache))
    ends = [len(cut_after(payload, planes, cache)) for planes in range(4)]
    swapped = (
        payload[: ends[1]] + payload[ends[2] : ends[3]] + payload[ends[1] : ends[2]] + payload[ends[3] :]
    )
    with pytest.raises(PayloadError, match="plane 2: a chunk's checksum is wrong"):
        decode_beginning(swapped)


@given(st.sampled_from(TEXTS), st.randoms(use_true_random=False))
def test_changed_headers_under_a_right_checksum_never_crash(text: str, random: random.Random) -> None:
    payload = bytes(Codec(text).encode(make_cache("odd dimensions")))
    split = base_bytes(payload)
    base, rest = np.frombuffer(payload[:split], dtype=np.uint8).copy(), payload[split:]
    for _ in range(random.randrange(1, 4)):
        base[random.randrange(24, split)] = random.choice([0, 1, 0x7F, 0xFF, random.randrange(256)])
    found = beginning(bytes(cache_format.seal(base)) + rest[: random.randrange(len(rest) + 1)])
    assert isinstance(found, str) or found.cache.layers


@pytest.mark.parametrize("text", TEXTS)
def test_a_decoder_has_one_more_plane_ready_with_each_chunk(text: str) -> None:
    cache = make_cache("grouped")
    base, *planes = Codec(text).chunks(cache)
    assert b"".join([base, *planes]) == Codec(text).encode(cache)
    decoder = Decoder()
    decoder.feed(base)
    with pytest.raises(PayloadError, match="plane 1"):
        decoder.ready()
    for number, plane in enumerate(planes, 1):
        half = len(plane) // 2
        decoder.feed(plane[:half])
        decoder.feed(plane[half:])
        assert (decoder.ready().planes, decoder.ready().of) == (number, len(planes))
    assert same_cache(decoder.finish(), decode(Codec(text).encode(cache)))


def test_other_payloads_have_no_beginnings() -> None:
    payload = bytes(Codec("int4").encode(make_cache("grouped")))
    assert same_cache(decode_beginning(payload).cache, decode(payload))
    for cut in (10, 100, len(payload) - 1):
        with pytest.raises(PayloadError):
            decode_beginning(payload[:cut])


def test_selection_and_planes_go_together() -> None:
    cache = make_cache("grouped")
    payload = bytes(Codec("window@0.5+planes+zstd").encode(cache))
    assert decode_beginning(payload[:-1]).planes == 7
    assert decode(payload).layers[0].tokens == 96
