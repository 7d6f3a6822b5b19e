from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import MinibatchCKA, delta_cka, linear_cka, linear_hsic, shared_pca


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, p: int, q: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = randn(n, p, seed=seed)
    return x + 2, (x @ randn(p, q, seed=seed + 1)).tanh() + 0.3 * randn(n, q, seed=seed + 2)


def textbook_cka(x: Tensor, y: Tensor) -> Tensor:
    """The definition: centred kernel matrices and their traces, in float64."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h  # noqa: E741
    return (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


def textbook_hsic_u(x: Tensor, y: Tensor) -> Tensor:
    """The mean over all ordered quadruples of unlike rows, which is what the unbiased estimator estimates with."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    total = torch.zeros((), dtype=torch.float64)
    quadruples = list(itertools.permutations(range(len(x)), 4))
    for a, b, c, d in quadruples:
        total += k[a, b] * l[a, b] + k[a, b] * l[c, d] - 2 * k[a, b] * l[a, c]
    return total / len(quadruples)


@pytest.mark.parametrize(("n", "p", "q"), [(41, 5, 7), (9, 30, 20), (12, 12, 1)])
def test_cka_is_the_textbook_one(n: int, p: int, q: int) -> None:
    x, y = related(n, p, q)
    torch.testing.assert_close(linear_cka(x, y), textbook_cka(x, y))
    torch.testing.assert_close(linear_cka(x.float(), y.float()), textbook_cka(x, y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_cka(x, y), linear_cka(y, x))


@pytest.mark.parametrize("p", [2, 20])
def test_debiased_hsic_is_the_mean_over_quadruples(p: int) -> None:
    x, y = related(7, p, 3)
    torch.testing.assert_close(linear_hsic(x, y), textbook_hsic_u(x, y))


@pytest.mark.parametrize("debiased", [False, True])
@settings(deadline=None, max_examples=30)
@given(st.integers(6, 30), st.integers(1, 9), st.floats(0.01, 100), st.integers(0, 1000))
def test_invariant_to_rotation_scale_and_shift(debiased: bool, n: int, p: int, scale: float, seed: int) -> None:
    x, y = related(n, p, 4, seed)
    rotation = torch.linalg.qr(randn(p, p, seed=seed + 7)).Q
    moved = scale * x @ rotation + randn(p, seed=seed + 8)
    torch.testing.assert_close(linear_cka(x, moved, debiased=debiased), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(linear_cka(moved, y, debiased=debiased), linear_cka(x, y, debiased=debiased))


def test_unrelated_representations_are_alike_by_bias_only() -> None:
    values = [
        [float(linear_cka(randn(40, 60, seed=3 * i), randn(40, 60, seed=3 * i + 1), debiased=d)) for i in range(50)]
        for d in (False, True)
    ]
    biased, debiased = (sum(v) / len(v) for v in values)
    assert biased > 0.5
    assert abs(debiased) < 0.02


def test_cka_has_a_gradient() -> None:
    x, y = related(6, 3, 2)
    for debiased in (False, True):
        assert torch.autograd.gradcheck(
            lambda a, b, d=debiased: linear_cka(a, b, debiased=d), (x.requires_grad_(), y.requires_grad_())
        )


def test_constant_representations_are_not_comparable() -> None:
    assert linear_cka(torch.ones(8, 3), torch.randn(8, 3)).isnan()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="row i of both"):
        linear_cka(torch.zeros(5, 2), torch.zeros(6, 2))
    with pytest.raises(ValueError, match="at least 4 rows are needed, got 3"):
        linear_cka(torch.zeros(3, 2), torch.zeros(3, 2), debiased=True)
    with pytest.raises(ValueError, match=r"\(rows, features\)"):
        linear_cka(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="needs at least one update"):
        MinibatchCKA().compute()


def test_minibatches_average_to_the_whole_exactly() -> None:
    """Over all 35 ways to cut eight rows into two halves the HSICs' mean is the HSIC of all rows."""
    x, y = related(8, 3, 2)
    sums = MinibatchCKA()
    for half in itertools.combinations(range(8), 4):
        rest = [i for i in range(8) if i not in half]
        sums.update(x[list(half)], y[list(half)])
        sums.update(x[rest], y[rest])
    torch.testing.assert_close(sums.sums[0] / sums.sums[3], linear_hsic(x, y))
    torch.testing.assert_close(sums.compute(), linear_cka(x, y, debiased=True))


@pytest.mark.parametrize("size", [8, 20, 50])
def test_minibatches_of_any_size_are_unbiased(size: int) -> None:
    x, y = related(200, 6, 5)
    whole = linear_hsic(x, y)
    found = []
    for seed in range(60):
        cka = MinibatchCKA()
        for rows in torch.randperm(200, generator=torch.Generator().manual_seed(seed)).split(size):
            cka.update(x[rows], y[rows])
        found.append(float(cka.sums[0] / cka.sums[3]))
    mean = torch.tensor(found).mean()
    error = torch.tensor(found).std() / 60**0.5
    assert abs(mean - whole) < 4 * error + 1e-6


def test_minibatches_merge() -> None:
    x, y = related(40, 4, 4)
    whole, first, second = MinibatchCKA(), MinibatchCKA(), MinibatchCKA()
    for i, rows in enumerate(torch.arange(40).split(10)):
        whole.update(x[rows], y[rows])
        (first, second)[i % 2].update(x[rows], y[rows])
    first.merge(second)
    torch.testing.assert_close(first.compute(), whole.compute())


def test_a_whole_basis_changes_nothing_and_a_truncated_one_says_what_it_holds() -> None:
    x, y = related(60, 6, 6)
    assert delta_cka(x, y, components=6, debiased=False).change == pytest.approx(1 - float(linear_cka(x, y)))
    assert delta_cka(x, y, components=6).retained == pytest.approx(1)
    basis = shared_pca(x, y, components=2)
    torch.testing.assert_close(basis.components.T @ basis.components, torch.eye(2, dtype=torch.float64))
    joint = torch.cat([x - x.mean(0), y - y.mean(0)])
    values = torch.linalg.svdvals(joint).square()
    assert float(basis.retained) == pytest.approx(float(values[:2].sum() / values.sum()))


def test_change_outside_the_basis_is_hidden_and_retained_variance_warns_of_it() -> None:
    x = randn(400, 4) * torch.tensor([10.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    y = x.clone()
    y[:, 1:] = randn(400, 3, seed=9) * 5
    found = delta_cka(x, y, components=1)
    assert found.change < 1e-3
    assert found.retained < 0.8
    assert delta_cka(x, y, components=4).change > 0.05


def test_the_same_representation_has_not_changed() -> None:
    x = randn(30, 8)
    assert delta_cka(x, x.clone()).change == pytest.approx(0, abs=1e-12)
    assert delta_cka(x, x).debiased  # 30 rows for 8 components
    assert not delta_cka(randn(100, 8), randn(100, 8)).debiased
    with pytest.raises(ValueError, match="as many features before as after"):
        shared_pca(randn(5, 2), randn(5, 3))
    with pytest.raises(ValueError, match="components must be at least 1"):
        shared_pca(x, x, components=0)
