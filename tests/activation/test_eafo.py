"""EAFO against the specification's oracles, CRReLU, and calculus."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.activation import EAFOActivation, eafo, eafo_report, wafbc
from lightning_entropy.functional import (
    EmpiricalDensity,
    Laplace,
    Logistic,
    Mixture,
    Normal,
    StudentT,
    eafo_correction,
    pushforward_entropy,
)

X = torch.linspace(-4, 4, 81, dtype=torch.float64)
BUMP = X * torch.exp(-X * X / 2)
SLOPE = 1 / (2 * math.sqrt(math.pi) * 2)  # integral of (u phi)^2, 0.14105


# The rules.


@pytest.mark.parametrize("slope", [0.5, 1e-2, 1e-4, 1e-7])
def test_the_leaky_relu_limit_is_crrelus_correction(slope: float) -> None:
    """In the paper's metric the correction is p' whatever the slope, so the limit is exact."""
    df = eafo_correction(lambda u: F.leaky_relu(u, slope), Normal(), X)
    torch.testing.assert_close(df * -math.sqrt(2 * math.pi), BUMP, rtol=0, atol=1e-10)


def test_relu_itself_with_the_limit_is_crrelu() -> None:
    activation = eafo(nn.ReLU(), Normal(), flat="limit", step=-0.1 * math.sqrt(2 * math.pi))
    assert activation.table is None  # in closed form
    torch.testing.assert_close(activation.correction(X) * -math.sqrt(2 * math.pi), BUMP, rtol=0, atol=1e-10)
    torch.testing.assert_close(activation(X).detach(), F.relu(X) + 0.1 * BUMP, rtol=0, atol=1e-7)
    assert activation.measured_dH == math.inf  # from an atom, minus infinity
    assert activation.report.after.atom_mass < 1e-6
    plain = eafo_correction(F.relu, Normal(), X)
    torch.testing.assert_close(plain, torch.where(X > 0, Normal().pdf_derivative(X), 0.0))


def test_a_spread_other_than_one_gives_the_calibrated_form() -> None:
    density = Normal(0.3, scale=0.2)
    df = eafo_correction(lambda u: F.leaky_relu(u, 0.1), density, X)
    z = (X - 0.3) / 0.2
    torch.testing.assert_close(df, -z / 0.2 * torch.exp(-z * z / 2) / (0.2 * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize(
    ("function", "slope", "curvature"),
    [
        (torch.tanh, lambda u: 1 - u.tanh() ** 2, lambda u: -2 * u.tanh() * (1 - u.tanh() ** 2)),
        (F.softplus, torch.sigmoid, lambda u: torch.sigmoid(u) * torch.sigmoid(-u)),
    ],
)
@pytest.mark.parametrize("density", [Normal(), Logistic(0.2, scale=0.7), StudentT(4.0)], ids=str)
def test_metrics_against_the_written_out_formulas(function, slope, curvature, density) -> None:
    p, dp = density.pdf(X), density.pdf_derivative(X)
    inverse = dp - p * curvature(X) / slope(X)
    torch.testing.assert_close(eafo_correction(function, density, X), inverse)
    forward = inverse / slope(X)
    torch.testing.assert_close(eafo_correction(function, density, X, metric="forward"), forward)
    torch.testing.assert_close(eafo_correction(function, density, X, metric="score"), forward)


def test_the_three_metrics_decrease_as_predicted() -> None:
    slope = {}
    for metric in ("inverse", "forward", "score"):
        activation = eafo(nn.Softplus(), Normal(), metric=metric, step=1e-3)
        slope[metric] = activation.predicted_dH
        assert activation.measured_dH == pytest.approx(activation.predicted_dH, rel=2e-2)
    assert slope["inverse"] == pytest.approx(-2.717e-4, rel=1e-3)
    assert slope["forward"] == pytest.approx(slope["score"], rel=1e-6)
    # Rule B's formula, the integral of ((p / f')')^2 over the support.
    assert slope["forward"] < slope["inverse"]


@pytest.mark.parametrize(
    ("base", "predicted", "measured"),
    [
        (nn.Softplus(), -2.717e-4, -2.708e-4),
        (nn.Tanh(), -8.14e-5, -8.22e-5),
        (nn.LeakyReLU(0.2), -4.231e-4, -4.216e-4),
        (nn.Identity(), -1.410e-4, -1.404e-4),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_predicted_and_measured_decrease_of_a_small_step(base: nn.Module, predicted: float, measured: float) -> None:
    activation = eafo(base, Normal(), step=1e-3)
    assert activation.predicted_dH == pytest.approx(predicted, rel=3e-3)
    assert activation.measured_dH == pytest.approx(measured, rel=2e-2)
    assert activation.report.monotone
    assert eafo(base, Normal(), step=1e-2).report.monotone


def test_elu_is_mollified_and_then_keeps_what_is_predicted() -> None:
    """Its second derivative jumps at 0, and with it the correction: a jump loses entropy that is not predicted."""
    activation = eafo(nn.ELU(), Normal(), step=1e-3)
    assert activation.report.mollified >= 0.05
    assert activation.measured_dH == pytest.approx(activation.predicted_dH, rel=1e-2)
    assert activation.predicted_dH == pytest.approx(-1.5e-4, rel=5e-2)
    assert eafo(nn.Softplus(), Normal(), step=1e-3).report.mollified == 0
    chosen = eafo(nn.Softplus(), Normal(), step=1e-3, mollify=0.3)
    assert chosen.report.mollified == 0.3


def test_the_identity_of_a_normal_only_shrinks() -> None:
    activation = eafo(nn.Identity(), Normal(), step=1e-3)
    assert activation.predicted_dH == pytest.approx(-1e-3 * SLOPE, rel=1e-4)
    assert abs(activation.measured_dH_standardized) < 1e-3 * abs(activation.measured_dH)
    projected = eafo(nn.Identity(), Normal(), step=1e-3, project_gain=True)
    assert abs(projected.predicted_dH) < 1e-9


def test_projected_correction_is_uncorrelated_with_the_activation() -> None:
    activation = eafo(nn.Softplus(), Normal(), project_gain=True, step=1e-2).double()
    x, w = Normal().nodes()
    f = F.softplus(x)
    change = (activation(x).detach() - f) / activation.step.item()
    assert float((w * change * (f - (w * f).sum())).sum()) == pytest.approx(0.0, abs=1e-6)
    report = activation.report
    assert report.measured_dH_standardized == pytest.approx(report.predicted_dH_standardized, rel=2e-2)
    assert report.measured_dH_standardized < 0


@pytest.mark.parametrize("base", [nn.GELU(), nn.SiLU(), nn.Mish()], ids=lambda m: type(m).__name__)
def test_bases_that_turn(base: nn.Module) -> None:
    with pytest.raises(ValueError, match="Pass metric='score'"):
        eafo(base, Normal())
    activation = eafo(base, Normal(), metric="score")
    assert activation.measured_dH <= 0.5 * activation.predicted_dH < 0
    assert not activation.report.monotone


def test_automatic_steps_keep_a_monotone_base_monotone() -> None:
    for base in (nn.Softplus(), nn.Tanh(), nn.LeakyReLU(0.05), nn.ELU()):
        for density in (Normal(), Normal(0.1, scale=0.2), Mixture([Normal(-1.5), Normal(1.5)])):
            activation = eafo(base, density)
            assert activation.report.monotone, (base, density)
            assert 0 < activation.report.step <= 1
            assert activation.measured_dH < 0


def test_flat_pieces_stay_flat() -> None:
    for base, density in (
        (nn.ReLU(), Normal()),
        (nn.ReLU(), Normal(0.1, scale=0.2)),
        (nn.ReLU6(), Normal(2.0, scale=3.0)),
    ):
        activation = eafo(base, density, step=1e-5)
        before, after = activation.report.before, activation.report.after
        assert float(after.atom_mass) == pytest.approx(float(before.atom_mass), abs=1e-6)
        assert activation.measured_dH == pytest.approx(activation.predicted_dH, rel=3e-2)
        dead = torch.linspace(-3, -1e-6, 50, dtype=torch.float64)
        assert torch.equal(activation(dead), base(dead))


def test_heavy_tails_and_kinked_densities() -> None:
    for density, support in ((Laplace(), 1e-3), (StudentT(3.0), 1e-3), (StudentT(1.0), 0.02)):
        activation = eafo(nn.Softplus(), density, step=1e-6, support=(support, 1 - support))
        assert activation.measured_dH == pytest.approx(activation.predicted_dH, rel=5e-2)
    with pytest.warns(UserWarning, match="Narrow support= or raise knots="):
        eafo(nn.Softplus(), StudentT(1.0), step=1e-4)


def test_a_measured_density_gives_nearly_the_correction_of_the_true_one() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.5
    measured = eafo(nn.Softplus(), EmpiricalDensity.fit(x), step=1e-3)
    exact = eafo(nn.Softplus(), Normal(scale=0.5), step=1e-3)
    assert measured.table is not None
    u = torch.linspace(-1.2, 1.2, 25)
    peak = float(exact.correction(u).abs().max())
    assert float((measured.correction(u) - exact.correction(u)).abs().max()) < 0.1 * peak
    assert measured.measured_dH == pytest.approx(exact.measured_dH, rel=0.1)


# The worst activation.


def test_wafbc_is_the_maximiser_and_eafos_fixed_point() -> None:
    for density in (Normal(0.5, scale=2.0), Logistic(), StudentT(3.0)):
        worst = wafbc(density, -1.0, 2.0)
        assert float(pushforward_entropy(worst, density).entropy) == pytest.approx(math.log(3), abs=1e-6)
        x = density.quantile(torch.linspace(0.01, 0.99, 33))
        assert float(eafo_correction(worst, density, x).abs().max()) < 1e-9
    other = pushforward_entropy(lambda x: torch.sigmoid(3 * x) * 3 - 1, Normal(0.5, scale=2.0))
    assert float(other.entropy) < math.log(3)


def test_wafbc_as_a_module() -> None:
    worst = wafbc(Logistic())
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(worst(x), torch.sigmoid(x))
    assert torch.autograd.gradcheck(wafbc(StudentT(3.0)), x)
    assert torch.autograd.gradgradcheck(wafbc(StudentT(3.0)), x)
    assert worst(torch.tensor([math.inf, -math.inf])).tolist() == [1.0, 0.0]
    assert worst(x.bfloat16()).dtype == torch.bfloat16
    measured = wafbc(EmpiricalDensity.fit(torch.randn(5000, generator=torch.Generator().manual_seed(0))))
    assert torch.autograd.gradcheck(measured, x, atol=1e-3)
    with pytest.raises(ValueError, match="low < high"):
        wafbc(Normal(), 1.0, 1.0)
    assert "density=Logistic" in repr(worst)


# The module.


def tabulated() -> EAFOActivation:
    return eafo(nn.Softplus(), Normal(), step=0.3)


def test_gradients() -> None:
    x = torch.linspace(-5, 5, 24, dtype=torch.float64, requires_grad=True)  # not at the kink
    for activation in (
        tabulated(),
        eafo(nn.LeakyReLU(0.2), Normal(), step=0.1),
        eafo(nn.Tanh(), Normal(), project_gain=True),
    ):

        def of(x: Tensor, step: Tensor, a: EAFOActivation = activation) -> Tensor:
            return torch.func.functional_call(a, {"step": step}, (x,))

        step = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(of, (x, step))
        assert torch.autograd.gradgradcheck(of, (x, step))


def test_extremes() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 6e4, -6e4, 0.0])
    for activation in (tabulated(), eafo(nn.LeakyReLU(0.2), Normal(), step=0.1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = activation(x.to(dtype))
            assert y.dtype == dtype
            assert y[0] == math.inf
            assert y[2].isnan()
            assert y[3] == x[3].to(dtype)
            torch.testing.assert_close(y[[1, 4]], activation.base(x.to(dtype))[[1, 4]])
        leaf = x[3:].clone().requires_grad_()
        activation(leaf).sum().backward()
        assert leaf.grad.isfinite().all()


def test_the_correction_is_smooth_and_ends() -> None:
    activation = tabulated()
    x = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    values = activation.correction(x)
    assert float(values[x < activation.bounds[0]].abs().max()) < 1e-7
    assert float(values[x > activation.bounds[1]].abs().max()) < 1e-7
    assert float(values.diff(n=2).abs().max()) < 1e-5


def test_cast_compiled_pickled_and_saved() -> None:
    activation = tabulated()
    x = torch.randn(64)
    y = activation(x)
    half = copy.deepcopy(activation).bfloat16()
    assert half.step.dtype == half.table.dtype == torch.float32
    assert activation.step.shape == (1,)
    torch.testing.assert_close(pickle.loads(pickle.dumps(activation))(x), y)
    torch.testing.assert_close(torch.compile(activation, backend="aot_eager", fullgraph=True)(x), y)
    stored = io.BytesIO()
    torch.save(activation.state_dict(), stored)
    stored.seek(0)
    other = eafo(nn.Softplus(), Normal(scale=2.0), step=0.1)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert float(other.step.detach()) == pytest.approx(0.3)
    torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(torch.vmap(activation)(x.view(8, 8)).view(-1), y)


def test_the_base_is_left_alone() -> None:
    base = nn.ReLU(inplace=True)
    activation = eafo(base, Normal())
    assert activation.base is base
    assert base.training
    shared = nn.PReLU()
    learned = eafo(shared, Normal(), step=0.1)
    assert set(dict(learned.named_parameters())) == {"step", "base.weight"}
    learned(torch.randn(5)).sum().backward()
    assert shared.weight.grad is not None


def test_in_place_bases_do_not_spoil_the_correction() -> None:
    x = torch.randn(100)
    expected = eafo(nn.LeakyReLU(0.2), Normal(), step=0.1)(x)
    torch.testing.assert_close(eafo(nn.LeakyReLU(0.2, inplace=True), Normal(), step=0.1)(x.clone()), expected)


def test_report() -> None:
    report = tabulated().report
    assert "EAFO (inverse): step 0.3" in str(report)
    assert json.loads(report.to_json())["before"]["entropy"] == pytest.approx(0.61288, abs=1e-5)
    infinite = eafo(nn.ReLU(), Normal(), flat="limit").report
    assert json.loads(infinite.to_json())["measured_dH"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "l2"}, "metric must be one of inverse, forward, score, got 'l2'"),
        ({"step": "big"}, "step must be a number or 'auto'"),
        ({"step": math.nan}, "step must be finite"),
        ({"max_step": 0.0}, "max_step must be finite and > 0"),
        ({"support": (0.9, 0.1)}, "support must be two quantiles"),
        ({"knots": 4}, "knots must be at least 8"),
        ({"mollify": -1.0}, "mollify must be finite and >= 0"),
        ({"flat": "skip"}, "flat must be 'zero' or 'limit'"),
        ({"flat": "limit", "metric": "forward"}, "exists in metric='inverse' only"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eafo(nn.Softplus(), Normal(), **change)


def test_what_cannot_be_corrected() -> None:
    with pytest.raises(ValueError, match="flat on the support"):
        eafo(nn.ReLU(), Normal(-100.0))
    with pytest.raises(ValueError, match="finite standard deviation"):
        eafo(nn.Softplus(), StudentT(1.5), project_gain=True)


# On a model.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Softplus(), nn.GELU(), nn.ReLU(inplace=True), nn.PReLU(32))
    return nn.Sequential(*(m for act in layers for m in (nn.Linear(32, 32), nn.BatchNorm1d(32), act)))


def test_report_on_a_model_leaves_it_alone() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(500, 32)
    report = eafo_report(model, x)
    assert [row["site"] for row in report.rows] == ["2", "5", "8", "11"]
    softplus, gelu, relu, prelu = report.rows
    assert (softplus["metric"], gelu["metric"]) == ("inverse", "score")
    assert softplus["measured_dH"] < 0 > gelu["measured_dH"]
    assert relu["atom_mass"] > 0.3
    assert "one function of each element" in prelu["note"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    assert "dH std'd" in str(report)
    assert json.loads(report.to_json())["sites"][0]["activation"] == "Softplus"
    assert len(report.plot().axes) >= 3
    named = eafo_report(model, (x,), modules="5", metric="score")
    assert [row["site"] for row in named.rows] == ["5"]
    with pytest.raises(ValueError, match="matched 0 of"):
        eafo_report(model, x, modules="blocks.*")
