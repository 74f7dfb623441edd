"""GEAR: integers, a residual of low rank as numpy's singular values have it, and outliers as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from testbed.codecs.codec import Codec, decode
from testbed.errors import SpecError
from testbed.models.kvcache import KVCache, KVLayer

HEADS, TOKENS, DIM = 2, 75, 32


def heavy_tailed(seed: int = 1) -> KVCache:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(2)]
    layer = [(x + 0.3 * x**3).half() for x in made]
    return KVCache([KVLayer(layer[0], layer[1], torch.arange(TOKENS))], TOKENS)


def vectors_of(x: torch.Tensor, kind: str) -> np.ndarray:
    rows = x.double().numpy()
    return rows.transpose(0, 2, 1).reshape(HEADS * DIM, TOKENS) if kind == "keys" else rows.reshape(-1, DIM)


def straight(x: torch.Tensor, kind: str, bits: int, rank: int, outliers: float) -> np.ndarray:
    """The method in plain loops, without rounding of side information."""
    vectors = vectors_of(x, kind)
    length = vectors.shape[1]
    apart = round(outliers * length / 2)
    dense, mask = np.empty_like(vectors), np.zeros(vectors.shape, dtype=bool)
    for i, row in enumerate(vectors):
        order = sorted(range(length), key=lambda j: row[j])
        mask[i, order[:apart] + order[length - apart :]] = True
        low, high = row[~mask[i]].min(), row[~mask[i]].max()
        step = (high - low) / (2**bits - 1)
        dense[i] = np.rint((np.clip(row, low, high) - low) / step) * step + low
    left = np.where(mask, 0, vectors - dense)

    def heads(flat: np.ndarray) -> np.ndarray:
        if kind == "keys":
            return flat.reshape(HEADS, DIM, TOKENS).transpose(0, 2, 1)
        return flat.reshape(HEADS, TOKENS, DIM)

    u, s, v = np.linalg.svd(heads(left), full_matrices=False)
    found = heads(dense) + u[..., :rank] * s[:, None, :rank] @ v[:, :rank]
    return np.asarray(np.where(heads(mask), heads(vectors), found))


@pytest.mark.parametrize("bits, rank, outliers", [(2, 4, 0.06), (3, 0, 0.2), (4, 8, 0), (2, 0, 0)])
def test_what_arrives_is_integers_and_the_best_low_rank_residual(
    bits: int, rank: int, outliers: float
) -> None:
    cache = heavy_tailed()
    arrived = decode(Codec(f"gear(bits={bits}, rank={rank}, outliers={outliers})").encode(cache)).layers[0]
    for kind, found, x in (
        ("keys", arrived.keys, cache.layers[0].keys),
        ("values", arrived.values, cache.layers[0].values),
    ):
        expected, mine = straight(x, kind, bits, rank, outliers), found.double().numpy()
        # Scales are rounded to 16 bits, so that single symbols fall on the other side of a border, and turn singular vectors.
        assert rank or (np.abs(mine - expected) < 0.03).mean() > 0.97
        lost, theirs = (np.linalg.norm(each - x.double().numpy()) for each in (mine, expected))
        assert lost == pytest.approx(theirs, rel=0.02)


def test_outliers_arrive_as_they_were() -> None:
    cache = heavy_tailed()
    arrived = decode(Codec("gear(outliers=0.1)").encode(cache)).layers[0]
    for kind, found, x in (
        ("keys", arrived.keys, cache.layers[0].keys),
        ("values", arrived.values, cache.layers[0].values),
    ):
        theirs, mine = vectors_of(x, kind), vectors_of(found, kind)
        rows = np.arange(len(theirs))
        for end in (theirs.argmax(1), theirs.argmin(1)):
            assert (mine[rows, end] == theirs[rows, end]).all()


def test_true_bytes_are_symbols_scales_outliers_and_two_factors() -> None:
    elements = HEADS * TOKENS * DIM
    keys = elements / 4 + HEADS * DIM * (4 + 2 * round(0.1 * TOKENS / 2) * 4)
    values = elements / 4 + HEADS * TOKENS * (4 + 2 * round(0.1 * DIM / 2) * 4)
    factors = 2 * 2 * HEADS * 4 * (TOKENS + DIM)
    size = len(Codec("gear(outliers=0.1)").encode(heavy_tailed()))
    assert 0 <= size - (keys + values + factors) < 160


def test_each_addition_loses_less() -> None:
    cache = heavy_tailed()

    def lost(text: str) -> float:
        layer = decode(Codec(text).encode(cache)).layers[0]
        return float((layer.values.float() - cache.layers[0].values.float()).norm())

    assert lost("gear") < lost("gear(outliers=0)") * 1.001
    assert lost("gear(outliers=0.1)") < lost("gear(outliers=0)") < lost("gear(outliers=0, rank=0)")


def test_wrong_parameters_are_refused() -> None:
    for text in ("gear(bits=5)", "gear(rank=2000)", "gear(outliers=0.7)"):
        with pytest.raises(SpecError, match="but must be"):
            Codec(text)
