"""Singular values and their error bounds: against 50 digits, and matrices whose spectrum is known exactly."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import singular_spectrum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_values(matrix: Tensor) -> Tensor:
    """Of the numbers as they are stored, by mpmath with 60 digits, rounded to float64."""
    with mpmath.workdps(60):
        values = mpmath.svd_r(mpmath.matrix(matrix.double().tolist()), compute_uv=False)
        return torch.tensor([float(v) for v in values], dtype=torch.float64)


def hadamard(size: int, seed: int) -> Tensor:
    """Orthonormal, of powers of 2 only: size is a power of 4."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return matrix[torch.randperm(size, generator=generator)] * signs / math.isqrt(size)


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with exactly these singular values, where they are integers that leave float64 room to add them."""
    small = len(values)
    matrix = (hadamard(rows, seed)[:, :small] * values) @ hadamard(columns, seed + 1)[:, :small].mT
    assert small == min(rows, columns)
    return matrix


def integers(small: int, kappa: float) -> Tensor:
    """Log-spaced integers from 1 to kappa, descending."""
    return torch.logspace(math.log2(kappa), 0, small, base=2, dtype=torch.float64).round()


@pytest.mark.parametrize("kappa", [1, 10, 100, 1000, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (64, 64), (64, 16), (16, 256), (256, 64), (4, 1)])
def test_the_true_error_is_within_the_bound(rows: int, columns: int, kappa: int) -> None:
    values = integers(min(rows, columns), kappa)
    found = singular_spectrum(with_spectrum(rows, columns, values))
    assert found.values.dtype == torch.float64
    assert bool(((found.values - values).abs() <= found.errors * values).all())
    assert int(found.rank) == len(values)
    assert float(found.error) < max(1e-6, 1e-12 * kappa)


@pytest.mark.parametrize("kappa", [2, 300, 2**14])
def test_float32_with_a_known_spectrum(kappa: int) -> None:
    values = integers(16, kappa)
    matrix = with_spectrum(64, 16, values)
    narrow = matrix.float()
    assert torch.equal(narrow.double(), matrix)  # so the spectrum is known exactly
    found = singular_spectrum(narrow)
    assert bool(((found.values - values).abs() <= found.errors * values).all())
    assert float(found.error) <= 1e-6


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0, 9),
    st.sampled_from(DTYPES),
    st.integers(-3, 3),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-6, 1e-3, 1e-12, 0.0]),
)
def test_bounds_hold_for_any_shape_dtype_and_condition(
    rows: int, columns: int, decades: float, dtype: torch.dtype, power: int, seed: int, rtol: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    matrix = ((left * torch.logspace(0, -decades, small, dtype=torch.float64)) @ right.mT * 10.0**power).to(dtype)
    exact, found = exact_values(matrix), singular_spectrum(matrix, rtol=rtol)
    assert found.values.shape == (small,)
    resolved = found.errors < 1
    assert bool(((found.values - exact).abs() <= found.errors * exact + 1e-300)[resolved].all())
    # What is not resolved is as small as the error of an SVD.
    assert bool((exact[~resolved] <= 40 * max(rows, columns) * 2.0**-53 * exact[0]).all())
    if decades < 5 and dtype == torch.float64 and rtol == 1e-6:
        assert float(found.error) <= rtol


def test_an_svd_is_made_exactly_where_the_bound_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: calls.append(1) or svdvals(m))  # type: ignore[func-returns-value]
    for kappa in [10**3, 10**4, 10**5]:
        matrix = with_spectrum(64, 16, integers(16, kappa))
        bound = float(singular_spectrum(matrix, rtol=1.0).error)
        refined = float(singular_spectrum(matrix, rtol=bound * 0.999).error)
        assert refined < bound
        assert float(singular_spectrum(matrix).error) <= 1e-6
        assert not calls
        assert float(singular_spectrum(matrix, rtol=refined).error) == refined
        assert not calls
        corrected = float(singular_spectrum(matrix, rtol=refined * 0.999).error)
        assert corrected < refined
        assert not calls
        singular_spectrum(matrix, rtol=corrected * 0.999)
        assert calls.pop() == 1
    assert float(singular_spectrum(with_spectrum(64, 16, integers(16, 10**7))).error) < 1e-5
    assert calls
    calls.clear()
    singular_spectrum(torch.eye(3), rtol=0)
    assert calls


def test_correction_does_what_an_svd_would_have_been_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value far below the rest: the product with its vector is off by what is large beside the value's square."""
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: pytest.fail("decomposed"))
    for low in (1, 2, 5):
        values = torch.cat([torch.logspace(20, 11, 63, base=2, dtype=torch.float64).round(), torch.tensor([low])])
        found = singular_spectrum(with_spectrum(256, 64, values))
        assert bool(((found.values - values).abs() <= found.errors * values).all())
        assert float(found.error) <= 1e-6


