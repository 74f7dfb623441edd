"""A testbed for split LLM inference: real models, real compressed KV caches, emulated links that prove themselves."""

__version__ = "0.1.0"
