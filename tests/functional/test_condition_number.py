"""Condition numbers: known spectra and constants, layouts, deficient ranks, and what rounding leaves to be resolved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import (
    condition_number,
    condition_of_spectrum,
    expected_condition_number,
    resolvable_condition_number,
    singular_spectrum,
)
from tests.functional.test_singular_spectrum import exact_values, integers, with_spectrum


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kappa", [1, 10, 1000, 10**5, 10**7, 10**9])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 16), (16, 64)])
def test_a_known_spectrum(rows: int, columns: int, kappa: int) -> None:
    matrix = with_spectrum(rows, columns, integers(min(rows, columns), kappa))
    found = condition_number(matrix)
    assert abs(float(found.value) / kappa - 1) <= float(found.error)
    assert float(found.sigma_max) == pytest.approx(kappa, rel=1e-9)
    assert float(found.sigma_min) == pytest.approx(1, rel=float(found.error))
    for same in (matrix * 2.0**-20, matrix.mT, with_spectrum(rows, rows, torch.ones(rows)).double() @ matrix):
        other = condition_number(same)
        assert float(other.value) == pytest.approx(kappa, rel=float(found.error + other.error) + 1e-15 * kappa)


def test_constants() -> None:
    assert float(condition_number(with_spectrum(64, 64, torch.ones(64))).value) == pytest.approx(1, rel=1e-12)
    for n in (2, 7, 40):
        assert float(condition_number(torch.diag(torch.arange(1.0, n + 1))).value) == pytest.approx(n, rel=1e-10)
    i = torch.arange(5, dtype=torch.float64)
    hilbert = 1 / (i[:, None] + i + 1)
    assert float(condition_number(hilbert).value) == pytest.approx(4.766073e5, rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0, 9),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31 - 1),
)
def test_the_true_error_is_within_the_bound(
    rows: int, columns: int, decades: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    matrix = ((left * torch.logspace(0, -decades, small, dtype=torch.float64)) @ right.mT).to(dtype)
    values = exact_values(matrix)
    true = float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf
    found = condition_number(matrix)
    if math.isinf(float(found.value)):
        assert true >= min(float(found.resolvable), 1e12) * (1 - 1e-6)
    else:
        assert abs(float(found.value) - true) <= float(found.error) * true
        assert float(found.value) < float(found.resolvable)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_and_deficient_matrices_are_infinite(dtype: torch.dtype) -> None:
    repeated = normal(24, 16).to(dtype)
    repeated[:, 3] = repeated[:, 1]
    rank_1 = (normal(24, 1, dtype=torch.float64) @ normal(1, 16, seed=1, dtype=torch.float64)).to(dtype)
    for matrix in (torch.zeros(8, 8, dtype=dtype), repeated, rank_1, rank_1.mT, torch.ones(3, 5, dtype=dtype)):
        found = condition_number(matrix)
        assert math.isinf(float(found.value))
        assert math.isinf(float(found.error))


def test_shape_alone() -> None:
    """Independent entries: within 5 % of the edges, and for square ones the median of Edelman's law."""
    wide, four = (float(condition_number(normal(768, n)).value) for n in (2304, 3072))
    assert wide == pytest.approx(expected_condition_number(768, 2304), rel=0.05)
    assert four == pytest.approx(expected_condition_number(3072, 768), rel=0.03)
    n = 60
    kappas = condition_number(normal(300, n, n, dtype=torch.float64), layout="experts").value / n
    assert float((kappas > 10).double().mean()) == pytest.approx(1 - math.exp(-2 / 10 - 2 / 100), abs=0.07)
    assert float(kappas.median()) == pytest.approx(expected_condition_number(n, n) / n, rel=0.2)
    assert expected_condition_number(1, 1) == expected_condition_number(1, 50) == 1.0
    assert expected_condition_number(384, 385) <= 3.67 * 384


