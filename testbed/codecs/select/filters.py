"""Directions of a model's queries, fitted beforehand, kept in a file, named by a hash of what it says.

    file   msgpack: format, what they were fitted on, and for each layer KV heads, elements of a key, and float32 directions

Only who selects needs them: a payload holds what was kept, and names the hash.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from testbed import files
from testbed.errors import SpecError
from testbed.files import read_at_most

if TYPE_CHECKING:
    from torch import Tensor

FORMAT: Literal["testbed-filters-1"] = "testbed-filters-1"
_LARGEST_FILE = 64 << 20


class _Layer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    heads: Annotated[int, Meta(ge=1, le=1024)]
    dim: Annotated[int, Meta(ge=1, le=1 << 14)]
    data: Annotated[bytes, Meta(max_length=_LARGEST_FILE)]


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


def directory() -> Path:
    """Where this machine keeps the filters that it has."""
    from testbed.models.sources import cache_directory

    return cache_directory() / "filters"


def save(filters: Filters) -> tuple[str, Path]:
    """Keeps filters among those of this machine; their name and file."""
    data = msgspec.msgpack.encode(filters)
    name = _name(data)
    path = directory() / f"{name}.filters"
    with files.storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, data)
    return name, path


def load(path: Path) -> tuple[str, Filters]:
    """Filters from a file, and their name. Raises SpecError naming the file and what is wrong with it."""
    import numpy as np

    try:
        data = read_at_most(path, _LARGEST_FILE)
        filters = msgspec.msgpack.decode(data, type=Filters)
    except OSError as error:
        raise SpecError(f"filters {path}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SpecError(f"filters {path}: {str(error)[:100]}") from None
    for i, layer in enumerate(filters.layers):
        if len(layer.data) != 4 * layer.heads * layer.dim:
            raise SpecError(f"filters {path}: layer {i} has another number of elements than its shape")
        if not np.isfinite(np.frombuffer(layer.data, dtype="<f4")).all():
            raise SpecError(f"filters {path}: layer {i} has an element that is not a number")
    return _name(data), filters


@functools.lru_cache(maxsize=8)
def known(name: str) -> Filters:
    """The filters of that name on this machine. Raises SpecError where it has none, or where the file holds others."""
    path = directory() / f"{name}.filters"
    if not path.is_file():
        raise SpecError(f"the filters {name[:40]} are not on this machine; copy their file to {path}")
    held, filters = load(path)
    if held != name:
        raise SpecError(f"filters {path}: the file holds the filters {held}, not {name}")
    return filters


def _name(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
