"""LMCache's interfaces: against its own classes where it is installed, else against the same signatures written here."""

from __future__ import annotations

import enum
import io
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from testbed.bridges import lmcache, lmcache_formats
from testbed.codecs import CodecError
from testbed.codecs.codec import Codec
from testbed.errors import PayloadError, UsageError
from testbed.models.kvcache import KVCache, KVLayer

HERE = Path(__file__).parent
RECORDED = (HERE / "cachegen-0.5.6.pickle").read_bytes()  # by LMCache 0.5.6's CacheGenSerializer, on a CPU
LAYERS, TOKENS, HEADS, DIM = 3, 20, 2, 32


class _MemoryFormat(enum.Enum):
    KV_2LTD, KV_T2D, KV_2TD, BINARY_BUFFER, KV_MLA_FMT = range(1, 6)


@dataclass
class _Metadata:
    shape: torch.Size
    dtype: torch.dtype | None
    address: int
    phy_size: int
    ref_count: int
    pin_count: int = 0
    fmt: _MemoryFormat = _MemoryFormat.KV_2LTD


class _TensorMemoryObj:
    def __init__(self, raw_data: Tensor, metadata: _Metadata, parent_allocator: Any) -> None:
        self.raw_data, self.metadata, self._used = raw_data, metadata, None

    @property
    def tensor(self) -> Tensor:
        assert self.metadata.dtype is not None
        return self.raw_data.view(self.metadata.dtype).view(self.metadata.shape)

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self.raw_data.numpy())[: self._used]

    def set_used_size(self, n: int) -> None:
        self._used = n  # type: ignore[assignment]


class _BytesBufferMemoryObj:
    def __init__(self, raw_bytes: bytes) -> None:
        self.byte_array = raw_bytes
        self.tensor = None


