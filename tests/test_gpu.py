"""What a real GPU must do as the processor does; skipped where torch finds none.

Where there is one, the models of `codecs/test_sixteen_bit_models.py` compute on it, too; all other tests' on the processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch

from testbed.codecs.codec import Codec, decode
from testbed.endpoints.protocol import Compute, Computed
from testbed.endpoints.side import Pace
from testbed.experiment import gate
from testbed.models.loading import load_model
from tests.codecs import test_every_codec as every
from tests.codecs import test_second_device as second
from tests.codecs.caches import cache_of, same_cache
from tests.endpoints.pair import in_this_process
from tests.tiny_models import FAMILIES

ON_GPUS = True
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")

CODECS = [
    *dict.fromkeys([*second.CODECS, *every.CODECS, "int8", "int3(symmetric=true)", "int4(axis=channel)"])
]
#: A GPU adds up in another order, and of equal outliers takes others: a norm, a symbol or an outlier may be another one.
INEXACT = ("normsep", "turbo", "kvquant")
CACHES = ["alike", "unlike, in bf16", "ragged", "uneven, in bf16"]
TEXT = "Context: The harbour clock was mended in spring by Anna Lind, and the keeper wrote the code 4821."


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("text", CODECS)
def test_payloads_and_what_they_are_decoded_to_are_the_processors(text: str, name: str) -> None:
    cache = cache_of(name)
    payload = Codec(text).encode(cache)
    ours = Codec(text).encode(cache.to("cuda"))
    decoded = decode(payload, "cuda")
    assert all(layer.keys.is_cuda and layer.positions.is_cuda for layer in decoded.layers)
    if not text.startswith(INEXACT):
        assert bytes(ours) == bytes(payload)
        assert same_cache(decoded.to("cpu"), decode(payload))
        return
    assert len(ours) == len(payload)
    for other in (decoded.to("cpu"), decode(ours)):
        for a, b in zip(other.layers, decode(payload).layers, strict=True):
            for found, expected in ((a.keys.float(), b.keys.float()), (a.values.float(), b.values.float())):
                alike = torch.isclose(found, expected, rtol=0.02, atol=0.01)
                assert (
                    found.shape == expected.shape and alike.sum() >= 0.98 * alike.numel()
                )  # a layer may be empty


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_sixteen_bits_attends_and_turns_its_keys_there_as_on_the_processor(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    """What queries of the prompt's end pay to each token, and the frequencies that its keys were found to be turned by."""
    path = str(tiny_model(family))
    ours, theirs = (load_model(path, device, "bfloat16", 1) for device in ("cuda", "cpu"))
    ids = ours.tokenize(TEXT, start=True)
    found, expected = (m.prefill(ids, None, queries=5, attention=True) for m in (ours, theirs))
    assert ours.dtype == torch.bfloat16 and found.cache.layers[0].keys.is_cuda
    for a, b in zip(found.attention, expected.attention, strict=True):
        torch.testing.assert_close(a.cpu().float(), b.float(), atol=0.05, rtol=0.05)
    ropes = [
        [layer.rope for layer in m.knowing_ropes(r.cache).layers]
        for m, r in ((ours, found), (theirs, expected))
    ]
    assert ropes[0] == ropes[1]


def test_a_stage_ends_when_the_gpu_has_done_its_work() -> None:
    pace = Pace(device=torch.device("cuda"))
    torch.cuda.synchronize()
    started, done = pace.begin(), torch.cuda.Event()
    torch.cuda._sleep(200_000_000)  # of its cycles: a tenth of a second, more or less
    done.record()
    given = time.monotonic() - started
    assert not done.query()
    took = pace.hold() - started
    assert done.query() and took > 10 * given


def test_a_pair_answers_there_and_its_gate_finds_both_sides_alike(tiny_model: Callable[[str], Path]) -> None:
    pair = in_this_process(tiny_model("llama"), device="auto", dtype="bfloat16")
    assert pair.loaded[0].device.startswith("cuda")
    reference = pair.reference()
    for codec in ("fp16", "int8", "q2c@0.25+int4", "h2o@0.5", "snapkv@0.5+kivi"):
        result = pair.ask(codec, reuse="none")
        assert result.stages.total() == pytest.approx(result.e2e_s, rel=0, abs=1e-6)
        assert pair.outcome(result).tokens_kept > 0
        if codec == "fp16":
            assert result.answer == reference.answer

    class Sides:
        def compute(self, side: str) -> Computed:
            return pair.edge.call(Compute())

    gate.measure(Sides(), 1)
    measured = [gate.measure(Sides(), 5) for _ in range(5)]
    print(
        [(m.edge.median_s, m.cloud.median_s, m.edge.least_s, m.edge.most_s, m.edge.share) for m in measured]
    )
    assert 1 / gate.GROSS < median(m.ratio for m in measured) < gate.GROSS
