"""A scout's choice: which tokens of a context a selector keeps, one list for all layers, as it crosses.

It is a MessagePack list of how many there are and of what `codecs.cache_format` makes of an ascending list. Tokens are counted
from the context's first, so that it does not matter what stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from testbed.codecs import CodecError
from testbed.codecs.cache_format import (
    MOST_TOKENS,
    PositionList,
    Positions,
    decode_positions,
    encode_positions,
)
from testbed.delivery.delivery import TEXT, Bytes
from testbed.endpoints import tokens
from testbed.errors import WireError

if TYPE_CHECKING:
    from testbed.codecs.evidence import Kept
    from testbed.models.kvcache import KVCache

POSITIONS = "positions"
#: Of a scout's request: its first chunk, and its second.
LEVELS = (TEXT, POSITIONS)


class _Coded(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
    coding: PositionList
    data: bytes


def chosen(kept: Kept, count: int) -> Positions:
    """The tokens that a selector keeps of a context of so many. Raises CodecError where layers keep different ones, and where
    more than a choice is made.
    """
    if kept.merged:
        raise CodecError("a scout chooses tokens of a text; its selector merges caches")
    lists = list({id(index): index for index in kept.layers if index is not None}.values())
    if not lists:
        return np.arange(count, dtype=np.int64)
    if len(lists) > 1 or lists[0].dim() != 1:
        raise CodecError("a scout chooses one list of tokens for all layers; its selector has several")
    return lists[0].cpu().numpy().astype(np.int64)


def pieces(ids: Sequence[int], vocabulary: int, kept: Kept) -> list[Bytes]:
    """What crosses of a scout's context: its text, and what is kept of it. Raises CodecError as `chosen` does."""
    return [tokens.to_bytes(ids, vocabulary), to_bytes(chosen(kept, len(ids)))]


def to_bytes(positions: Positions) -> bytes:
    """Strictly ascending numbers of tokens, at least one, as they cross."""
    coding, data = encode_positions(positions)
    return msgspec.msgpack.encode(_Coded(len(positions), coding, data))


def from_bytes(data: memoryview, count: int) -> Positions:
    """The choice of such bytes: strictly ascending, within a context of so many tokens. Raises WireError, PayloadError."""
    try:
        coded = msgspec.msgpack.decode(data, type=_Coded)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a choice of tokens: {str(error)[:120]}") from None
    if coded.count > count:
        raise WireError(f"{coded.count} tokens are chosen of a context of {count}")
    positions = decode_positions(coded.coding, coded.count, memoryview(coded.data))
    if int(positions[-1]) >= count:
        raise WireError(f"token {int(positions[-1])} is chosen of a context of {count}")
    return positions


def keep(cache: KVCache, positions: Positions) -> KVCache:
    """A context's cache of these tokens alone; layers with a window, which selectors leave whole, have all."""
    import torch

    from testbed.codecs.evidence import Kept

    index = torch.from_numpy(positions)
    layers = tuple(index if layer.window is None else None for layer in cache.layers)
    return Kept(layers, len(positions)).apply(cache)