def test_layouts() -> None:
    kernel = normal(6, 3, 2, 2)
    torch.testing.assert_close(condition_number(kernel).value, condition_number(kernel.reshape(6, 12)).value)
    time = normal(6, 3, 2)
    torch.testing.assert_close(
        condition_number(time, layout="conv").value, condition_number(time.reshape(6, 6)).value, rtol=1e-9, atol=0
    )
    experts = condition_number(time, layout="experts")
    assert experts.value.shape == experts.error.shape == experts.resolvable.shape == (6,)
    for i in range(6):
        torch.testing.assert_close(experts.value[i], condition_number(time[i]).value, rtol=1e-9, atol=0)


def test_parts_of_a_fused_projection() -> None:
    q, k, v = (normal(16, 16, seed=i) for i in range(3))
    fused = torch.cat([q, k, v])
    parts = condition_number(fused, parts=3)
    assert parts.value.shape == (3,)
    for part, one in zip(parts.value, (q, k, v)):
        assert float(part) == pytest.approx(float(condition_number(one).value), rel=1e-9)
    assert float(condition_number(fused).value) != pytest.approx(float(parts.value.max()), rel=0.1)
    assert condition_number(normal(5, 6, 4), layout="experts", parts=2).value.shape == (5, 2)


def test_a_spectrum_that_is_there_already() -> None:
    matrix = normal(20, 12)
    for stored in (torch.float32, torch.bfloat16, 4):
        ours = condition_of_spectrum(singular_spectrum(matrix), 20, 12, stored)
        whole = condition_number(matrix, stored_dtype=stored)
        for a, b in zip(ours, whole):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (None, 8), (None, 4)]
)
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (80, 40)])
def test_rounding_gives_a_missing_direction_the_resolvable_condition(
    dtype: torch.dtype | None, bits: int | None, rows: int, columns: int
) -> None:
    """Matrices with one singular value of 0, rounded: the median condition number, against the prediction."""
    found, predicted = [], []
    for seed in range(30):
        matrix = normal(rows, columns, seed=seed, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u[:, :-1] * s[:-1]) @ v[:-1]
        if dtype is not None:
            rounded = matrix.to(dtype).double()
        else:
            step = 2 * matrix.abs().amax(1, keepdim=True) / (2**bits - 1)
            rounded = (matrix / step).round() * step
        values = singular_spectrum(rounded).values
        found.append(float(values[0] / values[-1]))
        rms = float(matrix.square().mean().sqrt())
        stored = dtype if dtype is not None else bits
        assert stored is not None
        predicted.append(float(resolvable_condition_number(rows, columns, rms, stored, sigma_max=values[0])))
    ratio = torch.tensor(found).median() / torch.tensor(predicted).median()
    assert 0.5 < float(ratio) < 3.5


def test_resolvable_as_the_entries_of_a_random_matrix_have_it() -> None:
    matrix = normal(64, 32, dtype=torch.float64)
    rms = matrix.square().mean().sqrt()
    guess = resolvable_condition_number(64, 32, rms, torch.float32)
    exact = condition_number(matrix, stored_dtype=torch.float32).resolvable
    assert float(guess) == pytest.approx(float(exact), rel=0.1)
    assert float(resolvable_condition_number(64, 32, 0.0, 8)) == math.inf
    with pytest.raises(ValueError, match="bits"):
        resolvable_condition_number(4, 4, 1.0, torch.int8)
    with pytest.raises(ValueError, match="from 2"):
        resolvable_condition_number(4, 4, 1.0, 1)


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((2, 3, 4), {}, 'layout="experts" or "conv"'),
        ((2, 3), {"layout": "conv"}, "pass another layout"),
        ((2, 3, 4), {"layout": "linear"}, "pass another layout"),
        ((3,), {}, "shape \\(3,\\)"),
        ((4, 4), {"layout": "lstm"}, "must be one of linear, conv, experts"),
        ((4, 4), {"parts": 3}, "must divide the 4 rows"),
    ],
)
def test_what_does_not_fit(shape: tuple[int, ...], options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        condition_number(torch.ones(shape), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        expected_condition_number(0, 3)
