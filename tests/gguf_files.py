"""GGUF files of tiny models, as llama.cpp would store them."""

from __future__ import annotations

import json
from pathlib import Path


def write_gguf(model: Path, path: Path, cutting: str | None = None, rows: int = 0) -> None:
    """A tiny llama or qwen2 under llama.cpp's names; of llama the rotary halves of q and k interleaved.

    cutting: how it says that the tokenizer cuts texts (`tokenizer.ggml.pre`); rows: of the embeddings' table, which is filled up
    behind the tokens.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    family, tokens = config["model_type"], config["vocab_size"]
    more = max(0, rows - tokens)
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(tokens + more)
    writer.add_tokenizer_model("gpt2")
    if cutting:
        writer.add_tokenizer_pre(cutting)
    padding = [f"[PAD{number}]" for number in range(tokens, tokens + more)]
    named = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    if family == "qwen2":  # transformers adds one of this name to a Qwen's tokenizer that has none
        named[config["eos_token_id"]] = "<|endoftext|>"
    writer.add_token_list(named + padding)
    writer.add_token_types([3, 3] + [1] * (tokens - 2) + [int(gguf.TokenType.UNUSED)] * more)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[family]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        for part, heads in (
            ("q_proj", config["num_attention_heads"]),
            ("k_proj", config["num_key_value_heads"]),
        ):
            if part in name and family == "llama":
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if "embed_tokens" in name or "lm_head" in name:
            tensor = np.pad(tensor, ((0, more), (0, 0)))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
