"""What is chosen and sent of the same evidence, by different numbers of threads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from testbed.codecs import registry
from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Evidence
from testbed.codecs.fast.threads import bytes_for
from testbed.models.kvcache import KVCache
from testbed.models.rope import Rope
from tests.codecs.test_selectors import shaped_evidence

CODECS = (
    *(f"{name}@0.3+int8" for name in registry.SELECTORS),
    *(f"{name}@0.3(scope=global)+int8" for name in ("q2c", "snapkv", "h2o", "expected", "keynorm")),
    *(f"{name}+ans" for name in registry.QUANTIZERS if name not in ("mixed", "best")),
    "delta(order=consecutive)+int4+zstd",
    "mixed(protect=K0)+lz4",
)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    made = shaped_evidence("grouped", 1100)
    knowing = [replace(layer, rope=Rope((0.5, 0.1), (0, 1), 2)) for layer in made.cache.layers]
    return replace(made, cache=KVCache(knowing, made.cache.length))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("text", CODECS)
def test_the_same_evidence_gives_the_same_list_and_the_same_bytes_in_any_number_of_threads(
    evidence: Evidence, text: str
) -> None:
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        codec = Codec(text)
        kept = codec.select(evidence)
        found.add((kept.digest(), hashlib.md5(codec.encode(evidence.cache, kept)).hexdigest()))
    assert len(found) == 1


@pytest.mark.parametrize("size", [1, 63, 4096, 5 << 20])
def test_memory_begins_at_a_cache_line(size: int) -> None:
    memory = bytes_for(size)
    assert memory.size == size
    assert memory.ctypes.data % 64 == 0
