"""Rotary embeddings that depend on how long a prompt is: read in stretches, a prompt is what it is in one pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from testbed.endpoints.edge import Edge
from testbed.endpoints.protocol import Load, Prepare, Reference
from testbed.errors import UsageError
from testbed.models.kvcache import join
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from tests.models import reference
from tests.tiny_models import tiny_model_directory

Tiny = Callable[[str], Path]
BOUNDARY = 64
PROMPT = [3 + 7 * i % 300 for i in range(90)]


def in_stretches(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """The last logits of a prompt read in three stretches."""
    prefix = model.prefill(ids[:20], None).cache
    context = model.prefill(ids[20:-10], prefix).cache
    logits = model.prefill(ids[-10:], join(prefix, context)).logits
    assert logits is not None
    return logits


def in_one_pass(directory: Path, ids: list[int]) -> torch.Tensor:
    """The same of transformers."""
    network = reference.reference_network(directory, "eager")
    with torch.no_grad():
        logits: torch.Tensor = network(torch.tensor([ids])).logits[0, -1]
    return logits


#: What a kind of rotary embedding needs to be told.
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": BOUNDARY},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": BOUNDARY,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BOUNDARY,
    },
    "proportional": {},
}


@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_a_prompt_in_three_stretches_is_the_same_as_in_one_pass(tmp_path: Path, kind: str) -> None:
    directory = tiny_model_directory("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]}
    config["max_position_embeddings"] = len(PROMPT)
    (directory / "config.json").write_text(json.dumps(config))
    model = load_model(str(directory), threads=1, cache_dtype=torch.float32)
    torch.testing.assert_close(
        in_stretches(model, PROMPT), in_one_pass(directory, PROMPT), atol=1e-5, rtol=1e-5
    )


def test_angles_that_are_scaled_by_length_are_held_too(tmp_path: Path) -> None:
    """Phi 3.5 MoE's rotary module decides by itself, and on a scale."""
    config = transformers.PhimoeConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=2, sliding_window=None, initializer_range=0.15,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_mscale": 1.0, "long_mscale": 1.5, **KINDS["longrope"],
        },
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    directory = tiny_model_directory("llama", tmp_path)
    (directory / "model.safetensors").unlink()
    network.save_pretrained(directory)
    model = load_model(str(directory), threads=1, cache_dtype=torch.float32)
    torch.testing.assert_close(
        in_stretches(model, PROMPT), in_one_pass(directory, PROMPT), atol=1e-5, rtol=1e-5
    )


def test_short_prompts_are_turned_as_short_ones_where_that_is_expected(tiny_model: Tiny) -> None:
    directory = tiny_model("phi3 long")
    model = load_model(str(directory), threads=1, cache_dtype=torch.float32)
    short = PROMPT[: BOUNDARY - 4]
    whole = in_one_pass(directory, short)
    assert not torch.allclose(in_stretches(model, short), whole, atol=1e-3)
    for expected in (BOUNDARY, len(PROMPT), BOUNDARY):
        model.expect(expected)
        ids = PROMPT[:expected] if expected > BOUNDARY else short
        torch.testing.assert_close(
            in_stretches(model, ids), in_one_pass(directory, ids), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(UsageError, match=r"65 tokens is too long .* told to expect 64"):
        model.prefill(PROMPT[:65], None)
    assert len(model.generate(short, None, 20, None)) <= 5


def test_the_told_rotation_is_that_of_the_expected_length(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("phi3 long")), threads=1)
    frequencies = {}
    for length in (BOUNDARY, None):
        model.expect(length)
        rope = model.knowing_ropes(model.prefill(PROMPT[:20], None).cache).layers[0].rope
        assert rope is not None
        frequencies[length] = rope.frequencies
    factors = [a / b for a, b in zip(frequencies[BOUNDARY], frequencies[None], strict=True)]
    assert factors == pytest.approx([2 + i for i in range(8)], rel=1e-3)


def test_each_length_of_a_run_is_read_as_transformers_reads_the_whole_prompt(tmp_path: Path) -> None:
    """One task at two lengths, on either side of the boundary, with one prefix."""
    directory = tiny_model_directory("phi3 long", tmp_path)
    boundary = 700
    config = json.loads((directory / "config.json").read_text())
    config["original_max_position_embeddings"] = boundary
    config["rope_parameters"]["original_max_position_embeddings"] = boundary
    (directory / "config.json").write_text(json.dumps(config))
    edge = Edge()
    edge.load(Load(str(directory), "cpu", "float32", 1))
    reaches = []
    for tokens in (150, 800):
        made = edge.prepare(Prepare("needle", context_tokens=tokens, max_new_tokens=4))
        reaches.append(made.prefix.reach or 0)
    assert reaches[0] < boundary < reaches[1]
    network = reference.reference_network(directory, "eager")
    for batch in (0, 1, 0):
        measured = edge.reference(Reference(batch, 0)).nll
        task, example = edge._batches[batch].task, edge._batches[batch].examples[0]
        answer = edge.model.tokenize(task.answer_text(example))
        texts = (task.context_text(example), task.question_text(example))
        ids = edge.model.tokenize(task.prefix, start=True)
        for text in texts:
            ids += edge.model.tokenize(text)
        with torch.no_grad():
            logits = network(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = -float(logits[range(len(answer)), answer].mean())
        assert measured == pytest.approx(expected, abs=2e-3)  # caches are rounded to 16 bits
