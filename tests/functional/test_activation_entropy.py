"""Entropies of activations: closed forms, quadrature that knows nothing of ours, scipy's estimator, ties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import (
    ActivationEntropy,
    Laplace,
    Normal,
    StudentT,
    activation_entropy,
    pushforward_entropy,
    spacing_entropy,
    spread_rounding,
)
from lightning_entropy.functional.pushforward import branches, pointwise_derivatives
from lightning_entropy.functional.rounding import rounded_to


def crrelu(eps: float):
    return lambda x: x.clamp(min=0) + eps * x * torch.exp(-x * x / 2)


def normal(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The exact entropies.


@pytest.mark.parametrize(
    ("function", "entropy", "tolerance"),
    [
        (lambda x: x * 1, 1.4189385332, 1e-9),
        (lambda x: F.leaky_relu(x, 0.01), 1.4189385332 + 0.5 * math.log(0.01), 1e-9),
        (lambda x: F.leaky_relu(x, 0.2), 0.61420, 5e-5),
        (torch.tanh, 0.6698041, 1e-6),
        (F.softplus, 0.61288, 1e-5),
        (F.elu, 1.02000, 1e-5),
        (Normal().cdf, 0.0, 1e-9),
        (F.gelu, -0.066, 5e-3),  # the reference is a Monte-Carlo estimate from here on
        (F.silu, 0.109, 5e-3),
        (F.mish, 0.206, 5e-3),
    ],
)
def test_entropy_of_activations_of_a_normal(function, entropy: float, tolerance: float) -> None:
    found = pushforward_entropy(function, Normal())
    assert float(found.entropy) == pytest.approx(entropy, abs=tolerance)
    assert float(found.atom_mass) == 0
    assert float(found.mixed) == pytest.approx(float(found.entropy))


@pytest.mark.parametrize(
    ("eps", "entropy", "standardized"),
    [(1e-3, -2.790729, -2.241), (0.01, -1.637812, -1.097), (0.1, -0.471474, 0.019), (0.5, 0.385287, 0.672),
     (1.0, 0.771369, 0.834), (4.0, None, 0.674), (-0.1, None, -0.0035), (-0.5, None, 0.595), (-1.0, None, 0.515)],
)  # fmt: skip
def test_entropy_of_crrelu(eps: float, entropy: float | None, standardized: float) -> None:
    found = pushforward_entropy(crrelu(eps), Normal())
    if entropy is not None:
        assert float(found.entropy) == pytest.approx(entropy, abs=5e-4)
    # The references are estimates from 2e5 samples, which smooth the peaks of the density where f turns.
    assert float(found.standardized) == pytest.approx(standardized, abs=3e-2)


@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_entropy_of_crrelu_by_adaptive_quadrature_over_both_preimages(eps: float) -> None:
    np, integrate, optimize = (pytest.importorskip(m) for m in ("numpy", "scipy.integrate", "scipy.optimize"))

    def phi(u):
        return np.exp(-u * u / 2) / np.sqrt(2 * np.pi)

    def slope(u):
        return abs(1 - u * u) * np.exp(-u * u / 2)

    def left(u: float) -> float:  # the density of the output at f(u), times its share of du
        level = math.log(-u) - u * u / 2
        other = optimize.brentq(lambda t: math.log(-t) - t * t / 2 - level, -40, -1, xtol=1e-15)
        q = (phi(u) / slope(u) + phi(other) / slope(other)) / eps
        return -q * math.log(q) * eps * slope(u)

    right = integrate.quad(lambda u: -phi(u) * np.log(phi(u) / (1 + eps * (1 - u * u) * np.exp(-u * u / 2))), 0, 12)[0]
    near = integrate.quad(lambda s: left(-1 + s * s) * 2 * s, 1e-4, math.sqrt(0.5), epsabs=1e-9)[0]
    far = integrate.quad(lambda t: left(-math.exp(t)) * math.exp(t), -40, math.log(0.5), epsabs=1e-9)[0]
    assert float(pushforward_entropy(crrelu(eps), Normal()).entropy) == pytest.approx(right + near + far, abs=1e-5)


@pytest.mark.parametrize(
    ("eps", "change"),
    [(-0.5, -0.243669), (-0.1, -0.037384), (-0.01, -0.003555), (0.01, 0.003516), (0.1, 0.033521), (0.5, 0.137543),
     (1.0, 0.216535)],
)  # fmt: skip
def test_a_positive_eps_raises_the_entropy_of_the_positive_branch(eps: float, change: float) -> None:
    """Given x > 0, where CRReLU is invertible; the paper says that it falls."""
    x, w = Normal().nodes([0.0])
    x, w = x[x > 0], w[x > 0]
    slope = pointwise_derivatives(crrelu(eps), x)[1]
    assert float((w * slope.log()).sum() / w.sum()) == pytest.approx(change, abs=1e-6)


def test_relu_has_an_atom_and_crrelu_un_collapses_it() -> None:
    relu = pushforward_entropy(F.relu, Normal())
    assert float(relu.atom_mass) == pytest.approx(0.5, abs=1e-7)
    assert float(relu.entropy) == pytest.approx(0.7257913526, abs=1e-6)  # half-normal
    assert float(relu.mixed) == pytest.approx(math.log(2) + 0.5 * 0.7257913526, abs=1e-6)
    for eps in (1e-3, 1e-2):
        entropy = float(pushforward_entropy(crrelu(eps), Normal()).entropy)
        assert entropy == pytest.approx(0.5 * math.log(eps) + 0.663, abs=3e-3)


def test_entropy_order_is_not_the_order_of_known_accuracy() -> None:
    functions = (lambda x: F.leaky_relu(x, 0.01), F.gelu, F.silu, F.mish, F.softplus, torch.tanh, F.elu)
    values = [float(pushforward_entropy(f, Normal()).entropy) for f in functions]
    assert values == sorted(values)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10.0), st.floats(-3.0, 3.0), st.floats(0.2, 5.0))
def test_scaling_moves_the_raw_entropy_alone(scale: float, loc: float, spread: float) -> None:
    density = Normal(loc, scale=spread)
    one, scaled = (
        pushforward_entropy(lambda x, a=a: a * torch.tanh((x - loc) / spread), density) for a in (1.0, scale)
    )
    assert float(scaled.entropy - one.entropy) == pytest.approx(math.log(scale), abs=1e-6)
    assert float(scaled.standardized - one.standardized) == pytest.approx(0.0, abs=1e-6)


def test_invertible_functions_follow_the_formula_for_any_density() -> None:
    for density in (Laplace(0.5), StudentT(3.0)):
        mean_log = density.expectation(lambda x: pointwise_derivatives(torch.asinh, x)[1].log())
        found = pushforward_entropy(torch.asinh, density)
        assert float(found.entropy) == pytest.approx(density.entropy() + float(mean_log), abs=1e-8)


def test_branches_are_found_where_calculus_puts_them() -> None:
    found = branches(crrelu(1.0), Normal())
    assert found.signs.tolist() == [0, -1, 1]  # flat to 1e-8 beyond -6.7
    assert float(found.edges[2]) == pytest.approx(-1.0, abs=1e-6)
    assert found.kinks == pytest.approx([0.0], abs=1e-12)
    assert not found.one_way
    steps = branches(F.hardswish, Normal())
    assert steps.edges[1:-1].tolist() == pytest.approx([-3.0, -1.5], abs=1e-5)
    assert branches(F.relu, Normal()).one_way


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(), "must keep the shape"),
        (lambda x: torch.zeros_like(x), "does not depend on its input"),
        (lambda x: torch.softmax(x, 0), "looks at the others"),
        (lambda x: x.sqrt(), "finite"),
        (torch.nn.PReLU(3), "one function of each element"),
    ],
)
def test_what_is_no_activation_is_refused(function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pushforward_entropy(function, Normal())


# The estimator.


@pytest.mark.parametrize(("ours", "theirs"), [("vasicek", "vasicek"), ("ebrahimi", "ebrahimi"), ("van_es", "van es")])
@pytest.mark.parametrize("count", [41, 401, 5000])
def test_against_scipy(ours: str, theirs: str, count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    x = normal(count, dtype=torch.float64)
    expected = float(stats.differential_entropy(x.numpy(), method=theirs))
    assert float(spacing_entropy(x, method=ours)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_estimates_agree_with_the_exact_values() -> None:
    x = normal(400_000)
    for eps, exact in ((0.01, -1.637467), (0.1, -0.471172), (0.5, 0.385558)):
        assert float(activation_entropy(crrelu(eps)(x)).entropy) == pytest.approx(exact, abs=0.02)
    relu = activation_entropy(torch.relu(x))
    assert float(relu.atom_mass) == pytest.approx(0.5, abs=3e-3)
    assert float(relu.entropy) == pytest.approx(0.7257913526, abs=0.01)
    assert float(relu.standardized) == pytest.approx(1.2640, abs=0.01)


def test_gradient() -> None:
    x = normal(60, dtype=torch.float64).requires_grad_()
    for method in ("vasicek", "ebrahimi", "van_es"):
        assert torch.autograd.gradcheck(lambda v, m=method: spacing_entropy(v, method=m), x)
    assert torch.autograd.gradcheck(lambda v: activation_entropy(v).standardized, x)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(-10.0, 10.0), st.integers(0, 1000))
def test_shift_changes_nothing_and_scale_adds_its_logarithm(scale: float, shift: float, seed: int) -> None:
    x = normal(500, seed, torch.float64)
    one, other = activation_entropy(x), activation_entropy(scale * x + shift)
    assert float(other.entropy - one.entropy) == pytest.approx(math.log(scale), abs=1e-6)
    assert float(other.standardized) == pytest.approx(float(one.standardized), abs=1e-6)


def test_atoms_and_continuous_part_are_apart() -> None:
    x = torch.cat([torch.zeros(3000), torch.ones(1000), normal(6000)])
    h = activation_entropy(x)
    assert float(h.atom_mass) == pytest.approx(0.4)
    assert int(h.atoms) == 2
    three = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(h.atom_entropy) == pytest.approx(three, abs=1e-5)
    binary = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert float(h.mixed) == pytest.approx(binary + 0.4 * three + 0.6 * float(h.entropy), abs=1e-5)


def test_all_atoms_is_never_minus_infinity() -> None:
    h = activation_entropy(torch.full((1000,), 2.0))
    assert math.isnan(float(h.entropy))
    assert float(h.mixed) == 0.0
    assert float(h.atom_mass) == 1.0
    coin = activation_entropy(torch.tensor([0.0, 1.0]).repeat(500))
    assert float(coin.mixed) == pytest.approx(math.log(2), abs=1e-6)
    assert not any(math.isinf(float(v)) for v in coin)


def test_channels_apart() -> None:
    x = normal(20_000).view(-1, 2) * torch.tensor([1.0, 10.0])
    h = activation_entropy(x, channel_dim=-1)
    assert float(h.entropy[1] - h.entropy[0]) == pytest.approx(math.log(10), abs=0.1)
    assert h.standardized.shape == (2,)
    alone = activation_entropy(x[:, 1].contiguous())
    assert isinstance(alone, ActivationEntropy)
    torch.testing.assert_close(h.entropy[1], alone.entropy)
    raw = activation_entropy(x, standardize=False)
    assert float(raw.standardized) == float(raw.entropy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "kde"}, "method must be one of vasicek"),
        ({"rounding": "jitter"}, "rounding must be"),
        ({"atom_threshold": 0.0}, "atom_threshold must be"),
        ({"window": 600}, "window must be at least 1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activation_entropy(normal(1000), **change)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="1 of 100 values that are not"):
        activation_entropy(torch.cat([normal(99), torch.tensor([math.inf])]))
    with pytest.raises(TypeError, match="floating point"):
        activation_entropy(torch.arange(10))
    with pytest.raises(ValueError, match="at least 4 values a channel"):
        activation_entropy(torch.randn(2, 3), channel_dim=1)


# Rounding.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_rounding_are_recognised_and_spread(dtype: torch.dtype) -> None:
    x = normal(100_000)
    narrow = x.to(dtype)
    assert rounded_to(x) is None
    for given_ in (narrow, narrow.float()):  # an output of autocast may have been cast back
        assert rounded_to(given_) is dtype
        with pytest.raises(ValueError, match="Recompute the activation in float32"):
            activation_entropy(given_)
    exact = float(activation_entropy(x).entropy)
    assert float(activation_entropy(narrow, rounding="spread").entropy) == pytest.approx(exact, abs=0.01)
    if dtype is torch.bfloat16:
        assert float(activation_entropy(narrow, rounding="keep").atom_mass) > 0.1


def test_spreading_draws_nothing_and_stays_in_the_interval() -> None:
    x = normal(20_000).bfloat16()
    state = torch.get_rng_state()
    one, two = spread_rounding(x, torch.bfloat16), spread_rounding(x, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert torch.equal(one.bfloat16(), x)
    assert torch.unique(one).numel() > 0.95 * torch.unique(normal(20_000)).numel()


def test_a_real_atom_survives_spreading() -> None:
    x = torch.cat([normal(50_000), torch.zeros(10_000)]).bfloat16()
    h = activation_entropy(x, rounding="spread")
    assert float(h.atom_mass) == pytest.approx(1 / 6, abs=1e-3)
    assert int(h.atoms) == 1
    assert float(h.entropy) == pytest.approx(1.4189, abs=0.02)


def test_a_discrete_distribution_is_not_taken_for_rounding() -> None:
    levels = torch.randint(0, 16, (10_000,), generator=torch.Generator().manual_seed(0)).float()
    h = activation_entropy(levels)
    assert int(h.atoms) == 16
    assert float(h.mixed) == pytest.approx(math.log(16), abs=1e-2)
