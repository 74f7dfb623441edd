from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from testbed.models.loading import load_model
from testbed.models.rotary import Rotation, unrotated
from tests.models.reference import reference_network
from tests.tiny_models import FAMILIES, NEWEST

Tiny = Callable[[str], Path]

TEXT = "Context: The harbour clock was mended in spring by Anna Lind, and the keeper wrote the code 4821."
LLAMA_SHAPED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", [*FAMILIES, *NEWEST])
def test_a_rotation_undone_at_one_position_and_applied_at_another_is_the_models_own(
    tiny_model: Tiny, family: str
) -> None:
    # A lone token's sink leaves it a share that rounded keys would change.
    model = load_model(str(tiny_model(family)), threads=1, cache_dtype=torch.float32)
    at = {position: model._queries_at(position) for position in (0, 5, 1000)}
    for layer in range(model.num_layers):
        rotation = model.rotation(layer)
        plain = rotation.undo(at[5][layer], torch.tensor([5]))
        for position, queries in at.items():
            turned = rotation.apply(plain, torch.tensor([position]))
            torch.testing.assert_close(turned, queries[layer], atol=2e-4, rtol=1e-3)
        turns = float((at[5][layer] - at[0][layer]).abs().max()) > 0.01
        assert turns == rotation.turns == ((family, layer) != ("llama4_text", 3))


@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_queries_before_the_rotation_are_what_the_projection_gives(tiny_model: Tiny, family: str) -> None:
    model = load_model(str(tiny_model(family)), threads=1, cache_dtype=torch.float32)
    ids = model.tokenize(TEXT, start=True)
    result = model.prefill(ids, None, queries=None)
    network = reference_network(tiny_model(family), "eager")
    projected: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(network.model.layers):
        source = getattr(block.self_attn, "q_norm", None) or block.self_attn.q_proj
        source.register_forward_hook(lambda m, i, out, layer=layer: projected.__setitem__(layer, out[0]))
    with torch.no_grad():
        network(torch.tensor([ids]))
    for layer in range(model.num_layers):
        expected = projected[layer]
        if expected.shape[0] == len(ids):  # not yet brought into heads
            expected = expected.reshape(len(ids), 4, 16).transpose(0, 1)
        plain = model.rotation(layer).undo(result.queries[layer], result.query_positions)
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt neox", "deepseek v3"])
def test_the_mean_of_rotations_is_the_mean_of_what_they_do(tiny_model: Tiny, family: str) -> None:
    rotation = load_model(str(tiny_model(family)), threads=1).rotation(1)
    x = torch.randn(3, 1, rotation.head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40, 60)
    one_by_one = torch.stack([rotation.apply(x, position[None]) for position in positions]).mean(0)
    torch.testing.assert_close(x @ rotation.mean(positions).T, one_by_one, atol=1e-5, rtol=1e-4)


def test_a_model_without_a_rotation_has_nothing_undone() -> None:
    x = torch.randn(2, 5, 8)
    rotation = unrotated(8, torch.device("cpu"))
    assert torch.equal(rotation.undo(x, torch.arange(5)), x)
    assert torch.equal(rotation.mean(torch.arange(3, 9)), torch.eye(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_in_plain_numbers_is_the_models_own(tiny_model: Tiny, family: str) -> None:
    model = load_model(str(tiny_model(family)), threads=1)
    at = torch.tensor([0, 7, 300, 4000])
    for layer in range(model.num_layers):
        rotation = model.rotation(layer)
        x = torch.randn(2, 4, rotation.head_dim, generator=torch.Generator().manual_seed(0))
        rope = rotation.rope()
        assert rope is not None and rope.fits(rotation.head_dim)
        torch.testing.assert_close(rope.turn(x, at), rotation.apply(x, at), atol=2e-3, rtol=0)


def test_what_turns_by_no_steady_frequency_has_no_plain_numbers() -> None:
    def slowing(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[:, None].float().sqrt() * torch.tensor([1.0, 0.1])
        return angle.cos(), angle.sin()

    assert Rotation(slowing, slice(0, 2), slice(2, 4), 4).rope() is None
    assert unrotated(8, torch.device("cpu")).rope() is None
