"""Turn a GGUF file into a directory that loads fast: `python -m testbed.models.convert FILE DIRECTORY`.

Weights are dequantized once and kept in float32, which loads by mapping the file (0.2 s for 540 MB, shared
between processes) where 16-bit weights would be converted at each load (1.4 s) into memory of each
process's own. Runs as a process of its own: `sources` needs no torch then, and the peak of memory goes when
it ends.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

_OF_TOKENIZER = ("tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
_UNUSED = 5  #: gguf.TokenType.UNUSED


def convert(gguf_file: Path, directory: Path) -> None:
    """Write config, tokenizer and float32 safetensors of `gguf_file` into `directory`."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers parses the file afresh for the config, the tokenizer and the weights: 5 to 20 s each time.
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    where: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **where)
    network = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **where)
    # save_pretrained refuses a model that still says that it is quantized.
    network.hf_quantizer = None
    network.is_quantized = False
    for owner, name in ((network, "quantization_method"), (network.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _mend_tokenizer(gguf.GGUFReader(str(gguf_file)), directory / "tokenizer.json")


def _mend_tokenizer(reader: Any, path: Path) -> None:
    """Say what transformers' conversion forgets: how a family cuts texts, which a GGUF file says by a name alone. SmolLM's
    tokenizer splits numbers into digits, and Qwen2's composes letters and their marks first. And forget what fills
    the table of embeddings up: models of one tokenizer have tables of several lengths.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    facts = {name: field.contents() for name, field in reader.fields.items() if name in _OF_TOKENIZER}
    cutting = facts.get("tokenizer.ggml.pre")
    if cutting == "qwen2":
        tokenizer["normalizer"] = {"type": "NFC"}
    if cutting == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        splits = [digits, tokenizer["pre_tokenizer"]]
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits}
    names, kinds = facts.get("tokenizer.ggml.tokens", ()), facts.get("tokenizer.ggml.token_type", ())
    vocabulary = tokenizer["model"]["vocab"]
    for number, (name, kind) in enumerate(zip(names, kinds, strict=False)):
        if kind == _UNUSED and name == f"[PAD{number}]" and isinstance(vocabulary, dict):
            vocabulary.pop(name, None)
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
