"""What the study's theory comes to, on caches whose variances are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import study_composition, study_deltas, study_incremental, study_rates
from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Needs, gather
from testbed.codecs.select import OnlineSelection, Selector
from testbed.codecs.transform.delta import Delta
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.loading import load_model
from testbed.models.shapes import Shape

ANCHOR, STEPS = Delta(loop="open"), Delta(loop="open", order="consecutive")


def cache(keys: Tensor, values: Tensor) -> KVCache:
    layer = KVLayer(keys.half(), values.half(), torch.arange(keys.shape[1]))
    return KVCache([layer], keys.shape[1])


def noise(seed: int = 0, tokens: int = 4000) -> Tensor:
    return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))


def test_differences_of_independent_tokens_vary_twice_as_much_and_of_a_slow_walk_far_less() -> None:
    walk = noise(1).cumsum(1) / 10
    found = study_deltas.ratios([cache(walk, noise(2))], STEPS)
    for ratio in found["values"]:
        assert ratio.middle == pytest.approx(0.5, rel=0.05)
    assert all(ratio.middle > 20 for ratio in found["keys"])


def test_what_all_tokens_share_counts_among_all_elements_and_not_by_channel() -> None:
    bias = torch.linspace(-30, 30, 8)
    elements, channels = study_deltas.ratios([cache(noise(1) + bias, noise(2))], ANCHOR)["keys"]
    assert elements.middle == pytest.approx(0.5 * (1 + float(bias.var(correction=0))), rel=0.05)
    assert channels.middle == pytest.approx(0.5, rel=0.05)


def test_no_quantizer_takes_fewer_bits_than_a_gaussian_of_the_same_variances_must() -> None:
    spread = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05])
    caches = [cache(noise(1) * spread, noise(2))]
    own = study_rates.sources(caches)
    assert own[0].channels[:8] == pytest.approx(spread.numpy() ** 2, rel=0.1)
    for text, bits in (("int8", 8), ("int4", 4), ("int4(group=0, symmetric=true)", 4), ("int2", 2)):
        least = study_rates.bound(own, study_rates.distortions(caches, Codec(text)))
        assert 0 < least["axes"] <= least["channels"] + 1e-9 <= bits


def test_what_channels_have_in_common_lowers_the_bound_of_axes_alone() -> None:
    shared = noise(1)[..., :1].expand(-1, -1, 8) + 0.1 * noise(2)
    (keys, values) = study_rates.sources([cache(shared, noise(3))])
    found = study_rates.bound([keys], [0.01])
    # Channels vary by 1.01 each; of each head one axis by 8.01 and seven by 0.01, which the distortion swallows.
    assert found["channels"] == pytest.approx(0.5 * np.log2(101), rel=0.02)
    assert found["axes"] == pytest.approx(0.5 * np.log2(801) / 8, rel=0.05)
    assert study_rates.bound([values], [0.01])["axes"] == pytest.approx(0.5 * np.log2(100), rel=0.02)
    half = study_rates.bound([values, values], [0.01, 0.0])  # half of it arrives as it was
    assert half["axes"] == pytest.approx((16 + 0.5 * np.log2(100)) / 2, rel=0.02)
    assert half["snr_db"] == pytest.approx(20, rel=0.02)


def test_scales_of_groups_multiply_with_what_heads_share_and_scales_of_tokens_with_what_a_head_has() -> None:
    whole = Shape("t", 2, 8, 8, 64, 64, 100, 4096, 1e6, "-")
    forms = {"MHA": whole, "MQA": Shape("t", 2, 8, 1, 64, 64, 100, 4096, 1e6, "-")}
    codecs = ("fp16", "int8", "int4")
    found = {
        (line["form"], line["codec"]): line for line in study_composition.lines(forms, codecs, tokens=512)
    }
    elements = 2 * 64 * 2  # of a token and head: layers, keys and values
    assert found["MHA", "fp16"]["bytes_a_token"] == pytest.approx(8 * elements * 2, rel=0.01)
    assert found["MQA", "int8"]["bytes_a_token"] == pytest.approx(elements * (1 + 2 / 64), rel=0.02)
    assert found["MQA", "int4"]["smaller"] == pytest.approx(8 * 16 / 5, rel=0.02)
    assert all(line["of_product"] == pytest.approx(1, abs=0.02) for line in found.values())


@pytest.mark.parametrize("form", ["q2c@0.25", "q2c@0.25(scope=layer)", *study_incremental.FORMS[1:]])
def test_a_choice_chunk_by_chunk_takes_each_chunks_share_and_in_one_chunk_is_the_whole_ones(
    tiny_model: Callable[[str], Path], form: str
) -> None:
    model, selector = load_model(str(tiny_model("llama")), threads=1), Codec(form).selector
    assert isinstance(selector, Selector)
    prefix = model.prefill(model.tokenize("Read this.", start=True), None).cache
    question = model.tokenize("Who mended the clock?")
    context = model.prefill(
        model.tokenize("The clock was mended by Ada in spring. " * 4), prefix, queries=None
    )
    tokens = context.cache.layers[0].tokens
    whole = selector.select(gather(model, Needs(question=True), prefix, context, question))

    def committed(chunk: int) -> study_incremental.Kept:
        online = OnlineSelection(model, selector, prefix, question)
        return study_incremental.committed(online, selector, context.cache, chunk)

    at_once, each = committed(tokens), committed(8)
    assert study_incremental.shared(at_once, whole) == 1
    assert each.tokens == round(selector.ratio * tokens) and study_incremental.shared(each, whole) < 1
    assert [each.within(start, start + 8) for start in range(0, tokens - 7, 8)] == [2] * (tokens // 8)
