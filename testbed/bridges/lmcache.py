"""A codec in LMCache: as its remote backend's serializer and deserializer, and as a serde of its L2 adapters.

    from testbed.bridges import lmcache
    remote_backend.CreateSerde = lmcache.remote_serde("int4")     # lmcache.v1.storage_backend.remote_backend
    lmcache.register()                                            # "serde": {"type": "testbed", "codec": "int4", "kv_heads": 8}

Written against LMCache 0.5.6, whose classes are duck-typed: nothing of it is imported before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from testbed.codecs import cache_format
from testbed.codecs.cache_format import CacheShape
from testbed.codecs.codec import Codec, decode
from testbed.errors import PayloadError, UsageError
from testbed.models.kvcache import KVCache, KVLayer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: LMCache's formats: a name -> where it has the dimensions of [2, layers, tokens, hidden].
_ORDERS = {"KV_2LTD": (0, 1, 2, 3), "KV_2TD": (0, None, 1, 2), "KV_T2D": (1, None, 0, 2)}
_HEADER = 1 << 20  # more than a header of any chunk takes


class Chunks:
    """A codec for chunks of a cache: [2, layers, tokens, kv_heads · head_dim] to a payload and back.

    A chunk keeps all its tokens and tells no position, so selectors and what turns keys back from their positions are refused.
    """

    def __init__(self, codec: str, kv_heads: int) -> None:
        self.codec, self.kv_heads = Codec(codec), kv_heads
        unfit = {
            "a selector leaves tokens out, and LMCache expects all of a chunk's": self.codec.selects,
            "it turns keys back from their positions, and a chunk tells none": self.codec.undoes_rope,
            "bit planes cross one by one, and a store has no use for that": self.codec.quantizer.planes,
        }
        if why := next((why for why, there in unfit.items() if there), None):
            raise UsageError(f"codec {codec} in LMCache: {why}")

    def encode(self, chunk: Tensor) -> memoryview:
        """The payload. Raises UsageError for a chunk of another shape or number format, CodecError for NaN."""
        import torch

        if chunk.dim() != 4 or len(chunk) != 2 or chunk.shape[3] % self.kv_heads:
            raise UsageError(
                f"a chunk is [2, layers, tokens, {self.kv_heads} heads], not {list(chunk.shape)}"
            )
        by_head = chunk.unflatten(3, (self.kv_heads, -1)).transpose(2, 3).contiguous()
        positions = torch.arange(chunk.shape[2])
        layers = [KVLayer(keys, values, positions) for keys, values in zip(*by_head, strict=True)]
        return self.codec.encode(KVCache(layers, chunk.shape[2]))

    def decode(self, payload: Any, shape: torch.Size | None = None, device: str = "cpu") -> Tensor:
        """The chunk, of that shape where one is expected; behind the payload's end may be anything. Raises PayloadError."""
        import torch

        whole, _ = cache_format.split(payload)
        expected = None
        if shape is not None:
            one = (self.kv_heads, shape[3] // self.kv_heads, shape[3] // self.kv_heads, None)
            expected = CacheShape((one,) * shape[1], shape[2])
        cache = decode(whole, device, expected)
        parts = [torch.stack((layer.keys, layer.values)) for layer in cache.layers]
        if len({part.shape for part in parts}) > 1 or any(
            layer.tokens != cache.length for layer in cache.layers
        ):
            raise PayloadError("the payload is no chunk: its layers differ, or tokens are left out")
        chunk = torch.stack(parts, 1).transpose(2, 3).flatten(3)
        if shape is not None and chunk.shape != shape:
            raise PayloadError(f"a chunk of {list(shape)} was expected, and {list(chunk.shape)} came")
        return chunk


def _chunk(held: Any) -> Tensor:
    """What a MemoryObj holds, as [2, layers, tokens, hidden], sharing its memory. Raises UsageError for a format that is none."""
    tensor, name = held.tensor, held.metadata.fmt.name
    order = _ORDERS.get(name)
    if tensor is None or order is None or tensor.dim() != len([each for each in order if each is not None]):
        raise UsageError(f"a chunk in LMCache's format {name} cannot be encoded; {', '.join(_ORDERS)} can")
    moved: Tensor = tensor.permute([each for each in order if each is not None])
    return moved if None not in order else moved[:, None]


class RemoteSerializer:
    """LMCache's `naive_serde.Serializer`: a chunk in, its payload out."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def serialize(self, memory_obj: Any) -> Any:
        """A BytesBufferMemoryObj of the payload."""
        from lmcache.v1.memory_management import BytesBufferMemoryObj

        return BytesBufferMemoryObj(bytes(self._chunks.encode(_chunk(memory_obj))))


class RemoteDeserializer:
    """LMCache's `naive_serde.Deserializer`: a payload in, a chunk in the number format of the cache out."""

    def __init__(self, chunks: Chunks, dtype: torch.dtype) -> None:
        self._chunks, self._dtype = chunks, dtype

    def deserialize(self, memory_obj: Any) -> Any:
        """A TensorMemoryObj as LMCache's own deserializers make one: [2, layers, tokens, hidden], freed by nobody's allocator."""
        import torch
        from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

        chunk = self._chunks.decode(memory_obj.byte_array).to(self._dtype).contiguous()
        size = chunk.numel() * chunk.element_size()
        told = MemoryObjMetadata(chunk.shape, chunk.dtype, -1, size, -1, fmt=MemoryFormat.KV_2LTD)
        return TensorMemoryObj(chunk.flatten().view(torch.uint8), told, None)


def remote_serde(codec: str) -> Callable[[str, Any, Any], tuple[RemoteSerializer, RemoteDeserializer]]:
    """What stands where LMCache has `CreateSerde`, which knows three names alone: called with its `remote_serde`, the cache's
    metadata and its config. Raises UsageError for a codec that cannot work there.
    """
    Chunks(codec, 1)

    def create(name: str, metadata: Any, config: Any) -> tuple[RemoteSerializer, RemoteDeserializer]:
        chunks = Chunks(codec, int(metadata.kv_shape[-2]))
        return RemoteSerializer(chunks), RemoteDeserializer(chunks, metadata.kv_dtype)

    return create


class Serializer:
    """LMCache's `distributed.serde.Serializer`: a chunk into a buffer that it made."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """How many bytes of `dst` the payload takes. Raises ValueError where it has no room for so many."""
        import torch

        payload = self._chunks.encode(_chunk(src))
        room: Tensor = dst.tensor.flatten().view(torch.uint8)
        if len(payload) > len(room):
            raise ValueError(f"a payload of {len(payload)} bytes for a buffer of {len(room)}")
        room[: len(payload)].copy_(torch.frombuffer(payload, dtype=torch.uint8))
        return len(payload)

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """An upper bound: twice the chunk, which no quantizer's symbols and scales exceed, and a header."""
        shapes = zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        return 2 * sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes) + _HEADER


class Deserializer:
    """LMCache's `distributed.serde.Deserializer`: a payload into the chunk that it is to be."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Raises PayloadError for bytes that are no payload of a chunk of this shape."""
        target = _chunk(dst)
        target.copy_(self._chunks.decode(src.byte_array, target.shape))


def register(name: str = "testbed") -> None:
    """Makes the testbed known among LMCache's serdes. Its settings: `codec`; `kv_heads`; `max_workers` threads, 1 by default."""
    from lmcache.v1.distributed.serde import AsyncSerdeProcessor, register_serde_factory

    def create(settings: dict[str, Any]) -> Any:
        unknown = set(settings) - {"codec", "kv_heads", "max_workers"}
        if unknown or not {"codec", "kv_heads"} <= set(settings):
            raise UsageError(
                f"serde {name}: give codec and kv_heads, and max_workers or not; {sorted(unknown)} is none"
            )
        chunks = Chunks(str(settings["codec"]), int(settings["kv_heads"]))
        return AsyncSerdeProcessor(
            Serializer(chunks), Deserializer(chunks), int(settings.get("max_workers", 1))
        )

    register_serde_factory(name, create)
