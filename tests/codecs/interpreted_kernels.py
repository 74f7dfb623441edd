"""The GPU's kernels against the processor's loops, in Triton's interpreter. `test_gpu_kernels` runs this in its own process."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.fast import batch, beginnings
from testbed.codecs.fast.beginnings import Reader, Writer
from testbed.codecs.layout import Part, lay_out
from testbed.codecs.quantize import Quantizer, batch_triton
from testbed.codecs.quantize.batch_triton import OnGPU
from testbed.codecs.quantize.integer import INTEGERS, Int4, Int8
from testbed.codecs.quantize.loops import OnProcessor
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import SHAPES, make_cache

CPU = torch.device("cpu")
batch_triton._TILE = 4096  # the interpreter takes time for each program


class Interpreted(OnGPU):
    """The GPU's loops, which count the parts they are given."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.encoded = self.decoded = 0

    def encode(self, dtype: str, table: batch.Table) -> np.ndarray:
        self.encoded += len(table)
        return super().encode(dtype, table)

    def decode(self, dtype: str, table: batch.Table) -> np.ndarray:
        self.decoded += len(table)
        return super().decode(dtype, table)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    """Parts on the processor go through the GPU's kernels; how many did is not none."""
    loops = Interpreted()
    monkeypatch.setattr(beginnings, "loops_for", lambda device: loops)
    monkeypatch.setattr(batch_triton, "_agrees", lambda *which: True)
    yield loops


