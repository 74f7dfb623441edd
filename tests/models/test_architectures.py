"""Architectures beyond the families of the other tests: read in stretches as in one pass, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from testbed.errors import UsageError
from testbed.models.kvcache import join
from testbed.models.loading import load_model
from tests.models import reference
from tests.tiny_models import NEWEST, tiny_tokenizer

_OLD: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_USUAL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_USUAL, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
_LINEAR: dict[str, Any] = {
    **_GROUPED, "head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16}

READ: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _OLD),
    "opt": ("OPTConfig", {**_USUAL, "ffn_dim": 64, "word_embed_proj_dim": 64}),
    "phi": ("PhiConfig", _GROUPED),
    "stablelm": ("StableLmConfig", _GROUPED),
    "stablelm norms": ("StableLmConfig", {**_GROUPED, "qk_layernorm": True}),
    "nemotron": ("NemotronConfig", {**_GROUPED, "head_dim": 16}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "cohere2": ("Cohere2Config", {**_GROUPED, "sliding_window": 8}),
    "granite": ("GraniteConfig", _GROUPED),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "cohere": ("CohereConfig", _GROUPED),
    "olmo3": ("Olmo3Config", {**_GROUPED, "sliding_window": 8}),
    **{name: (kind, {**_GROUPED, **settings}) for name, (kind, settings) in NEWEST.items()},
}
OWN_CODE = "computes its attention in code of its own"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("FalconConfig", {**_USUAL, "alibi": False}, OWN_CODE),
    "falcon alibi": ("FalconConfig", {**_USUAL, "alibi": True}, OWN_CODE),
    "gptj": ("GPTJConfig", {**_OLD, "rotary_dim": 8}, OWN_CODE),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        OWN_CODE,
    ),
    "codegen": ("CodeGenConfig", {**_OLD, "rotary_dim": 8}, OWN_CODE),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, OWN_CODE),
    "mpt": ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}, OWN_CODE),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_LINEAR, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32},
        "layers of the kinds linear_attention",
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", _LINEAR, "layers of the kinds linear_attention"),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {**_GROUPED, **_MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
         "shared_intermediate_size": 64},
        "layers of the kinds linear_attention",
    ),
    "lfm2": ("Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}, "layers of the kinds conv"),
    "falcon_h1": ("FalconH1Config", {**_GROUPED, **_MAMBA, "mamba_d_ssm": 128}, "layers of the kinds hybrid"),
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2}, OWN_CODE),
    "bert": ("BertConfig", {**_USUAL, "intermediate_size": 64}, "sees later tokens"),
    "gemma3_text": (
        "Gemma3TextConfig",
        {**_GROUPED, "head_dim": 16, "use_bidirectional_attention": True},
        "sees later tokens",
    ),
}  # fmt: skip


def written(path: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A tiny random model of a config class."""
    tokenizer = tiny_tokenizer()
    config = getattr(transformers, kind)(vocab_size=tokenizer.get_vocab_size(), **settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", READ)
def test_a_prompt_in_three_stretches_is_the_same_as_in_one_pass(name: str, tmp_path: Path) -> None:
    directory = written(tmp_path, *READ[name])
    model = load_model(str(directory), threads=1, cache_dtype=torch.float32)
    ids = [3 + 7 * i % 300 for i in range(60)]
    prefix = model.prefill(ids[:20], None).cache
    context = model.prefill(ids[20:50], prefix).cache
    ours = model.prefill(ids[50:], join(prefix, context)).logits
    with torch.no_grad():
        whole = reference.reference_network(directory, "eager")(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    kind, settings, reason = REFUSED[name]
    directory = written(tmp_path, kind, settings)
    with pytest.raises(UsageError) as caught:
        load_model(str(directory), threads=1)
    assert f"architecture {name.partition(' ')[0]!r} is not supported: " in str(caught.value)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][2] != "sees later tokens"])
def test_it_is_refused_by_its_configuration_before_weights_are_fetched(name: str, tmp_path: Path) -> None:
    kind, settings, reason = REFUSED[name]
    directory = written(tmp_path, kind, settings)
    for weights in directory.glob("*.safetensors*"):
        weights.write_bytes(b"")
    with pytest.raises(UsageError, match=reason):
        load_model(str(directory), threads=1)
