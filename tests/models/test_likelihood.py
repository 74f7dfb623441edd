"""Next-token distributions: against the formula in plain Python, and against what scipy says."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from testbed.models.likelihood import from_bytes, log_probabilities, mean_kl, mean_nll, to_bytes


def drawn(seed: int, tokens: int = 3, vocabulary: int = 50) -> torch.Tensor:
    return log_probabilities(
        torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    )


def test_kl_is_scipys_relative_entropy_averaged_over_the_tokens() -> None:
    p, q = drawn(0), drawn(1)
    expected = (
        sum(scipy.stats.entropy(a, b) for a, b in zip(p.double().exp(), q.double().exp(), strict=True)) / 3
    )
    assert mean_kl(p, q) == pytest.approx(expected, rel=1e-6)
    assert mean_kl(q, p) != pytest.approx(expected, rel=1e-3)


def test_kl_of_equal_distributions_is_zero_and_of_nearly_equal_ones_not_negative() -> None:
    p = drawn(2)
    assert mean_kl(p, p.clone()) == 0
    assert 0 <= mean_kl(p, log_probabilities(p + 1e-6)) < 1e-6
    impossible = log_probabilities(torch.tensor([[0.0, -torch.inf, 1.0]]))
    assert mean_kl(impossible, impossible) == 0


def test_nll_is_the_mean_of_the_answers_tokens() -> None:
    p = log_probabilities(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
    assert mean_nll(p, [1, 0]) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)


def test_distributions_cross_the_control_channel_bit_for_bit_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = drawn(3)
    assert torch.equal(from_bytes(to_bytes(p), 50), p)
    monkeypatch.setattr("testbed.models.likelihood.MAX_BYTES", 2 * 4 * 50)
    shorter = from_bytes(to_bytes(p), 50)
    assert torch.equal(shorter, p[:2])
    assert mean_kl(shorter, p) == 0


def test_distributions_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="no distributions"):
        from_bytes(b"1234567", 2)
    with pytest.raises(ValueError, match="shapes"):
        mean_kl(drawn(0), drawn(0, vocabulary=51))
