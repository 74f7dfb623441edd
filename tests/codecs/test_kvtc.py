"""KVTC: the best widths under a budget, in its bytes; hostile widths are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.codecs.codec import Codec, decode
from testbed.codecs.quantize.kvtc import KVTC, WIDTHS, allocated
from testbed.codecs.steps import Part
from testbed.errors import PayloadError, SpecError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.test_lowrank import DIM, HEADS, TOKENS, few_directions, forget, kept, machine

__all__ = ["machine"]  # a fixture


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_other_choice_within_the_budget_leaves_less_error(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4))
    unit = data.draw(st.integers(1, 9))
    costs = [[0, *(unit * data.draw(st.integers(1, 12)) for _ in range(2))] for _ in range(groups)]
    errors = np.array([[data.draw(st.floats(0, 100)) for _ in range(3)] for _ in range(groups)])
    budget = data.draw(st.integers(0, sum(map(max, costs)) + 3))
    found = allocated(errors, costs, budget)
    each = range(groups)
    assert sum(costs[i][found[i]] for i in each) <= budget
    least = min(
        sum(errors[i][choice] for i, choice in enumerate(choices))
        for choices in itertools.product(range(3), repeat=groups)
        if sum(costs[i][choices[i]] for i in each) <= budget
    )
    assert sum(errors[i][found[i]] for i in each) == pytest.approx(least, abs=1e-9)


def test_budgets_that_are_no_multiple_of_any_unit_are_kept_to() -> None:
    costs = [[0, 100_003 + i, 200_017 + 3 * i] for i in range(20)]
    errors = np.array([[9.0, 3.0, 1.0]] * 20)
    found = allocated(errors, costs, 1_000_000)
    assert 900_000 < sum(costs[i][choice] for i, choice in enumerate(found)) <= 1_000_000


@pytest.mark.parametrize("bits", [0.5, 1, 2, 4])
def test_a_payload_takes_its_bits_and_more_of_them_lose_less(machine: Path, bits: float) -> None:
    name, _ = kept(few_directions(1), few_directions(2), together=4)
    cache = few_directions(3)
    losses, sizes = [], []
    for each in (bits, 2 * bits):
        payload = Codec(f"kvtc(bits={each}, basis={name}, sinks=0, last=0)").encode(cache)
        off = [
            a.values.float() - b.values.float()
            for a, b in zip(decode(payload).layers, cache.layers, strict=True)
        ]
        losses.append(sum(float(x.square().sum()) for x in off))
        sizes.append(len(payload))
    assert losses[1] < losses[0]
    assert sizes[0] <= 2 * 2 * HEADS * TOKENS * DIM * bits / 8 + 250


def test_it_beats_the_same_bits_everywhere_where_variance_lies_in_few_components(machine: Path) -> None:
    name, _ = kept(few_directions(1), few_directions(2), together=4)
    cache = few_directions(3)
    mine = Codec(f"kvtc(bits=2.5, basis={name}, sinks=0, last=0)").encode(cache)
    theirs = Codec("int3").encode(cache)
    assert len(mine) < 0.7 * len(theirs)

    def lost(payload: memoryview) -> float:
        layers = zip(decode(payload).layers, cache.layers, strict=True)
        return sum(float((a.values.float() - b.values.float()).square().sum()) for a, b in layers)

    assert lost(mine) < lost(theirs)


@pytest.mark.parametrize("sinks, last", [(4, 128), (4, 20), (0, 7), (3, 0)])
def test_sinks_and_the_last_tokens_arrive_as_they_are(sinks: int, last: int) -> None:
    cache = few_directions(1)
    arrived = decode(Codec(f"kvtc(bits=1, sinks={sinks}, last={last})").encode(cache))
    first = min(sinks, TOKENS)
    start = TOKENS - min(last, TOKENS - first)
    for ours, theirs in zip(arrived.layers, cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert torch.equal(a[:, :first], b[:, :first]) and torch.equal(a[:, start:], b[:, start:])
            assert start == first or not torch.equal(a, b)


def test_coordinates_are_off_by_half_a_step_at_most() -> None:
    inner = KVTC(bits=8).inner
    z = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(1))
    part = Part(0, "keys", 2, 50, 40, "float16", 1)
    for bits in (4.0, 8.0):
        inner = KVTC(bits=bits).inner
        symbols, side = inner.encode(part, z)
        assert side is not None and len(symbols) == int(bits * z.numel() / 8)
        widths = iter(side.tolist())
        found = inner.decode(part, symbols, side)
        for head in range(2):
            for start in range(0, 40, 16):
                own, width = z[head, :, start : start + 16], next(widths)
                assert width in WIDTHS
                most = own.abs().amax(1, keepdim=True)
                step = 2 * most / ((1 << width) - 1) * 1.001 if width else 2 * most
                assert bool(((found[head, :, start : start + 16] - own).abs() <= step / 2 + 1e-6).all())


@given(st.binary(min_size=6, max_size=6), st.binary(min_size=64, max_size=64))
def test_any_widths_give_numbers_or_are_refused(side: bytes, symbols: bytes) -> None:
    part = Part(0, "keys", 2, 4, 40, "float16", 1)
    inner = KVTC(bits=1.6).inner
    assert (inner.side_bytes(part), inner.symbols(part)) == (len(side), len(symbols))
    tensors = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in (symbols, side)]
    try:
        found = inner.decode(part, *tensors)
    except PayloadError as error:
        assert str(error).startswith("kvtc: ") and "\n" not in str(error)
    else:
        assert found.shape == part.shape


def test_wrong_parameters_and_missing_bases_are_refused(machine: Path) -> None:
    with pytest.raises(SpecError, match=r"bits is 9(\.0)?, but must be from 0\.25 to 8"):
        Codec("kvtc(bits=9)")
    name, path = kept(few_directions(1))
    cache = KVCache(
        [KVLayer(*(layer.keys, layer.values, layer.positions)) for layer in few_directions(2).layers], 93
    )
    payload = Codec(f"kvtc(basis={name})").encode(cache)
    path.unlink()
    forget()
    with pytest.raises(PayloadError, match=f"the bases {name} are not on this machine"):
        decode(payload)
