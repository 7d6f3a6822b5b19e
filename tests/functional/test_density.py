"""Densities against scipy, and the measured one against the density its samples came from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_entropy.functional import EmpiricalDensity, Laplace, Logistic, Mixture, Normal, StudentT
from lightning_entropy.functional.incomplete_beta import regularized_incomplete_beta
from lightning_entropy.functional.quadrature import gauss_legendre, graded_edges, panel_nodes

DENSITIES = {
    "normal": (Normal(0.3, scale=2.0), lambda s: s.norm(0.3, 2.0)),
    "laplace": (Laplace(0.3, scale=2.0), lambda s: s.laplace(0.3, 2.0)),
    "logistic": (Logistic(0.3, scale=2.0), lambda s: s.logistic(0.3, 2.0)),
    "t0.5": (StudentT(0.5), lambda s: s.t(0.5)),
    "t1": (StudentT(1.0, loc=-1.0, scale=0.5), lambda s: s.t(1.0, -1.0, 0.5)),
    "t3": (StudentT(3.0), lambda s: s.t(3.0)),
    "t200": (StudentT(200.0), lambda s: s.t(200.0)),
}
MIXTURE = Mixture([Normal(-1.0, scale=0.5), Laplace(2.0), StudentT(4.0)], weights=[1.0, 2.0, 1.0])
EVERY = [pytest.param(d, id=name) for name, (d, _) in DENSITIES.items()] + [pytest.param(MIXTURE, id="mixture")]


@pytest.mark.parametrize("name", DENSITIES)
def test_against_scipy(name: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    density, reference = DENSITIES[name][0], DENSITIES[name][1](stats)
    x = torch.linspace(-9, 9, 41, dtype=torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(density.pdf(x), torch.from_numpy(reference.pdf(x.numpy())), **close)
    torch.testing.assert_close(density.cdf(x), torch.from_numpy(reference.cdf(x.numpy())), **close)
    q = torch.tensor([1e-3, 0.2, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(density.quantile(q), torch.from_numpy(reference.ppf(q.numpy())), rtol=1e-9, atol=1e-9)
    assert density.entropy() == pytest.approx(float(reference.entropy()), abs=1e-9)
    assert density.std == pytest.approx(float(reference.std()), nan_ok=True) or math.isinf(density.std)


@pytest.mark.parametrize("density", EVERY)
def test_score_cdf_and_nodes_belong_to_the_density(density) -> None:
    x = torch.tensor([-5.1, -1.3, -0.2, 0.31, 1.7, 6.3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(density.log_pdf(x).sum(), x)
    torch.testing.assert_close(density.score(x).detach(), slope)
    (slope,) = torch.autograd.grad(density.cdf(x).sum(), x)
    torch.testing.assert_close(density.pdf(x).detach(), slope)
    torch.testing.assert_close(density.pdf_derivative(x), density.pdf(x) * density.score(x))
    _, w = density.nodes([0.0, 0.5])
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-9)
    assert torch.autograd.gradcheck(density.cdf, x)
    assert torch.autograd.gradgradcheck(density.cdf, x)


@pytest.mark.parametrize("density", EVERY)
def test_samples_follow_the_distribution_function(density) -> None:
    x = density.sample(20_000, generator=torch.Generator().manual_seed(1))
    reached = density.cdf(x.sort().values)
    steps = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert float((reached - steps).abs().max()) < 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 1 %


def test_mixture_is_the_weighted_sum() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    parts = zip(MIXTURE.weights, MIXTURE.components)
    torch.testing.assert_close(MIXTURE.pdf(x), sum(w * c.pdf(x) for w, c in parts))
    two = Mixture([Normal(-2.0), Normal(2.0)])
    assert (two.mean, two.std) == pytest.approx((0.0, math.sqrt(5)))
    assert two.entropy() == pytest.approx(-float(two.expectation(two.log_pdf)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normal(scale=0.0), "scale must be finite and > 0, got 0"),
        (lambda: Normal(math.nan), "loc must be finite, got nan"),
        (lambda: StudentT(0.1), "df must be finite and >= 0.5, got 0.1"),
        (lambda: Mixture([]), "at least one density"),
        (lambda: Mixture([Normal()], weights=[1.0, 2.0]), "one for each of 1 components, got 2"),
        (lambda: Normal().quantile(1.0), "strictly between 0 and 1"),
        (lambda: EmpiricalDensity.fit(torch.zeros(10)), "at least 100 values, got 10"),
        (lambda: EmpiricalDensity.fit(torch.zeros(200)), "must differ from one another, got 200 times 0"),
        (lambda: EmpiricalDensity.fit(torch.full((200,), math.nan)), "200 values that are not"),
        (lambda: EmpiricalDensity.fit(torch.randn(200), knots=3), "knots must be at least 4"),
        (lambda: EmpiricalDensity.fit(torch.randn(200), smoothing=-1.0), "smoothing must be finite and >= 0"),
        (lambda: EmpiricalDensity.fit(torch.randn(200), coverage=0.3), "coverage must be in"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_quadrature_is_exact_where_it_should_be() -> None:
    x, w = gauss_legendre(16)
    for power in range(0, 32, 2):
        assert float((w * x**power).sum()) == pytest.approx(2 / (power + 1), abs=1e-14)
    x, w = panel_nodes(graded_edges(0.0, 1.0, 8, [0.3]))
    exact = 0.3 * math.log(0.3) + 0.7 * math.log(0.7) - 1  # of ln |x - 0.3|
    assert float((w * (x - 0.3).abs().log()).sum()) == pytest.approx(exact, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 40.0), st.floats(0.3, 40.0), st.floats(0.0, 1.0))
def test_incomplete_beta_is_a_distribution_function(a: float, b: float, x: float) -> None:
    special = pytest.importorskip("scipy.special")
    value = float(regularized_incomplete_beta(torch.tensor(x, dtype=torch.float64), a, b))
    assert value == pytest.approx(float(special.betainc(a, b, x)), rel=1e-10, abs=1e-14)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_score_matching_of_a_normal_and_what_a_kernel_estimate_gives() -> None:
    x = torch.randn(20_000, generator=generator(), dtype=torch.float64)
    u = torch.linspace(-3, 3, 121, dtype=torch.float64)
    exact = Normal().pdf_derivative(u)
    measured = EmpiricalDensity.fit(x).pdf_derivative(u)
    assert float((measured - exact).abs().max()) < 0.02  # of a peak of 0.242
    stats = pytest.importorskip("scipy.stats")
    kernel = stats.gaussian_kde(x.numpy())
    h = 1e-3
    slope = (kernel(u.numpy() + h) - kernel(u.numpy() - h)) / (2 * h)
    assert abs(slope - exact.numpy()).max() > 0.04


@pytest.mark.parametrize(
    ("density", "score_error", "entropy_error"),
    [
        (Normal(1.0, scale=0.2), 0.1, 0.01),
        (Logistic(), 0.05, 0.01),
        (StudentT(3.0), 0.1, 0.02),
        (StudentT(1.0), 0.2, 0.05),
        (Mixture([Normal(-1.0), Normal(2.0, scale=0.5)]), 0.3, 0.02),
        (Mixture([Normal(-4.0, scale=0.5), Normal(4.0, scale=0.5)], weights=[0.2, 0.8]), 0.6, 0.02),
    ],
    ids=str,
)
def test_measured_density_is_close_to_the_true_one(density, score_error: float, entropy_error: float) -> None:
    x = density.sample(100_000, generator=generator())
    measured = EmpiricalDensity.fit(x)
    low, high = density.quantile(torch.tensor([0.01, 0.99])).tolist()
    u = torch.linspace(low, high, 601, dtype=torch.float64)
    p = density.pdf(u)
    error = ((measured.score(u) - density.score(u)) ** 2 * p).sum() / p.sum()
    assert float(error.sqrt()) * density.scale < score_error
    assert measured.distance < 0.01
    assert measured.entropy() == pytest.approx(density.entropy(), abs=entropy_error)


def test_separated_modes_keep_their_mass_only_after_refinement() -> None:
    """Score matching alone does not see how much mass each of two separated modes has."""
    density = Mixture([Normal(-4.0, scale=0.5), Normal(4.0, scale=0.5)], weights=[0.2, 0.8])
    x = density.sample(50_000, generator=generator())
    refined = EmpiricalDensity.fit(x)
    assert refined.refined
    assert float(refined.cdf(torch.tensor(0.0, dtype=torch.float64))) == pytest.approx(0.2, abs=0.01)
    with pytest.warns(UserWarning, match="misses that of the samples"):
        plain = EmpiricalDensity.fit(x, refine=False)
    assert plain.distance > 0.05


def test_measured_density_belongs_to_its_own_score_and_distribution_function() -> None:
    measured = EmpiricalDensity.fit(torch.randn(5_000, generator=generator()))
    x = torch.linspace(-5, 5, 53, dtype=torch.float64, requires_grad=True)  # beyond the outer knots, too
    (slope,) = torch.autograd.grad(measured.log_pdf(x).sum(), x)
    torch.testing.assert_close(measured.score(x).detach(), slope)
    (slope,) = torch.autograd.grad(measured.cdf(x).sum(), x)
    torch.testing.assert_close(measured.pdf(x).detach(), slope, rtol=1e-4, atol=1e-7)
    assert float(measured.nodes()[1].sum()) == pytest.approx(1.0, abs=1e-8)
    assert measured.analytic is False
    assert "5,000 samples" in repr(measured)


def test_ties_of_rounding_do_no_harm_to_score_matching() -> None:
    x = torch.randn(100_000, generator=generator())
    u = torch.linspace(-2, 2, 41, dtype=torch.float64)
    rounded = EmpiricalDensity.fit(x.bfloat16())
    assert float((rounded.score(u) + u).abs().max()) < 0.1


def test_weights_stand_for_repetitions() -> None:
    x = torch.randn(2_000, generator=generator(), dtype=torch.float64)
    weights = torch.arange(2_000) % 3
    places = torch.linspace(-3, 3, 9)
    whole = EmpiricalDensity.fit(x.repeat_interleave(weights), smoothing=0.0, knots=places)
    weighted = EmpiricalDensity.fit(x, weights=weights, smoothing=0.0, knots=places)
    u = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert float((whole.score(u) - weighted.score(u)).abs().max()) < 1e-6
