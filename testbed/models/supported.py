"""What an architecture's configuration says of its cache, before any weights are there."""

from __future__ import annotations

import sys
from typing import Any

from testbed.models.attention import OWN_CODE

#: Kinds of layers that attend to keys and values.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def refusal(config: Any) -> str:
    """Why a model cannot be used whose cache or attention is of a kind that codecs do not take; empty where nothing says so.

    config: transformers'. Recurrent and convolution states (Mamba, linear attention, LFM2) are no keys and values of tokens: none
    can be left out, and no codec here sends them.
    """
    from transformers import AutoModelForCausalLM

    strange = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - _ATTENTION
    if strange:
        return f"it has layers of the kinds {', '.join(sorted(strange))}, whose state is no cache of keys and values"
    network = AutoModelForCausalLM._model_mapping.get(type(config), None)
    code = sys.modules.get(getattr(network, "__module__", ""))
    return OWN_CODE if code is not None and not hasattr(code, "ALL_ATTENTION_FUNCTIONS") else ""


def sources(config: Any) -> dict[int, int]:
    """Of the layers that attend to an earlier one's keys and values (Gemma 3n, Gemma 4), which one that is.

    config: the text's. They are the last ones, and take the last layer of their kind before them.
    """
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return {
        layer: max(earlier for earlier in range(own) if kinds[earlier] == kinds[layer])
        for layer in range(own, config.num_hidden_layers)
    }
