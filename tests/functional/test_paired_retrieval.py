from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_entropy.functional import paired_retrieval
from lightning_entropy.functional.paired_retrieval import RetrievalScores


def by_hand(first: torch.Tensor, second: torch.Tensor, temperature: float) -> tuple[float, float]:
    """One pair after the other, in plain Python."""
    n, nll, hits = len(first), 0.0, 0.0
    for a, b in ((first, second), (second, first)):
        for i in range(n):
            cosines = [float(a[i] @ b[j] / (a[i].norm() * b[j].norm())) for j in range(n)]
            top = max(cosines)
            nll += math.log(sum(math.exp((c - top) / temperature) for c in cosines)) - (cosines[i] - top) / temperature
            hits += cosines[i] == top
    return nll / (2 * n), hits / (2 * n)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.05, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_it_is_the_definition(seed: int, pairs: int, width: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, pairs, width + 1, generator=generator, dtype=torch.float64)
    nll, recall = by_hand(first, second, temperature)
    scores = paired_retrieval(first, second, temperature=temperature)
    assert float(scores.nll) == pytest.approx(nll, rel=1e-9, abs=1e-12)
    assert float(scores.recall_at_1) == pytest.approx(recall)


def test_limits() -> None:
    perfect = paired_retrieval(torch.eye(8), torch.eye(8), temperature=0.01)
    assert float(perfect.recall_at_1) == 1
    assert float(perfect.nll) < 1e-6
    collapsed = paired_retrieval(torch.ones(8, 4), torch.ones(8, 4))
    assert float(collapsed.recall_at_1) == pytest.approx(1 / 8)
    assert float(collapsed.nll) == pytest.approx(math.log(8), rel=1e-6)
    zeros = paired_retrieval(torch.zeros(8, 4), torch.zeros(8, 4))
    assert float(zeros.nll) == pytest.approx(math.log(8), rel=1e-6)


def test_length_and_order_of_the_pairs_make_no_difference() -> None:
    first, second = torch.randn(2, 20, 6, dtype=torch.float64)
    order = torch.randperm(20)
    scores = paired_retrieval(first, second)
    torch.testing.assert_close(tuple(paired_retrieval(3 * first[order], 0.1 * second[order])), tuple(scores))


def test_many_queries_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lightning_entropy.functional.paired_retrieval"]  # the function has the module's name
    first, second = torch.randn(2, 23, 6, dtype=torch.float64)
    whole = paired_retrieval(first, second)
    monkeypatch.setattr(module, "_ROWS", 4)
    torch.testing.assert_close(tuple(paired_retrieval(first, second)), tuple(whole))


def test_gradient() -> None:
    first, second = torch.randn(2, 4, 3, dtype=torch.float64)
    first.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: paired_retrieval(a, second, temperature=0.5).nll, (first,))


def test_it_is_the_symmetric_contrastive_loss() -> None:
    first, second = torch.randn(2, 12, 5, dtype=torch.float64)
    logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / 0.05
    labels = torch.arange(12)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(paired_retrieval(first, second).nll, expected)
    assert isinstance(paired_retrieval(first, second), RetrievalScores)


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((2, 3), (3, 3)), 0.05, r"got \(2, 3\) and \(3, 3\)"),
        (((0, 3), (0, 3)), 0.05, "with N > 0"),
        (((2, 3), (2, 3)), 0.0, "temperature must be positive, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_retrieval(torch.zeros(shapes[0]), torch.zeros(shapes[1]), temperature=temperature)
