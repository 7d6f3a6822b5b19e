"""Entropy of Gaussian linear units: distributions of torch, closed forms, inequalities, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy import functional
from lightning_entropy.functional import (
    activation_entropy_bound,
    condition_bounds_of_deficit,
    condition_number,
    deficit_bounds,
    effective_rank,
    entropy_deficit,
    gaussian_output_entropy,
    log_volume,
    singular_spectrum,
    spectral_flatness,
    stable_rank,
)
from tests.functional.test_singular_spectrum import hadamard, with_spectrum

OF_A_SPECTRUM = ("log_volume", "entropy_deficit", "spectral_flatness", "stable_rank", "effective_rank")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (4, 4), (1, 4)])
def test_entropy_is_that_of_the_multivariate_normal(rows: int, columns: int, scale: float) -> None:
    weight = normal(rows, columns) * scale
    exact = torch.distributions.MultivariateNormal(torch.zeros(rows).double(), weight @ weight.mT).entropy()
    torch.testing.assert_close(gaussian_output_entropy(weight), exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gaussian_output_entropy(weight, 9.0), exact + rows * math.log(3), rtol=1e-10, atol=1e-9)
    root = normal(columns, columns, seed=1)
    covariance = root @ root.mT + torch.eye(columns)
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(rows).double(), weight @ covariance @ weight.mT
    ).entropy()
    torch.testing.assert_close(gaussian_output_entropy(weight, covariance), exact, rtol=1e-9, atol=1e-9)


def test_outputs_in_a_subspace() -> None:
    weight = normal(5, 3)
    assert float(gaussian_output_entropy(weight)) == -math.inf
    within = gaussian_output_entropy(weight, pseudo=True)
    assert float(within) == pytest.approx(float(gaussian_output_entropy(torch.linalg.qr(weight).R)), rel=1e-10)
    deficient = normal(3, 5)
    deficient[2] = deficient[1]
    assert float(gaussian_output_entropy(deficient)) == -math.inf
    # Twice the same output: sqrt(2) times one of them, in the plane.
    two = torch.stack([deficient[0], deficient[1] * math.sqrt(2)])
    assert float(gaussian_output_entropy(deficient, pseudo=True)) == pytest.approx(float(gaussian_output_entropy(two)))
    with pytest.raises(ValueError, match="positive definite"):
        gaussian_output_entropy(deficient, torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        gaussian_output_entropy(deficient, torch.eye(3))
    with pytest.raises(ValueError, match="positive"):
        gaussian_output_entropy(deficient, 0.0)


def test_a_known_spectrum() -> None:
    values = torch.tensor([8.0, 5.0, 3.0, 1.0], dtype=torch.float64)
    weight = with_spectrum(16, 4, values)
    volume = float(values.log().sum())
    deficit = 2 * math.log(float(values.square().sum()) / 4) - volume
    shares = values / values.sum()
    assert float(log_volume(weight)) == pytest.approx(volume, abs=1e-12)
    assert float(entropy_deficit(weight)) == pytest.approx(deficit, abs=1e-12)
    squares = values.square()
    assert float(spectral_flatness(weight)) == pytest.approx(float(squares.prod() ** 0.25 / squares.mean()), rel=1e-12)
    assert float(stable_rank(weight)) == pytest.approx(99 / 64, rel=1e-12)
    assert float(effective_rank(weight)) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-12)
    for name in OF_A_SPECTRUM:
        function = getattr(functional, name)
        both = torch.stack([weight, normal(16, 4)])
        assert function(both).shape == (2,)
        torch.testing.assert_close(function(singular_spectrum(both)), function(both))
        torch.testing.assert_close(
            function(both.clone().requires_grad_()).detach(), function(both), rtol=1e-9, atol=1e-9
        )


def test_invariances_and_extremes() -> None:
    weight = normal(16, 4)
    turned = hadamard(16, 3) @ weight @ hadamard(4, 5) * 1e-4
    for function in (entropy_deficit, spectral_flatness, stable_rank, effective_rank):
        torch.testing.assert_close(function(turned), function(weight), rtol=1e-9, atol=1e-9)
    orthogonal = hadamard(16, 0) * 7
    assert float(entropy_deficit(orthogonal)) == pytest.approx(0, abs=1e-11)
    assert float(spectral_flatness(orthogonal)) == pytest.approx(1)
    assert float(stable_rank(orthogonal)) == pytest.approx(16)
    assert float(effective_rank(orthogonal)) == pytest.approx(16)
    weight[:, 1] = weight[:, 2]
    assert float(entropy_deficit(weight)) == math.inf
    assert float(log_volume(weight)) == -math.inf
    assert float(spectral_flatness(weight)) == 0
    zero = torch.zeros(3, 4)
    assert [float(getattr(functional, name)(zero)) for name in OF_A_SPECTRUM] == [-math.inf, math.inf, 0, 0, 0]


@pytest.mark.parametrize("name", [*OF_A_SPECTRUM, "gaussian_output_entropy"])
def test_gradients(name: str) -> None:
    function = getattr(functional, name)
    assert torch.autograd.gradcheck(function, (normal(3, 5).requires_grad_(),))
    if name == "gaussian_output_entropy":
        assert torch.autograd.gradcheck(lambda w: function(w, torch.eye(5) * 2), (normal(3, 5).requires_grad_(),))


def test_expected_log_volume_of_independent_entries() -> None:
    """(1/2) sum over i < m of psi((n - i)/2) + log 2, from the chi-squared law of Gram-Schmidt lengths."""
    m, n = 16, 48
    i = torch.arange(m, dtype=torch.float64)
    exact = float((torch.digamma((n - i) / 2) + math.log(2)).sum() / 2)
    assert exact == pytest.approx(29.356, abs=1e-3)
    draws = log_volume(normal(400, m, n))
    assert float(draws.mean()) == pytest.approx(exact, abs=4 * float(draws.std()) / 20)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 9), st.floats(0.01, 9), st.integers(0, 2**31 - 1), st.booleans())
def test_condition_number_and_deficit_bound_each_other(rank: int, decades: float, seed: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logs = torch.rand(rank, generator=generator, dtype=torch.float64)
    if extreme:
        logs = logs.round()
        logs[0], logs[-1] = 1, 0
    weight = torch.diag(10 ** (logs * decades))
    kappa, deficit = condition_number(weight), float(entropy_deficit(weight))
    value = float(kappa.value)
    low, high = (float(b) for b in deficit_bounds(value, rank))
    slack = 1e-9 * (1 + deficit) + 2 * float(kappa.error)
    assert low - slack <= deficit <= high + slack
    least, greatest = (float(b) for b in condition_bounds_of_deficit(deficit, rank))
    assert least * (1 - 1e-5) <= value <= greatest * (1 + 1e-5)


def test_the_lower_bound_is_attained_and_bounds_are_inverses() -> None:
    top, bottom = 50.0, 1.0
    middle = math.sqrt((top**2 + bottom**2) / 2)
    tight = torch.diag(torch.tensor([top, *[middle] * 4, bottom], dtype=torch.float64))
    low, _ = deficit_bounds(50.0, 6)
    assert float(low) == pytest.approx(3.21927574489, abs=1e-11)
    assert float(entropy_deficit(tight)) == pytest.approx(float(low), abs=1e-10)
    kappas = torch.tensor([1.0, 1 + 1e-7, 1.001, 1.01, 1.5, 2, 50, 1e5, 1e20], dtype=torch.float64)
    for rank in (2, 3, 100):
        low, high = deficit_bounds(kappas, rank)
        assert bool((low <= high + 1e-15).all())
        assert bool((low.diff() > 0).all())
        assert bool((high.diff() > 0).all())
        torch.testing.assert_close(condition_bounds_of_deficit(low, rank)[1], kappas, rtol=1e-7, atol=0)
        torch.testing.assert_close(condition_bounds_of_deficit(high, rank)[0], kappas, rtol=1e-7, atol=0)
    assert [float(x) for x in deficit_bounds(math.inf, 3)] == [math.inf] * 2
    assert [float(x) for x in condition_bounds_of_deficit(math.inf, 3)] == [math.inf] * 2
    assert [float(x) for x in deficit_bounds(1.0, 1)] == [0, 0]
    assert [float(x) for x in condition_bounds_of_deficit(0.0, 1)] == [1, 1]
    # Two values reach Specht's bound where they are there in the right shares; (log kappa)^2 / 2 r near 1.
    assert float(deficit_bounds(1 + 1e-5, 10)[1]) == pytest.approx(10 / 2 * (2e-5) ** 2 / 8, rel=1e-4)
    for wrong in (lambda: deficit_bounds(0.5, 3), lambda: condition_bounds_of_deficit(-1.0, 3)):
        with pytest.raises(ValueError, match=r"at least 1|>= 0"):
            wrong()
    with pytest.raises(ValueError, match="no deficit"):
        condition_bounds_of_deficit(1.0, 1)


def test_entropy_after_an_activation() -> None:
    """By change of variables, with samples: below the entropy before, and below the bound of any injective one."""
    weight = normal(3, 5)
    before = float(gaussian_output_entropy(weight))
    y = normal(200_000, 5, seed=1) @ weight.mT
    slopes = {
        "tanh": lambda t: 1 - t.tanh() ** 2,
        "sigmoid": lambda t: t.sigmoid() * (-t).sigmoid(),
        "softplus": torch.sigmoid,
        "elu": lambda t: t.clamp(max=0).exp(),
        "leaky_relu": lambda t: torch.where(t > 0, 1.0, 0.01),
        "selu": lambda t: 1.0507009873554805 * torch.where(t > 0, 1.0, 1.6732632423543772 * t.clamp(max=0).exp()),
    }
    for name, slope in slopes.items():
        after = before + float(slope(y).log().sum(-1).mean())  # type: ignore[no-untyped-call]
        assert after <= float(activation_entropy_bound(before, 3, activation=name)) + 1e-6
    assert float(activation_entropy_bound(before, 3, lipschitz=2.0)) == pytest.approx(before + 3 * math.log(2))
    x = torch.linspace(-6, 6, 200_001, dtype=torch.float64, requires_grad=True)
    for name, slope in (("gelu", 1.1289), ("silu", 1.0998)):
        (gradient,) = torch.autograd.grad(getattr(torch.nn.functional, name)(x).sum(), x)
        assert float(gradient.max()) == pytest.approx(slope, abs=1e-4)  # not contractive, and not monotone:
        assert float(gradient.min()) < 0
        with pytest.raises(ValueError, match="takes values twice"):
            activation_entropy_bound(before, 3, activation=name)
    for options, said in (
        ({}, "exactly one"),
        ({"activation": "sine"}, "must be one of"),
        ({"lipschitz": 0.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=said):
            activation_entropy_bound(before, 3, **options)  # type: ignore[arg-type]
