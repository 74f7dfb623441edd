"""Payloads in memory that a GPU copies to by itself. Where there is none, what `torch` is asked for can be looked at, not what
comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from testbed.codecs import codec as codec_module
from testbed.codecs.codec import Codec
from testbed.codecs.fast import pinned as module
from testbed.codecs.fast.pinned import is_gpu, on_host, pinned
from tests.codecs.caches import make_cache
from tests.codecs.second_device import OTHER, second_device


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of pinned tensors that were asked for, which come unpinned. The second device counts as a GPU."""
    sizes: list[int] = []
    empty = torch.empty

    def unpinned(size: Any, *others: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        sizes.extend([size] if pin_memory else [])
        return empty(size, *others, **named)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(module, "_LEAST", 1)
    for place in (module, codec_module):
        monkeypatch.setattr(place, "is_gpu", lambda device: device == OTHER)
    return sizes


@pytest.mark.parametrize("text", ["fp16", "int8", "int4+zstd", "planes+zstd"])
def test_what_a_gpu_fills_of_a_payload_is_pinned_and_the_payload_the_same(
    text: str, asked: list[int]
) -> None:
    cache = make_cache("grouped")
    payload = Codec(text).encode(cache)
    assert asked == []
    with second_device():
        ours = Codec(text).encode(cache.to(OTHER))
    assert bytes(ours) == bytes(payload)
    assert asked == [len(payload)] if text in ("fp16", "int8") else asked


def test_the_processors_bytes_are_neither_pinned_nor_copied() -> None:
    here = torch.arange(9, dtype=torch.uint8)
    assert not is_gpu(here.device) and not is_gpu(None)
    assert on_host(here) is here


def test_few_bytes_are_not_worth_pinned_memory() -> None:
    assert len(pinned(0)) == 0 and len(pinned(1000)) == 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_a_gpus_bytes_come_to_pinned_memory() -> None:
    there = torch.arange(1 << 20, device="cuda").to(torch.uint8)
    copy = on_host(there)
    assert copy.is_pinned() and torch.equal(copy, there.cpu())