@dataclass
class _Layout:
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """LMCache's `memory_management`."""
    try:
        import lmcache.v1.memory_management as real
    except ImportError:
        stand_in = types.ModuleType("lmcache.v1.memory_management")
        stand_in.MemoryFormat, stand_in.MemoryObjMetadata = _MemoryFormat, _Metadata  # type: ignore[attr-defined]
        stand_in.TensorMemoryObj, stand_in.BytesBufferMemoryObj = _TensorMemoryObj, _BytesBufferMemoryObj  # type: ignore[attr-defined]
        for name in ("lmcache", "lmcache.v1"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        yield stand_in
    else:
        yield real


def _held(memory: Any, tensor: Tensor, kind: str = "KV_2LTD") -> Any:
    """A MemoryObj of a tensor, as an allocator of LMCache makes it."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    told = memory.MemoryObjMetadata(
        shape=tensor.shape,
        dtype=tensor.dtype,
        address=0,
        phy_size=len(raw),
        ref_count=1,
        fmt=memory.MemoryFormat[kind],
    )
    return memory.TensorMemoryObj(raw, told, None)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


CHUNK = _random(2, LAYERS, TOKENS, HEADS * DIM)
METADATA = types.SimpleNamespace(kv_shape=(LAYERS, 2, 256, HEADS, DIM), kv_dtype=torch.bfloat16)


def _expected(codec: str, chunk: Tensor) -> Tensor:
    """By a straight loop over layers and heads."""
    layers = []
    for layer in range(chunk.shape[1]):
        keys, values = (
            torch.stack([chunk[part, layer, :, DIM * head : DIM * (head + 1)] for head in range(HEADS)])
            for part in (0, 1)
        )
        layers.append(KVLayer(keys, values, torch.arange(chunk.shape[2])))
    from testbed.codecs.codec import decode

    cache = decode(Codec(codec).encode(KVCache(layers, chunk.shape[2])))
    found = torch.empty_like(chunk)
    for i, layer in enumerate(cache.layers):
        for head in range(HEADS):
            found[0, i, :, DIM * head : DIM * (head + 1)] = layer.keys[head]
            found[1, i, :, DIM * head : DIM * (head + 1)] = layer.values[head]
    return found


CODECS = ("fp16", "lossless", "int8", "int4+zstd", "fp8", "kivi", "cachegen", "turbo", "delta+int4")


@pytest.mark.parametrize("codec", CODECS)
def test_a_remote_backend_gets_back_what_the_codec_makes_of_each_layer(codec: str, memory: Any) -> None:
    serializer, deserializer = lmcache.remote_serde(codec)("testbed", METADATA, None)
    sent = serializer.serialize(_held(memory, CHUNK))
    back = deserializer.deserialize(sent)
    assert isinstance(sent.byte_array, bytes) and isinstance(back, memory.TensorMemoryObj)
    assert back.metadata.fmt is memory.MemoryFormat.KV_2LTD and back.metadata.shape == CHUNK.shape
    assert torch.equal(back.tensor, _expected(codec, CHUNK))


@pytest.mark.parametrize("codec", CODECS)
def test_a_serde_of_l2_writes_within_its_estimate_and_reads_it_behind_which_anything_lies(
    codec: str, memory: Any
) -> None:
    chunks = lmcache.Chunks(codec, HEADS)
    serializer, deserializer = lmcache.Serializer(chunks), lmcache.Deserializer(chunks)
    room = serializer.estimate_serialized_size(_Layout([CHUNK.shape], [CHUNK.dtype]))
    buffer = _held(memory, torch.full((room,), 255, dtype=torch.uint8), "BINARY_BUFFER")
    size = serializer.serialize(_held(memory, CHUNK), buffer, None)
    assert 0 < size <= room
    target = _held(memory, torch.zeros_like(CHUNK))
    deserializer.deserialize(buffer, target, None)  # the whole buffer, whose end is not the payload's
    assert torch.equal(target.tensor, _expected(codec, CHUNK))
    buffer.set_used_size(size)
    deserializer.deserialize(buffer, target, None)
    assert torch.equal(target.tensor, _expected(codec, CHUNK))


def test_layers_that_come_one_by_one_are_chunks_too(memory: Any) -> None:
    serializer, deserializer = lmcache.remote_serde("fp16")("testbed", METADATA, None)
    for kind, tensor in (("KV_2TD", CHUNK[:, 1]), ("KV_T2D", CHUNK[:, 1].transpose(0, 1))):
        back = deserializer.deserialize(serializer.serialize(_held(memory, tensor, kind)))
        assert torch.equal(back.tensor, CHUNK[:, 1:2])
        target, buffer = _held(memory, torch.zeros_like(tensor), kind), torch.zeros(99_999, dtype=torch.uint8)
        chunks, held = lmcache.Chunks("fp16", HEADS), _held(memory, buffer, "BINARY_BUFFER")
        lmcache.Serializer(chunks).serialize(_held(memory, tensor, kind), held, None)
        lmcache.Deserializer(chunks).deserialize(held, target, None)
        assert torch.equal(target.tensor, tensor)


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ("window@0.5", "a selector"),
        ("kvquant", "positions"),
        ("planes", "bit planes"),
        ("think", "a selector"),
        ("no", "no"),
    ],
)
def test_codecs_that_a_chunk_has_no_ground_for_are_refused(codec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        lmcache.remote_serde(codec)


def test_what_is_no_chunk_is_refused(memory: Any) -> None:
    chunks = lmcache.Chunks("int8", HEADS)
    with pytest.raises(UsageError, match="KV_MLA_FMT"):
        lmcache.RemoteSerializer(chunks).serialize(_held(memory, CHUNK[:1], "KV_MLA_FMT"))
    with pytest.raises(UsageError, match="2 heads"):
        chunks.encode(CHUNK[..., :63])
    with pytest.raises(CodecError, match="float32"):
        chunks.encode(CHUNK.float())
    with pytest.raises(ValueError, match="for a buffer of 8"):
        small = _held(memory, torch.zeros(8, dtype=torch.uint8), "BINARY_BUFFER")
        lmcache.Serializer(chunks).serialize(_held(memory, CHUNK), small, None)
    payload = chunks.encode(CHUNK)
    for other in (CHUNK[:, :2], CHUNK[:, :, :19], CHUNK[..., :32]):
        with pytest.raises(PayloadError):
            chunks.decode(payload, other.shape)
    with pytest.raises(PayloadError):
        chunks.decode(bytes(payload)[:-1])


def test_the_registered_serde_is_lmcaches_own_processor() -> None:
    serde = pytest.importorskip("lmcache.v1.distributed.serde")
    memory = pytest.importorskip("lmcache.v1.memory_management")
    lmcache.register("testbed-test")
    made = serde.create_serde_processor(
        serde.SerdeConfig("testbed-test", {"codec": "int4", "kv_heads": HEADS})
    )
    try:
        room = made.estimate_serialized_size(_Layout([CHUNK.shape], [CHUNK.dtype]))
        buffer = _held(memory, torch.zeros(room, dtype=torch.uint8), "BINARY_BUFFER")
        task = made.submit_serialize([_held(memory, CHUNK)], [buffer], [None])
        while (done := made.query_serialize_result(task)) is None:
            pass
        target = _held(memory, torch.zeros_like(CHUNK))
        task = made.submit_deserialize([buffer], [target], [None])
        while (read := made.query_deserialize_result(task)) is None:
            pass
        assert done and read and torch.equal(target.tensor, _expected("int4", CHUNK))
    finally:
        made.close()
    with pytest.raises(UsageError, match="kv_heads"):
        serde.create_serde_processor(serde.SerdeConfig("testbed-test", {"codec": "int4"}))


def test_recorded_cachegen_bytes_are_read_as_lmcache_read_them() -> None:
    recorded = load_file(HERE / "cachegen-0.5.6.safetensors")
    read = lmcache_formats.read_cachegen(RECORDED)
    assert torch.equal(read.half(), recorded["decoded"])
    # 31 levels over the largest magnitude of a token's channels, twice: half a step each way.
    largest = recorded["chunk"].float().abs().amax(-1, keepdim=True)
    assert bool(((read - recorded["chunk"].float()).abs() <= largest / 15 / 2 * 1.01).all())


def test_fp8_and_naive_bytes_are_bare_numbers() -> None:
    serde = pytest.importorskip("lmcache.v1.distributed.serde", reason="the writer is LMCache's")
    memory = pytest.importorskip("lmcache.v1.memory_management")
    buffer = _held(memory, torch.zeros(CHUNK.numel(), dtype=torch.uint8), "BINARY_BUFFER")
    serde.Fp8QuantizationSerializer().serialize(_held(memory, CHUNK), buffer, None)
    target = _held(memory, torch.zeros_like(CHUNK))
    serde.Fp8QuantizationDeserializer().deserialize(buffer, target, None)
    read = lmcache_formats.read_numbers(
        bytes(buffer.byte_array), tuple(CHUNK.shape), "float8_e4m3fn", CHUNK.dtype
    )
    assert torch.equal(read, target.tensor)


@pytest.mark.parametrize(("stored", "steps"), [("float8_e4m3fn", 8), ("float8_e5m2", 4), ("bfloat16", 128)])
def test_numbers_are_those_of_their_format(stored: str, steps: int) -> None:
    """By the exponent and the fraction of each number."""
    exact = [(1 + fraction / steps) * 2.0**power for power in range(-3, 4) for fraction in range(steps)]
    kind = getattr(torch, stored)
    data = bytes(torch.tensor(exact).to(kind).view(torch.uint8).tolist())
    read = lmcache_formats.read_numbers(data, (7, steps), stored, torch.float32)
    assert read.flatten().tolist() == exact
    with pytest.raises(PayloadError, match="no chunk"):
        lmcache_formats.read_numbers(data[:-1], (7, steps), stored, torch.float32)


class _Shell:
    def __reduce__(self) -> Any:
        return (print, ("called",))


def test_a_pickle_calls_nothing_but_what_makes_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (pickle.dumps(_Shell()), pickle.dumps([1]), b"", pickle.dumps({"cdf": torch.ones(1)})):
        with pytest.raises(PayloadError, match="CacheGen"):
            lmcache_formats.read_cachegen(bad)
    assert "called" not in capsys.readouterr().out


@given(
    st.lists(st.tuples(st.integers(0, len(RECORDED) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_changed_cachegen_bytes_are_read_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(RECORDED)
    for place, byte in changes:
        data[place] = byte
    try:
        read = lmcache_formats.read_cachegen(bytes(io.BytesIO(data[: len(data) - cut]).getbuffer()))
        assert read.dim() == 4
    except PayloadError as error:
        assert "\n" not in str(error)
