"""Best: steps beside a straight reference, the allocation beside every other, measurements named by what they say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.quantize import sensitivity
from testbed.codecs.quantize.sensitivity import ALPHABET, FORMAT, Place, Sensitivities, allocate, step_of
from testbed.codecs.spec import LONGEST
from testbed.diagnosis.sensitivity import main
from testbed.errors import SpecError
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.loading import load_model

LAYERS, HEADS, TOKENS, DIM = 3, 2, 70, 8
WHERE = torch.arange(TOKENS)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: where its measurements are."""
    monkeypatch.setattr(sensitivity.KEPT, "directory", lambda: tmp_path / "sensitivities")
    sensitivity.KEPT.known.cache_clear()
    return tmp_path


def cache(seed: int = 0) -> KVCache:
    generator = torch.Generator().manual_seed(seed)

    def part(layer: int) -> torch.Tensor:
        offset = 5 * torch.randn(HEADS, 1, DIM, generator=generator)
        return ((1 + layer) * torch.randn(HEADS, TOKENS, DIM, generator=generator) + offset).half()

    return KVCache([KVLayer(part(i), part(i), WHERE) for i in range(LAYERS)], TOKENS)


def measured(weights: list[float], model: str = "a-model") -> Sensitivities:
    """Gaussian heads at high resolution that cost so much, layer by layer and head by head, keys and values alike."""
    steps = [step_of(code) for code in range(len(ALPHABET))]
    share = 1 / (2 * LAYERS * HEADS)

    def place(weight: float) -> Place:
        bits = [max(2.05 - math.log2(step), 0.01) for step in steps]
        return Place(weight, share, bits, [step**2 / 12 for step in steps], len(ALPHABET) - 1)

    layers = [[place(weight) for weight in weights[i : i + HEADS]] for i in range(0, len(weights), HEADS)]
    return Sensitivities(FORMAT, "a test", model, layers, layers)


def test_each_head_has_the_step_that_its_letter_says() -> None:
    words = {"keys": "fghijk", "values": "ghg"}
    found = decode(Codec(f"best(plan=none, keys={words['keys']}, values={words['values']})").encode(cache()))
    for i, (back, full) in enumerate(zip(found.layers, cache().layers, strict=True)):
        for kind, ours, theirs in (("keys", back.keys, full.keys), ("values", back.values, full.values)):
            for h in range(HEADS):
                word = words[kind]
                step = 2 ** (ALPHABET.index(word[i] if len(word) == LAYERS else word[i * HEADS + h]) / 2 - 11)
                sent = float(np.float16(step))
                step = sent if sent >= step else float(np.nextafter(np.float16(step), np.float16(np.inf)))
                x = theirs[h].double().numpy()
                np.testing.assert_allclose(
                    ours[h].double().numpy(), np.round(x / step) * step, atol=2e-2, rtol=1e-3
                )
                assert np.abs(ours[h].double().numpy() - x).max() <= step / 2 + 2e-2


def test_a_step_too_fine_for_a_symbol_is_as_fine_as_one_allows() -> None:
    found = decode(Codec("best(plan=none, keys=000, values=000)").encode(cache()))
    for back, full in zip(found.layers, cache().layers, strict=True):
        for ours, theirs in ((back.keys, full.keys), (back.values, full.values)):
            reach = (theirs.float() - theirs.float().mean(1, keepdim=True)).abs().amax((1, 2))
            off = (ours.float() - theirs.float()).abs().amax((1, 2))
            assert bool((off <= reach / 126 * 0.51 + 2e-2).all())


@given(st.floats(1, 7))
def test_without_a_plan_bits_are_about_those_of_gaussian_heads(bits: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2000, 16, generator=generator).half()
    coded = Codec(f"best(bits={bits:.3f}, plan=none)").encode(
        KVCache([KVLayer(x, x, torch.arange(2000))], 2000)
    )
    assert abs(len(coded) * 8 / (2 * x.numel()) - bits) < 0.35


costs = st.lists(st.floats(1e-6, 1), min_size=4, max_size=4)