def cache_of(layers: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    """Gaussian, with channels far from zero, and tokens of very different size: some of them all zeros."""
    generator = torch.Generator().manual_seed(heads * tokens + head_dim)

    def values() -> torch.Tensor:
        noise = torch.randn(heads, tokens, head_dim, generator=generator)
        offset = 3 * torch.randn(heads, 1, head_dim, generator=generator)
        size = torch.randint(-20, 8, (1, tokens, 1), generator=generator)
        return ((noise + offset).ldexp(size) * (size < 7)).to(dtype)

    made = [KVLayer(values(), values(), torch.arange(tokens)) for _ in range(layers)]
    return KVCache(made, tokens)


def written(quantizer: Quantizer, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Side information, packed symbols and what they decode to, through Writer and Reader."""
    heads, tokens, head_dim = cache.layers[0].keys.shape
    dtype = str(cache.dtype).removeprefix("torch.")
    kinds = [(i, kind) for i in range(len(cache.layers)) for kind in ("keys", "values")]
    layout = lay_out([Part(i, kind, heads, tokens, head_dim, dtype) for i, kind in kinds], quantizer)
    side = torch.full((layout.side_bytes,), 0xEE, dtype=torch.uint8)
    packed = torch.full((layout.symbol_bytes,), 0xEE, dtype=torch.uint8)
    every = range(len(layout.pieces))
    Writer(quantizer, cache, layout, side, packed).write(every)
    reader = Reader(quantizer, layout, side, cache.dtype, CPU)
    pieces = layout.pieces
    reader.read(every, lambda i: (packed[pieces[i].symbols_at :][: pieces[i].symbol_bytes], True))
    return side, packed, reader.targets


def assert_same(quantizer: Quantizer, cache: KVCache, kernels: Interpreted, taken: bool = True) -> None:
    """Byte for byte what the processor's loops write and read; `taken`: and all of it by the kernels."""
    side, packed, values = written(quantizer, cache)
    many = 2 * len(cache.layers) if taken else 0
    assert (kernels.encoded, kernels.decoded) == (many, many)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "loops_for", lambda device: OnProcessor())
        expected = written(quantizer, cache)
    assert torch.equal(side, expected[0]) and torch.equal(packed, expected[1])
    for ours, theirs in zip(values, expected[2], strict=True):
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", INTEGERS)
@pytest.mark.parametrize(
    ("heads", "tokens", "head_dim", "group"),
    [(3, 4, 64, 32), (4, 2, 64, 64), (8, 3, 80, 16), (8, 1, 128, 32), (1, 8, 576, 0)],
)
def test_bytes_and_values_are_those_of_the_processors_loops(
    kernels: Interpreted, heads: int, tokens: int, head_dim: int, group: int, bits: int, symmetric: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    quantizer = INTEGERS[bits](group=group, symmetric=symmetric)
    assert_same(quantizer, cache_of(1, heads, tokens, head_dim, dtype), kernels)


@pytest.mark.parametrize("text", ["int4", "int8"])
def test_a_small_models_whole_cache_goes_through_one_launch_each_way(
    kernels: Interpreted, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    launches: list[str] = []
    launch = batch_triton._launch
    monkeypatch.setattr(
        batch_triton,
        "_launch",
        lambda kernel, *rest: launches.append(kernel.__name__) or launch(kernel, *rest),
    )
    assert_same(Codec(text).quantizer, cache_of(12, 3, 3, 64, torch.float16), kernels)
    assert launches == ["encode", "decode"]


def test_a_part_that_fills_many_programs_and_half_of_a_last_one_is_whole(
    kernels: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_triton, "_TILE", 128)
    batch_triton._constants.cache_clear()
    for bits in INTEGERS:
        kernels.encoded = kernels.decoded = 0
        assert_same(INTEGERS[bits](), cache_of(1, 8, 3, 64, torch.float16), kernels)
    batch_triton._constants.cache_clear()


def test_parts_of_several_widths_take_a_launch_each(kernels: Interpreted) -> None:
    assert_same(
        Codec("mixed(low=4, high=8, protect=K0.V1)").quantizer, cache_of(3, 2, 9, 64, torch.bfloat16), kernels
    )


def test_a_part_whose_halves_do_not_end_with_a_group_is_left_to_torch(kernels: Interpreted) -> None:
    assert_same(Int4(group=0), cache_of(2, 3, 7, 64, torch.float16), kernels, taken=False)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("text", ["int4", "int8+zstd"])
def test_payloads_are_those_of_the_processors_loops(kernels: Interpreted, name: str, text: str) -> None:
    cache = make_cache(name)
    payload = Codec(text).encode(cache)
    decoded = decode(payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "loops_for", lambda device: OnProcessor())
        assert bytes(payload) == bytes(Codec(text).encode(cache))
        expected = decode(payload)
    for ours, theirs in zip(decoded.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@settings(max_examples=8)
@given(data=st.data(), bits=st.sampled_from(list(INTEGERS)), symmetric=st.booleans(), half=st.booleans())
def test_any_finite_bits_quantize_and_return_as_on_the_processor(
    data: st.DataObject, bits: int, symmetric: bool, half: bool
) -> None:
    size, groups, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3)), 8
    dtype = torch.float16 if half else torch.bfloat16
    drawn = data.draw(st.binary(min_size=2 * size, max_size=2 * size * groups * rows))
    room = np.resize(np.frombuffer(drawn[: len(drawn) // 2 * 2], dtype=np.int16), rows * groups * size)
    values = torch.from_numpy(room.copy()).view(dtype).nan_to_num(0.0, 0.0, 0.0)
    part = Part(0, "keys", 1, rows, groups * size, str(dtype).removeprefix("torch."))
    quantizer = INTEGERS[bits](group=size if size > 1 else 0, symmetric=symmetric)
    if quantizer.uniform(part) is None:
        return
    piece = lay_out([part], quantizer).pieces[0]
    found = []
    for loops in (OnProcessor(), OnGPU(CPU)):
        side = torch.zeros(piece.side_bytes, dtype=torch.uint8)
        packed = torch.zeros(piece.symbol_bytes, dtype=torch.uint8)
        table = np.array([batch.row_of(piece, quantizer)])
        table[0, :3] = values.data_ptr(), side.data_ptr(), packed.data_ptr()
        worst = loops.encode(part.dtype, table)
        decoded = torch.zeros_like(values)
        table[0, batch.VALUES] = decoded.data_ptr()
        fits = loops.decode(part.dtype, table)
        found.append(
            (
                side,
                packed,
                torch.from_numpy(worst),
                decoded.view(torch.int16) if fits else side,
                torch.from_numpy(fits),
            )
        )
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


@settings(max_examples=8)
@given(
    side=st.binary(min_size=64, max_size=64), symbols=st.binary(min_size=64, max_size=64), half=st.booleans()
)
def test_any_payload_decodes_or_is_left_to_torch_as_on_the_processor(
    side: bytes, symbols: bytes, half: bool
) -> None:
    part = Part(0, "keys", 1, 4, 32, "float16" if half else "bfloat16")
    quantizer = Int4(group=8)
    piece = lay_out([part], quantizer).pieces[0]
    given_side, given_symbols = bytearray(side), bytearray(symbols)
    table = np.array([batch.row_of(piece, quantizer)])
    found = []
    for loops in (OnProcessor(), OnGPU(CPU)):
        values = np.zeros(part.elements, dtype=np.int16)
        rooms = [np.frombuffer(room, dtype=np.uint8) for room in (given_side, given_symbols)]
        table[0, :3] = values.ctypes.data, rooms[0].ctypes.data, rooms[1].ctypes.data
        fits = loops.decode(part.dtype, table)
        found.append((bool(fits[0]), torch.from_numpy(values).view(getattr(torch, part.dtype))))
    (their_fit, theirs), (our_fit, ours) = found
    assert their_fit == our_fit
    if our_fit:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantizer", [Int4(), Int8(), Int4(symmetric=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_finite_is_refused_by_layer(
    kernels: Interpreted, wrong: float, quantizer: Quantizer, dtype: torch.dtype
) -> None:
    cache = cache_of(3, 2, 5, 64, dtype)
    cache.layers[1].values[1, 4, 63] = wrong
    with pytest.raises(CodecError, match="values of layer 1 hold NaN, infinity"):
        written(quantizer, cache)


def test_values_and_payloads_at_odd_addresses_are_read_and_written_all_the_same(kernels: Interpreted) -> None:
    cache = cache_of(2, 1, 6, 64, torch.float16)
    for layer in cache.layers:
        layer.keys = torch.cat([layer.keys.flatten()[:1], layer.keys.flatten()])[1:].view(layer.keys.shape)
        assert layer.keys.data_ptr() % 16
    assert_same(Int4(), cache, kernels)


def test_kernels_that_do_otherwise_than_the_processor_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = OnGPU(CPU)
    part = Part(0, "keys", 2, 4, 64, "float16")
    row = batch.row_of(lay_out([part], Int4()).pieces[0], Int4())
    assert loops.takes("float16", row)
    batch_triton._agrees.cache_clear()
    right = OnGPU.encode
    monkeypatch.setattr(OnGPU, "encode", lambda *given: right(*given) * 2)
    with pytest.warns(UserWarning, match="differ from the processor's"):
        assert not loops.takes("float16", row)
    batch_triton._agrees.cache_clear()
    monkeypatch.setattr(OnGPU, "encode", lambda *given: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not loops.takes("float16", row)
    batch_triton._agrees.cache_clear()
