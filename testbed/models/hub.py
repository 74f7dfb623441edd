"""Models of the Hugging Face hub by short names: the published study's families and their successors. Descriptions only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubModel:
    """A hub id under a name of ours. `gated`: the hub wants its licence accepted and a token before it gives the weights."""

    name: str
    id: str
    description: str
    license: str
    gated: bool = False


HUB_MODELS = {
    model.name: model
    for model in (
        HubModel("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 8B Instruct", "Llama 3.1", True),
        HubModel("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 1B Instruct", "Llama 3.2", True),
        HubModel("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2 3B Instruct", "Llama 3.2", True),
        HubModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen 2.5 0.5B Instruct", "Apache-2.0"),
        HubModel("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "Qwen 2.5 7B Instruct", "Apache-2.0"),
        HubModel("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "Qwen 2.5 14B Instruct", "Apache-2.0"),
        HubModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Qwen 3 0.6B", "Apache-2.0"),
        HubModel("qwen3-8b", "Qwen/Qwen3-8B", "Qwen 3 8B", "Apache-2.0"),
        HubModel("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B Instruct v0.3", "Apache-2.0"),
        HubModel("yi-6b", "01-ai/Yi-1.5-6B-Chat", "Yi 1.5 6B Chat", "Apache-2.0"),
        HubModel("phi3.5-mini", "microsoft/Phi-3.5-mini-instruct", "Phi 3.5 mini Instruct, 3.8B", "MIT"),
        HubModel("gemma2-2b", "google/gemma-2-2b-it", "Gemma 2 2B Instruct", "Gemma", True),
        HubModel("gemma3-1b", "google/gemma-3-1b-it", "Gemma 3 1B Instruct", "Gemma", True),
        HubModel("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama 1.1B Chat", "Apache-2.0"),
        HubModel("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "SmolLM2 1.7B Instruct", "Apache-2.0"),
        HubModel(
            "deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite-Chat", "DeepSeek V2 Lite Chat, latent cache", "DeepSeek"
        ),
    )
}  # fmt: skip