@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=4), st.floats(0, 1))
def test_no_allocation_of_as_few_bits_costs_less(
    tables: list[tuple[list[float], list[float]]], at: float
) -> None:
    choices = [sensitivity._Choice(sorted(kl), sorted(bits, reverse=True)) for kl, bits in tables]
    least, most = (sum(pick(choice.bits) for choice in choices) for pick in (min, max))
    budget = least + at * (most - least)
    steps = allocate(choices, budget * (1 + 1e-9))
    spent = sum(choice.bits[step] for choice, step in zip(choices, steps, strict=True))
    lost = sum(choice.kl[step] for choice, step in zip(choices, steps, strict=True))
    assert spent <= budget * (1 + 1e-6)
    for other in itertools.product(range(4), repeat=len(choices)):
        if sum(choice.bits[step] for choice, step in zip(choices, other, strict=True)) <= spent:
            kl = sum(choice.kl[step] for choice, step in zip(choices, other, strict=True))
            assert kl >= lost * (1 - 1e-6) - 1e-12


def test_where_errors_are_small_every_head_costs_alike_but_for_what_steps_are_apart() -> None:
    weights = [1.0, 16.0, 4.0, 4.0, 64.0, 0.25]
    keys, values = measured(weights).steps(4)
    assert keys == values
    worth = [w * step_of(ALPHABET.index(letter)) ** 2 for w, letter in zip(weights, keys, strict=True)]
    assert max(worth) <= 2 * min(worth) * (1 + 1e-9)


def test_a_budget_below_the_coarsest_steps_is_refused() -> None:
    with pytest.raises(SpecError, match=r"fewer than the coarsest steps take: 0\.01"):
        measured([1.0] * 6).steps(0.005)


def test_a_plan_is_written_into_the_text_and_its_payload_needs_no_file(machine: Path) -> None:
    name, path = sensitivity.KEPT.save(measured([1.0, 16.0, 4.0, 4.0, 64.0, 0.25]))
    bound = Codec("best(bits=3)", "a-model")
    assert str(bound) == str(Codec(f"best(bits=3, plan={name})")) == str(Codec(f"best(bits=3, plan={path})"))
    assert not bound.spec.refers and len(str(bound)) < LONGEST
    payload = bound.encode(cache())
    path.unlink()
    assert decode(payload).length == TOKENS
    with pytest.raises(
        SpecError, match=r"was not measured yet; run `python -m testbed\.diagnosis\.sensitivity a-model`"
    ):
        Codec("best(bits=3)", "a-model")
    with pytest.raises(SpecError, match="needs to know the model"):
        Codec("best(bits=3)")


def test_another_models_measurements_and_steps_are_refused(machine: Path) -> None:
    name, _ = sensitivity.KEPT.save(measured([1.0] * 6))
    with pytest.raises(SpecError, match="are of model 'a-model', not of 'another'"):
        Codec(f"best(plan={name})", "another")
    with pytest.raises(CodecError, match="steps of 5 heads or layers are not this cache's"):
        Codec("best(plan=none, keys=abcde, values=abcde)").encode(cache())


@given(st.binary(max_size=60))
def test_files_that_say_something_else_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("sensitivities") / "any.sensitivities"
    path.write_bytes(data)
    with pytest.raises(SpecError, match="sensitivities"):
        sensitivity.KEPT.load(path)


@pytest.mark.parametrize("by", ["head", "layer"])
def test_a_model_is_measured_and_its_payloads_are_as_long_as_that_foretells(
    machine: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str], by: str
) -> None:
    path = str(tiny_model("llama"))
    options = [
        "--task",
        "needle",
        "--examples",
        "1",
        "--context-tokens",
        "120",
        "--prompt",
        "plain",
        "--by",
        by,
    ]
    assert main([path, *options]) == 0
    name = capsys.readouterr().out.split()[1]
    model = load_model(path, threads=1)
    found = sensitivity.KEPT.known(name)
    assert [len(layer) for layer in found.keys] == [model.kv_heads] * model.num_layers
    assert all(place.weight > 0 for layer in (*found.keys, *found.values) for place in layer)
    assert sum(p.share for layer in (*found.keys, *found.values) for p in layer) == pytest.approx(1)
    context = model.prefill([(7 * i) % 50 + 3 for i in range(120)], None).cache
    sizes = [
        len(Codec(f"best(bits={bits}, plan={name})").encode(context)) * 16 / context.nbytes for bits in (3, 6)
    ]
    assert sizes[0] < sizes[1] and abs(sizes[1] - 6) < 1
    assert main([path, "--task", "no-such-task"]) == 2
