"""ThinK: the channels that the question looks at are sent, and nothing of the others is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, Needs
from testbed.codecs.layout import expected_bytes
from testbed.codecs.spec import parse
from testbed.errors import SpecError
from tests.codecs.caches import same_cache
from tests.codecs.test_selectors import CONTEXT, DIM, GROUP, HEADS, LAYERS, make_evidence


def in_half(evidence: Evidence) -> Evidence:
    evidence.cache = evidence.cache.to(dtype=torch.float16)
    return evidence


@pytest.mark.parametrize("window", [0, 9])
def test_channels_are_those_of_the_largest_products_of_queries_and_keys(window: int) -> None:
    evidence, count = in_half(make_evidence()), 10
    text = f"think(keep={count / DIM}, window={window})"
    codec = Codec(text)
    assert codec.needs == (Needs(context_queries=9) if window else Needs(question=True))
    arrived = decode(codec.encode(evidence.cache, codec.select(evidence)))
    observing = evidence.context_queries if window else evidence.question_queries
    assert observing is not None
    for layer, (ours, theirs) in enumerate(zip(arrived.layers, evidence.cache.layers, strict=True)):
        assert torch.equal(ours.values, theirs.values)
        queries = observing[layer].double().numpy()[:, -window:]
        for head in range(HEADS):
            keys = theirs.keys[head].double().numpy()
            own = queries[head * GROUP : (head + 1) * GROUP].reshape(-1, DIM)
            worth = [np.linalg.norm(np.outer(own[:, c], keys[:, c])) for c in range(DIM)]
            sent = sorted(np.argsort(worth)[-count:].tolist())
            dropped = sorted({*range(DIM)} - {*sent})
            assert torch.equal(ours.keys[head][:, sent], theirs.keys[head][:, sent])
            assert not bool(ours.keys[head][:, dropped].any())


@pytest.mark.parametrize(
    "text", ["think", "think(keep=0.3, of=int4)", "q2c@0.5+think", "adaptive@0.5(by=q2c)+think(of=int8)"]
)
def test_what_arrives_is_what_the_quantizer_makes_of_the_kept_channels(text: str) -> None:
    evidence = in_half(make_evidence())
    codec = Codec(text)
    kept = codec.select(evidence)
    arrived, chosen = decode(codec.encode(evidence.cache, kept)), kept.apply(evidence.cache)
    tolerance = {"fp16": 0.0, "int8": 0.05, "int4": 1.5}[codec.quantizer.inner.name]  # type: ignore[attr-defined]
    for ours, theirs in zip(arrived.layers, chosen.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert float((ours.keys - theirs.keys).float().abs().max()) <= tolerance
        assert not bool(ours.keys[theirs.keys == 0].any())
    if codec.quantizer.inner.name == "fp16":  # type: ignore[attr-defined]
        assert same_cache(arrived, chosen)


def test_true_bytes_are_the_kept_channels_and_a_bit_for_each() -> None:
    evidence = in_half(make_evidence())
    size = len(Codec("think(keep=0.5)").encode(evidence.cache))
    elements = HEADS * CONTEXT * DIM
    assert abs(size - LAYERS * (2 * (elements + elements // 2) + 4)) < 200
    shapes = [(HEADS, DIM, DIM, None)] * LAYERS
    assert abs(size - expected_bytes(parse("think(keep=0.5)"), shapes, CONTEXT)) <= 100


def test_without_evidence_the_longest_channels_are_sent() -> None:
    evidence = in_half(make_evidence())
    arrived = decode(Codec("think(keep=0.25)").encode(evidence.cache))
    lengths = evidence.cache.layers[0].keys.float().square().sum(1)
    for head in range(HEADS):
        sent = lengths[head].argsort()[-4:]
        assert torch.equal(
            arrived.layers[0].keys[head][:, sent], evidence.cache.layers[0].keys[head][:, sent]
        )


def test_queries_that_do_not_look_at_what_is_cached_are_refused() -> None:
    evidence = in_half(make_evidence())
    evidence.question_queries = None
    with pytest.raises(CodecError, match="think needs queries that look at layer 0's keys"):
        Codec("think").select(evidence)
    with pytest.raises(SpecError, match="of is kivi, but must be one of fp16"):
        Codec("think(of=kivi)")
