"""The language model: where it comes from, its KV cache in and out, its attention scores, greedy decoding.

This package imports nothing, so that processes which only name models (see `sources`) load no torch.
"""
