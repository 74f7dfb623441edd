"""Tiny random models of the supported families, with a real tokenizer, written as a directory that `load_model` takes.

`tiny_model` is a fixture: import it in a ``conftest.py``, then ``load_model(str(tiny_model("llama")))`` in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START, END = "<|start|>", "<|end|>"
WINDOW = 8  #: tokens; of the families that have sliding-window layers

_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "pad_token_id": 0,
}

#: family -> (transformers' config class, settings beyond the common ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama multi-query": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": None, "pad_token_id": 0}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    # Multi-head, attention and MLP in parallel, rotary position on half of each head.
    "gpt neox": ("GPTNeoXConfig", {"rotary_pct": 0.5, "use_parallel_residual": True}),
    # Latent attention: the cache holds a latent and a rotary key that all heads share.
    "deepseek v2": ("DeepseekV2Config", {**_LATENT, "topk_method": "greedy", "norm_topk_prob": False}),
    "deepseek v3": ("DeepseekV3Config", _LATENT),
}

#: Further shapes of the same families, for what depends on how heads and layers are arranged.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama multi-head": ("LlamaConfig", {"num_key_value_heads": 4}),
    # Qwen2.5 is Qwen2's architecture; its long-context releases let the later layers slide.
    "qwen2 half sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    # Other frequencies from 64 tokens on, as Phi 3.5 has them from 4,096 on.
    "phi3 long": (
        "Phi3Config",
        {
            "sliding_window": None,
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0 + i for i in range(8)],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral full": ("MistralConfig", {"sliding_window": None}),
    "gpt neox whole rotary": ("GPTNeoXConfig", {"rotary_pct": 1.0, "use_parallel_residual": False}),
}

_SHARED: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

#: Architectures whose attention or cache has something that the families' has not.
NEWEST: dict[str, tuple[str, dict[str, Any]]] = {
    # Attention sinks: a score of each head that no token's value stands behind.
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": WINDOW,
        },
    ),
    # Three layers that see their own chunk alone, and one without rotary positions that sees everything.
    "llama4_text": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 64,
            "head_dim": 16,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
        },
    ),
    # The last two layers attend to what the first two cached.
    "gemma3n_text": (
        "Gemma3nTextConfig",
        {
            **_SHARED,
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4_text": ("Gemma4TextConfig", {**_SHARED, "global_head_dim": 32}),
}

#: Models of the same tokenizer that are larger or smaller than the families'.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family} small": (
        FAMILIES[family][0],
        {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    )
    for family in ("llama", "qwen2")
} | {
    "llama long": ("LlamaConfig", {"num_hidden_layers": 2, "max_position_embeddings": 40_960}),
    # A table of embeddings that is longer than the tokenizer's numbers need, as Qwen's are.
    "qwen2 padded": ("Qwen2Config", {"hidden_size": 32, "vocab_size": 70_000}),
}

_WORDS = """
Context: The harbour clock was mended in spring by Anna Lind, and the keeper wrote the code 4821 on a blue card.
Question: Who mended the clock? Answer: Anna Lind
The river runs past the old mill, and in the evening the bell of the town rings seven times over the market.
What is the number of the red door? The number of the red door is 9036, said the woman who keeps the keys.
A train leaves the station at noon; it carries mail, milk, and three passengers to the villages in the hills.
When did the library open? The library opened in 1897, when the council bought the house of a retired captain.
"""


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on a few sentences: any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS], trainer)
    return tokenizer


def tiny_model_directory(family: str = "llama", path: Path | None = None, seed: int = 0) -> Path:
    """Write a seeded random model of 3 layers (4 query heads, 2 key/value heads of 16) to `path` and return it.

    Weights are large enough for the greedy answer to depend on the whole prompt. Gemma's tokenizers put a start token.
    """
    import tempfile

    import torch
    import transformers
    from tokenizers import processors

    path = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-")) if path is None else path
    tokenizer = tiny_tokenizer()
    if family.startswith("gemma"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
        )
    kind, settings = (FAMILIES | SHAPES | SIZES | NEWEST)[family]
    common = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(START),
        "eos_token_id": tokenizer.token_to_id(END),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**{**common, **settings}), dtype=torch.float32
        )
    network.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model(family) -> the directory of that family's tiny model, written once a session."""
    root = tmp_path_factory.mktemp("tiny-models")

    def directory(family: str = "llama") -> Path:
        path = root / family
        return path if (path / "config.json").exists() else tiny_model_directory(family, path)

    return directory
