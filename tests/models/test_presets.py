"""The presets as they are fetched, against transformers' own path. Skipped where they are not in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.models.kvcache import join
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.sources import find

PREFIX = (
    "Context: The code for the red door is 4821. Snow fell on the hills.\n"
    "Question: What is the code for the red door?\nAnswer: 4821\n\n"
    "Context: Anna keeps bees. The key for the shed is 9034.\n"
    "Question: What is the key for the shed?\nAnswer: 9034\n\n"
)
FILLER = "The river runs past the old mill and the day was calm. "
LONG = ("north gate", "58831", 30, 46)  # longer than gemma's window
NEEDLES = {
    "smollm2-135m": [("blue boat", "73519", 3, 18), LONG],
    "gemma3-270m": [("green lamp", "2046", 9, 18), LONG],
}


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def preset(request: pytest.FixtureRequest) -> str:
    if not find(request.param).fetched:
        pytest.skip(f"{request.param} is not fetched: testbed models fetch {request.param}")
    return str(request.param)


@pytest.fixture(scope="module")
def edge(preset: str) -> LanguageModel:
    return load_model(preset)


@pytest.fixture(scope="module")
def cloud(preset: str) -> Iterator[LanguageModel]:
    """Loaded with the hub switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield load_model(preset)


@pytest.fixture(scope="module")
def plain(preset: str) -> Any:
    from transformers import AutoModelForCausalLM

    path: Path | None = find(preset).path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["short", "long"])
def test_the_split_path_answers_as_one_machine_and_as_transformers(
    edge: LanguageModel, cloud: LanguageModel, plain: Any, which: int
) -> None:
    thing, number, depth, sentences = NEEDLES[edge.name][which]
    needle = f"The pass number for the {thing} is {number}. "
    prefix = edge.tokenize(PREFIX, start=True)
    context = edge.tokenize("Context: " + FILLER * depth + needle + FILLER * (sentences - depth))
    question = edge.tokenize(f"\nQuestion: What is the pass number for the {thing}?\nAnswer:")

    at_home = edge.prefill(prefix, None).cache
    sent = edge.prefill(context, at_home).cache
    here = edge.generate(question, join(at_home, sent), 16, "\n")
    there_past = join(cloud.prefill(prefix, None).cache, sent.clone())
    assert cloud.generate(question, there_past, 16, "\n") == here
    first, second = (
        edge.prefill(question, join(at_home, sent)).logits,
        cloud.prefill(question, there_past).logits,
    )
    assert first is not None and second is not None and torch.equal(first, second)

    prompt = torch.tensor([prefix + context + question])
    whole = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    theirs = whole[0, prompt.shape[1] :].tolist()
    assert theirs[: len(here)] == here
    assert edge.text(here, "\n") == edge.text(theirs, "\n")
    if edge.name == "smollm2-135m":  # the other is not good enough at this for each needle
        assert edge.text(here).strip() == number


@pytest.mark.model
def test_figures_of_the_presets(edge: LanguageModel) -> None:
    expected = {"smollm2-135m": (30, 3, 64, 23_040), "gemma3-270m": (18, 1, 256, 18_432)}[edge.name]
    assert (edge.num_layers, edge.kv_heads, edge.head_dim, edge.kv_bytes_per_token) == expected
    windows = [edge.window(layer) for layer in range(edge.num_layers)]
    assert windows.count(512) == (15 if edge.name == "gemma3-270m" else 0)


@pytest.mark.model
def test_numbers_are_split_into_digits_as_the_model_was_trained(edge: LanguageModel) -> None:
    assert len(edge.tokenize("4821")) == 4
