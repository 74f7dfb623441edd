"""CAKE's budgets: preferences by straight loops, and shares that keep to their bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Needs
from testbed.codecs.select.cake import Cake, shared_out
from tests.codecs.test_selectors import CONTEXT, GROUP, HEADS, attention, make_evidence


@pytest.mark.parametrize("layer", [0, 2])
def test_preference_is_the_entropy_of_attention_times_how_much_it_shifts(layer: int) -> None:
    evidence = make_evidence(prefix=0)
    assert evidence.context_queries is not None and evidence.context_query_positions is not None
    paid = attention(evidence, layer, evidence.context_queries[layer], evidence.context_query_positions)
    entropy = variance = 0.0
    for head in range(HEADS * GROUP):
        for token in range(CONTEXT - 6):
            seen = [float(paid[head, q, token]) for q in range(CONTEXT - 6, CONTEXT)]
            entropy -= sum(a * math.log(a) for a in seen if a > 0)
            variance += float(np.var(seen, ddof=1))
    found = Cake(0.5, observers=6, spread=2.0, shift=0.5).preference(evidence, layer)
    assert found == pytest.approx(math.sqrt(entropy) * variance**2, rel=1e-3)


def test_layers_keep_their_share_by_the_scores_of_any_selector() -> None:
    evidence = make_evidence()
    codec = Codec("cake@0.4(by=keydiff, observers=6)")
    assert codec.needs == Needs(context_queries=6)
    worth = {layer: Cake(0.4, observers=6).preference(evidence, layer) for layer in (0, 2)}
    kept = codec.select(evidence).layers
    counts = {layer: len(index[0]) if (index := kept[layer]) is not None else CONTEXT for layer in worth}
    assert sum(counts.values()) == 2 * 24
    assert counts[0] == pytest.approx(48 * worth[0] / sum(worth.values()), abs=1)
    alone = Codec(f"keydiff@{counts[0] / CONTEXT:.4f}").select(evidence).layers[0]
    assert kept[0] is not None and alone is not None and kept[0].tolist() == alone.tolist()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 500), st.floats(0, 1))
def test_shares_add_up_and_are_within_bounds(wanted: list[float], most: int, at: float) -> None:
    total = len(wanted) + round(at * len(wanted) * (most - 1))
    shares = shared_out(wanted, total, most)
    assert sum(shares) == total and all(1 <= share <= most for share in shares)
    inside = [(share, want) for share, want in zip(shares, wanted, strict=True) if 1 < share < most]
    for (a, v), (b, w) in itertools.pairwise(inside):
        assert (a - b) * (v - w) >= 0 or abs(a - b) <= 1
