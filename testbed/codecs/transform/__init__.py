"""Transforms: make a cache cheaper to code before it is quantized (differences between tokens, rotations …)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs.method import Method

if TYPE_CHECKING:
    from testbed.codecs.quantize import Quantizer
    from testbed.models.kvcache import KVCache


@dataclass(frozen=True)
class Transform(Method):
    """A reversible change of keys and values. Shapes and positions stay; values may be float32 in between."""

    stage: ClassVar[Literal["transform"]] = "transform"

    @property
    def undoes_rope(self) -> bool:
        """Whether it turns keys back from their positions, so that the cache should know how (`KVLayer.rope`)."""
        return False

    def encode(self, cache: KVCache, quantizer: Quantizer) -> tuple[KVCache, bytes]:
        """The cache to quantize, and bytes that `decode` needs beside it (counted in the payload).

        `quantizer` tells a transform that predicts from decoded values what the decoder will see.
        """
        raise NotImplementedError

    def decode(self, cache: KVCache, side: bytes) -> KVCache:
        """The inverse, on float32 values. Raises PayloadError where `side` is not what `encode` writes."""
        raise NotImplementedError
