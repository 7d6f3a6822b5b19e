from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_entropy.functional import likelihood as source
from lightning_entropy.functional import summed_nll


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.integers(2, 7), st.booleans())
@settings(max_examples=50, deadline=None)
def test_it_is_torchs_cross_entropy(seed: int, batch: int, tokens: int, classes: int, ignore: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(batch, tokens, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch, tokens), generator=generator)
    if ignore:
        labels[torch.rand(batch, tokens, generator=generator) < 0.4] = -100
    score = summed_nll(logits, labels)
    expected = F.cross_entropy(logits.reshape(-1, classes), labels.reshape(-1), reduction="sum")
    torch.testing.assert_close(score.nll, expected)
    assert int(score.counted) == int((labels != -100).sum())
    ahead = summed_nll(logits, labels, next_token=True)
    following = F.cross_entropy(logits[:, :-1].reshape(-1, classes), labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(ahead.nll, following)


def test_uniform_logits_have_the_perplexity_of_their_number() -> None:
    score = summed_nll(torch.zeros(3, 4, 50), torch.randint(0, 50, (3, 4)))
    assert float(score.mean()) == pytest.approx(math.log(50), rel=1e-6)
    assert float(score.perplexity()) == pytest.approx(50, rel=1e-5)


def test_half_precision_is_summed_wide() -> None:
    logits = torch.randn(64, 1000).bfloat16()
    labels = torch.randint(0, 1000, (64,))
    exact = F.cross_entropy(logits.double(), labels, reduction="sum")
    assert float(summed_nll(logits, labels).nll) == pytest.approx(float(exact), rel=1e-6)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(7, 5, 11, dtype=torch.float64), torch.randint(0, 11, (7, 5))
    whole = summed_nll(logits, labels).nll
    monkeypatch.setattr(source, "_AT_ONCE", 33)
    torch.testing.assert_close(summed_nll(logits, labels).nll, whole)


def test_the_gradient_is_that_of_cross_entropy() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, -100, 3], [1, 2, -100]])
    assert torch.autograd.gradcheck(lambda z: summed_nll(z, labels).nll, (logits,))


def test_nothing_that_counts() -> None:
    score = summed_nll(torch.randn(2, 3), torch.full((2,), -100))
    assert float(score.nll) == 0
    assert torch.isnan(score.mean())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5]), r"labels must be in 0 \.\.\. 2 or -100, got 5"),
        (torch.tensor([0]), r"got \(2, 3\) and \(1,\)"),
        (torch.zeros(2), "labels must be integers, got torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summed_nll(torch.zeros(2, 3), labels)