def test_a_cluster_at_the_bottom_is_not_claimed_by_refinement() -> None:
    values = torch.cat([torch.full((8,), 2.0**17), torch.ones(8)]).double()
    found = singular_spectrum(with_spectrum(64, 16, values))
    assert bool(((found.values - values).abs() <= found.errors * values).all())
    assert float(found.error) <= 1e-6


def test_a_stack_gives_what_its_matrices_give() -> None:
    matrices = [with_spectrum(16, 64, integers(16, k), seed=k) for k in (1, 50, 10**5, 10**7, 3, 9)]
    stack = torch.stack(matrices).unflatten(0, (2, 3))
    found = singular_spectrum(stack)
    assert found.values.shape == found.errors.shape == (2, 3, 16)
    assert found.rank.shape == found.error.shape == (2, 3)
    for i, matrix in enumerate(matrices):
        alone = singular_spectrum(matrix)
        torch.testing.assert_close(found.values[i // 3, i % 3], alone.values, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.errors[i // 3, i % 3], alone.errors, rtol=1e-6, atol=0)


def test_layout_and_large_matrices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["lightning_entropy.functional.singular_spectrum"]
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    whole = singular_spectrum(matrix)
    for other in (matrix.mT, matrix.mT.contiguous(), matrix.flip(0), torch.randn(1, 40, 24).copy_(matrix)[0]):
        torch.testing.assert_close(singular_spectrum(other).values, whole.values, rtol=1e-12, atol=0)
    square = with_spectrum(64, 64, integers(64, 3000)).float()
    monkeypatch.setattr(module, "_CHUNK", 100)  # a few rows at a time
    torch.testing.assert_close(singular_spectrum(matrix).values, whole.values, rtol=1e-12, atol=0)
    true = singular_spectrum(square.double()).values
    assert bool(((singular_spectrum(square).values - true).abs() <= 2e-6 * true).all())


@pytest.mark.parametrize("scale", [5e-324 * 2**60, 1e-290, 1e-120, 1e120, 1e290])
def test_numbers_at_the_ends_of_float64(scale: float) -> None:
    values = torch.tensor([7.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = singular_spectrum(torch.diag(values) * scale)
    torch.testing.assert_close(found.values / scale, values, rtol=1e-12, atol=0)
    assert float(found.error) < 1e-12


def test_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 5, generator=generator)
    assert int(singular_spectrum(matrix).rank) == 5
    matrix[:, 3] = matrix[:, 1]
    assert int(singular_spectrum(matrix).rank) == 4
    assert math.isinf(float(singular_spectrum(matrix).error))
    zero = singular_spectrum(torch.zeros(2, 3, 4))
    assert zero.rank.tolist() == [0, 0]
    assert not bool(zero.values.any())


def test_float8_is_read() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.5])).to(torch.float8_e4m3fn)
    torch.testing.assert_close(singular_spectrum(matrix).values, torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.zeros(3), "shape \\(3,\\)"),
        (torch.zeros(3, 3, dtype=torch.int64), "int64"),
        (torch.zeros(0, 3), "must not be empty"),
        (torch.tensor([[1.0, math.nan]]), "not finite"),
        (torch.tensor([[1.0], [-math.inf]]), "not finite"),
    ],
)
def test_what_is_no_matrix(matrix: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        singular_spectrum(matrix)
    with pytest.raises(ValueError, match="rtol"):
        singular_spectrum(torch.eye(2), rtol=-1.0)


def test_nothing_of_the_weight_is_touched() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    before, state = weight.detach().clone(), torch.random.get_rng_state()
    found = singular_spectrum(weight)
    assert not found.values.requires_grad
    assert torch.equal(weight, before)
    assert torch.equal(torch.random.get_rng_state(), state)
