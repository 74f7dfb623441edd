"""Directions of a model's queries, fitted beforehand, kept in a file, named by a hash of what it says.

    file   msgpack: format, what they were fitted on, and for each layer KV heads, elements of a key, and float32 directions

Only who selects needs them: a payload holds what was kept, and names the hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from testbed.codecs.kept import LARGEST_FILE, Kept

if TYPE_CHECKING:
    from torch import Tensor

FORMAT: Literal["testbed-filters-1"] = "testbed-filters-1"


class _Layer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    heads: Annotated[int, Meta(ge=1, le=1024)]
    dim: Annotated[int, Meta(ge=1, le=1 << 14)]
    data: Annotated[bytes, Meta(max_length=LARGEST_FILE)]


class Filters(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """All of a file. `of`: what they were fitted on, for people."""

    format: Literal["testbed-filters-1"]
    of: Annotated[str, Meta(max_length=400)]
    layers: Annotated[list[_Layer], Meta(min_length=1, max_length=1024)]

    def direction(self, layer: int) -> Tensor | None:
        """A layer's, float32 [heads, dim]; None where the model that they were fitted on has no such layer."""
        import torch

        if layer >= len(self.layers):
            return None
        own = self.layers[layer]
        return torch.frombuffer(bytearray(own.data), dtype=torch.float32).view(own.heads, own.dim)


def made(of: str, directions: Sequence[Tensor]) -> Filters:
    """Of each layer's directions, [heads, dim]."""
    layers = [
        _Layer(len(each), each.shape[1], each.cpu().float().contiguous().numpy().astype("<f4").tobytes())
        for each in directions
    ]
    return Filters(FORMAT, of[:400], layers)


def _wrong(filters: Filters) -> str:
    import numpy as np

    for i, layer in enumerate(filters.layers):
        if len(layer.data) != 4 * layer.heads * layer.dim:
            return f"layer {i} has another number of elements than its shape"
        if not np.isfinite(np.frombuffer(layer.data, dtype="<f4")).all():
            return f"layer {i} has an element that is not a number"
    return ""


KEPT = Kept("filters", Filters, _wrong)
