"""Next-token distributions along a gold answer, and how far one set of them is from another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: What is held of one answer at most, in bytes of float32: with a vocabulary of 262,144, the first 64 tokens.
MAX_BYTES = 64 * 2**20


def log_probabilities(logits: Tensor) -> Tensor:
    """float32 log-probabilities of logits, [tokens, vocabulary], in nats."""
    return torch.log_softmax(logits.float(), dim=-1)


def mean_nll(log_probs: Tensor, answer: Sequence[int]) -> float:
    """Mean negative log-likelihood of the answer's tokens in nats; log_probs: [tokens, vocabulary]."""
    targets = torch.tensor(list(answer), device=log_probs.device)
    return float(torch.nn.functional.nll_loss(log_probs, targets))


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Mean over the answer's tokens of KL(reference ‖ other) in nats; both [tokens, vocabulary] log-probabilities.

    0 for equal ones and never below; NaN where either holds NaN. Tokens beyond the shorter of the two are left out. Raises
    ValueError where the vocabularies differ or there is no token.
    """
    tokens = min(len(reference), len(other))
    if not tokens or reference.shape[1] != other.shape[1]:
        raise ValueError(f"distributions of shapes {tuple(reference.shape)} and {tuple(other.shape)}")
    p, q = reference[:tokens].double(), other[:tokens].to(reference.device).double()
    # An impossible token contributes nothing; both sides may say -inf of it, whose difference is nan.
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    mean = float(terms.sum(-1).mean())
    return 0.0 if mean < 0 else mean  # rounding alone makes it negative; max() would make 0 of NaN


def to_bytes(log_probs: Tensor) -> bytes:
    """Little-endian float32 of the first tokens' log-probabilities, as many as `MAX_BYTES` hold, one token at least."""
    rows = max(1, MAX_BYTES // (4 * log_probs.shape[1]))
    return log_probs[:rows].float().cpu().contiguous().numpy().astype("<f4").tobytes()


def from_bytes(data: bytes, vocabulary: int) -> Tensor:
    """What `to_bytes` wrote, [tokens, vocabulary]. Raises ValueError where the bytes are no whole number of tokens."""
    if not data or len(data) % (4 * vocabulary):
        raise ValueError(f"{len(data)} bytes are no distributions over {vocabulary} tokens")
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, vocabulary)
