from __future__ import annotations

import math

import pytest
import torch

from lightning_entropy.functional.linear_probe import linear_probe


def noise(seed: int, n: int = 40, d: int = 60, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def test_r2_is_that_of_as_many_ridge_fits() -> None:
    """Each row predicted by a ridge regression on the others, solved on its own."""
    x, y = noise(1, n=12, d=3)
    x[:, 0] += 2 * y
    found = linear_probe(x, y, permutations=1)
    xs = x.double()
    xs = (xs - xs.mean(0)) / xs.std(0)
    one_hot = torch.nn.functional.one_hot(y).double()
    mean_eigenvalue = float((xs @ xs.T).trace()) / 12
    errors = []
    for factor in (1e-2, 1e-1, 1.0, 10.0):
        error = 0.0
        for i in range(12):
            others = [j for j in range(12) if j != i]
            a = torch.cat([xs[others], torch.ones(11, 1, dtype=torch.float64)], 1)
            penalty = factor * mean_eigenvalue * torch.eye(4, dtype=torch.float64)
            penalty[3, 3] = 0  # the intercept
            w = torch.linalg.solve(a.T @ a + penalty, a.T @ one_hot[others])
            error += float((one_hot[i] - xs[i] @ w[:3] - w[3]).square().sum())
        errors.append(error)
    means = [(one_hot[i] - one_hot[[j for j in range(12) if j != i]].mean(0)).square().sum() for i in range(12)]
    assert found.r2 == pytest.approx(1 - min(errors) / float(sum(means)), rel=1e-9)


def test_the_level_holds_without_a_signal_and_a_signal_is_found() -> None:
    false = [linear_probe(*noise(seed), permutations=99).p_value <= 0.05 for seed in range(60)]
    assert sum(false) <= 9  # 3 expected, binomial: P(> 9) = .001
    for seed in range(10):
        x, y = noise(seed)
        x[:, :6] += 3.0 * y[:, None]
        found = linear_probe(x, y, permutations=99)
        assert found.p_value == pytest.approx(0.01)
        assert found.accuracy > found.chance
        assert 0 < found.r2 <= 1


def test_numbers_columns_and_scales() -> None:
    x, _ = noise(3, n=50, d=4)
    exact = linear_probe(x, x @ torch.tensor([1.0, 2.0, 0.0, -1.0]))
    assert exact.r2 > 0.99
    assert math.isnan(exact.accuracy)
    both = linear_probe(x, torch.stack([x[:, 0], torch.randn(50, generator=torch.Generator().manual_seed(0))], 1))
    assert 0 < both.r2 < 1
    scaled = linear_probe(x * torch.tensor([1e3, 1e-3, 1.0, 5.0]) + 7, x[:, 0])
    assert scaled.r2 == pytest.approx(linear_probe(x, x[:, 0]).r2, rel=1e-5)
    constant = linear_probe(torch.cat([x, torch.ones(50, 1)], 1), x[:, 0])
    assert math.isfinite(constant.r2)
    assert "R^2" in str(both)


def test_it_is_reproducible_and_names_are_not_numbers() -> None:
    x, y = noise(4, classes=3)
    assert linear_probe(x, y) == linear_probe(x, y)
    assert linear_probe(x, y).r2 == linear_probe(x, y * 7 + 2).r2


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.randn(7, 2), torch.arange(7), "at least 8"),
        (torch.randn(9, 2), torch.arange(8), "same rows"),
        (torch.randn(9, 2, 2), torch.arange(9), "must be"),
        (torch.randn(9, 2), torch.zeros(9, dtype=torch.long), "all targets are the same"),
        (torch.full((9, 2), math.nan), torch.arange(9), "finite"),
    ],
)
def test_what_cannot_be_probed(x: torch.Tensor, y: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear_probe(x, y)
    with pytest.raises(ValueError, match="permutations"):
        linear_probe(torch.randn(9, 2), torch.arange(9), permutations=0)
