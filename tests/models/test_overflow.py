"""What becomes of NaN and infinity: named, and never taken for an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from testbed.errors import NotFiniteError, UsageError
from testbed.experiment.results import RunDirectory
from testbed.experiment.runner import Runner
from testbed.experiment.session import in_one_process
from testbed.guide.guide import unlinked
from testbed.models.kvcache import KVCache
from testbed.models.likelihood import log_probabilities, mean_kl
from testbed.models.loading import load_model
from testbed.models.scores import attention_sum
from testbed.tasks.prompt import Prompted, choose_prompt
from testbed.tasks.task import make_task
from tests.tiny_models import tiny_model_directory

Tiny = Callable[[str], Path]


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A tiny model whose weights were changed."""
    directory = tiny_model_directory("llama", path)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_format_that_a_model_overflows_in_is_refused_at_load(tmp_path: Path) -> None:
    def larger(weights: dict[str, torch.Tensor]) -> None:
        for name in ("up_proj", "down_proj"):
            weights[f"model.layers.1.mlp.{name}.weight"] *= 1000

    directory = changed(tmp_path / "large", larger)
    with pytest.raises(
        UsageError, match="overflows in float16 from layer 2 on; use dtype=bfloat16 or float32"
    ):
        load_model(str(directory), dtype="float16", threads=1)
    for dtype in ("bfloat16", "float32"):
        load_model(str(directory), dtype=dtype, threads=1)


def test_a_cache_format_that_keys_lie_beyond_is_refused_at_load(tmp_path: Path) -> None:
    def larger(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.self_attn.v_proj.weight"] *= 1e6

    directory = changed(tmp_path / "large", larger)
    with pytest.raises(
        UsageError, match="values of layer 1 lie beyond float16, which its caches are held in"
    ):
        load_model(str(directory), threads=1)
    load_model(str(directory), dtype="bfloat16", threads=1)


def test_a_model_with_damaged_weights_is_refused_at_load(tmp_path: Path) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan

    with pytest.raises(
        UsageError, match="NaN or infinity in float32 in its logits; its weights may be damaged"
    ):
        load_model(str(changed(tmp_path / "damaged", damage)), threads=1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nothing_is_computed_from_a_cache_that_holds_no_numbers(tiny_model: Tiny, wrong: float) -> None:
    model = load_model(str(tiny_model("llama")), threads=1)
    ids = model.tokenize("Context: the keeper wrote the code 4821.")
    cache = model.prefill(ids, None).cache
    cache.layers[1].keys[0, 3, 0] = wrong
    passes: list[Callable[[KVCache], Any]] = [
        lambda past: model.prefill(ids, past),
        lambda past: model.generate(ids, past, 4, None),
        lambda past: model.nll(ids, ids, past),
        lambda past: model.option_nlls(ids, [ids, ids[:2]], past),
    ]
    for run in passes:
        with pytest.raises(NotFiniteError, match="holds NaN or infinity in layer 1"):
            run(cache)


def test_what_only_a_sliding_window_saw_is_noticed_too(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("mistral")), threads=1)
    ids = model.tokenize(
        "Context: the keeper wrote the code 4821 on a blue card, and the bell rang seven times."
    )
    with torch.no_grad():
        model._network.model.embed_tokens.weight[ids[0]] = torch.nan
    with pytest.raises(NotFiniteError, match="from layer 0 on"):
        model.prefill(ids, None)


def test_the_divergence_from_or_of_nothing_is_not_zero() -> None:
    numbers = log_probabilities(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)))
    nothing = numbers.clone()
    nothing[1, 7] = torch.nan
    assert math.isnan(mean_kl(numbers, nothing)) and math.isnan(mean_kl(nothing, numbers))
    assert math.isnan(mean_kl(numbers, torch.full_like(numbers, torch.nan)))


def test_attention_to_a_key_that_is_no_number_is_none_either() -> None:
    queries, keys = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    keys[0, 1, 0] = torch.nan
    # The first query comes before every key, so it sees none.
    where: dict[str, Any] = {
        "query_positions": torch.tensor([0, 5, 6]),
        "key_positions": torch.tensor([1, 2, 3]),
    }
    paid = attention_sum(queries, keys, **where, scaling=0.5)
    assert paid[0].isnan().all() and paid[1].isfinite().all()
    assert float(paid[1].sum()) == pytest.approx(2)


@pytest.mark.slow
def test_an_example_that_overflows_leaves_rows_that_say_why_and_the_others_are_measured(
    tmp_path: Path,
) -> None:
    from testbed.models.loading import _tokenizer
    from testbed.models.sources import resolve

    made = tiny_model_directory("llama", tmp_path / "whole")
    tokenizer, _ = _tokenizer(resolve(str(made)))
    task = Prompted(make_task("needle"), choose_prompt("auto", "tiny"))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    examples = task.examples(3, 150, lambda text: len(ids(text)), 0)
    used = [set(ids(task.context_text(example))) for example in examples]
    own = (
        used[1]
        - used[0]
        - used[2]
        - set(ids(task.prefix))
        - {t for e in examples for t in ids(task.question_text(e))}
    )

    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][max(own)] = torch.inf

    settings = {
        "name": "overflow", "model": str(changed(tmp_path / "model", damage)), "tasks": ["needle"], "codecs": ["int8"],
        "context_tokens": 150, "examples": 3, "threads": 1, "max_new_tokens": 4,
    }  # fmt: skip
    directory = RunDirectory.create(tmp_path / "run")
    directory.write("manifest.json", {})
    started = Runner(unlinked(settings, "test"), directory, lambda *_: None, opening=in_one_process)
    started.execute()
    rows = {
        row["example"]: row
        for row in map(json.loads, (tmp_path / "run" / "trials.jsonl").read_text().split("\n")[:-1])
    }
    failed = rows.pop(examples[1].id)
    assert "in float32 from layer 0 on" in failed["error"]
    assert (
        failed["answer"] == "" and failed["nll"] is None and failed["kl"] is None and failed["score"] is None
    )
    assert started.failures == 1 and len(rows) == 2
    assert all(
        not row["error"] and math.isfinite(row["nll"]) and math.isfinite(row["kl"]) for row in rows.values()
    )
