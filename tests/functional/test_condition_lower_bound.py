"""Lower bounds that must never exceed the condition number, whatever was rounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_entropy.functional import condition_lower_bound, condition_number
from tests.functional.test_singular_spectrum import exact_values, integers, with_spectrum


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0, 12),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(-4, 4),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_never_above(
    rows: int, columns: int, decades: float, dtype: torch.dtype, power: int, steps: int, inverse: bool, seed: int
) -> None:
    """Steps up to the size, where float32 finds everything that there is to find and the bound is tightest."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    values = torch.logspace(0, -decades, small, dtype=torch.float64)
    matrix = ((left * values) @ right.mT * 10.0**power).to(dtype)
    exact = exact_values(matrix)
    kappa = float(exact[0]) / float(exact[-1]) if float(exact[-1]) > 0 else math.inf
    bound = float(condition_lower_bound(matrix, steps, inverse=inverse))
    assert 1 <= bound <= kappa


@pytest.mark.parametrize("kappa", [1, 3, 30, 1000, 10**6, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(256, 64), (64, 64), (16, 256)])
def test_never_above_a_known_condition_number(rows: int, columns: int, kappa: int, dtype: torch.dtype) -> None:
    """The condition number is an integer and known exactly; in float32 of what float32 holds exactly."""
    matrix = with_spectrum(rows, columns, integers(min(rows, columns), kappa))
    if not torch.equal(matrix.to(dtype).double(), matrix):
        return
    for steps in (1, 4, 24, 64):
        for inverse in (False, True):
            assert float(condition_lower_bound(matrix.to(dtype), steps, inverse=inverse)) <= kappa
    if kappa > 1:
        # More steps bring it closer, and with all of them it is there.
        assert float(condition_lower_bound(matrix, 64)) > 0.9 * min(kappa, 10**6)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_reduced_matmul_precision_does_not_break_it(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        matrix = torch.randn(200, 60, generator=torch.Generator().manual_seed(0))
        kappa = condition_number(matrix)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            bound = float(condition_lower_bound(matrix))
        assert 0.9 * float(kappa.value) < bound <= float(kappa.value) * (1 + float(kappa.error))
    finally:
        torch.set_float32_matmul_precision(before)


def test_rectangular_and_square() -> None:
    generator = torch.Generator().manual_seed(0)
    tall, square = torch.randn(768, 192, generator=generator), torch.randn(192, 192, generator=generator)
    assert 0.94 < float(condition_lower_bound(tall)) / float(condition_number(tall).value) < 1
    kappa = float(condition_number(square).value)
    assert float(condition_lower_bound(square)) < 0.5 * kappa
    assert 0.999 < float(condition_lower_bound(square, inverse=True)) / kappa <= 1


def test_it_stops_when_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(400, 100, generator=torch.Generator().manual_seed(1))
    all_steps = float(condition_lower_bound(matrix, 40))
    early = float(condition_lower_bound(matrix, 40, stop_above=1.5))
    assert 1.5 < early < all_steps
    hopeless = float(condition_lower_bound(matrix, 40, stop_above=100.0))
    assert hopeless < all_steps  # it saw that it would not get there
    assert float(condition_lower_bound(matrix, 40, stop_above=100.0, inverse=True)) > hopeless


def test_short_columns_are_found_sooner() -> None:
    """A start on the shortest columns needs fewer steps where these are what small singular values come from."""
    matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(2))
    few = matrix.clone()
    few[:, ::8] /= 40
    kappa = float(condition_number(few).value)
    for steps, least in ((3, 30.0), (6, 40.0)):
        bound = float(condition_lower_bound(few, steps))
        assert least < bound <= kappa
        assert bound > 3 * float(condition_lower_bound(matrix, steps))
    few[:, 8] = 0  # the start is this column then, and a wider space has the rest
    assert float(condition_lower_bound(few, 24)) > 1000


@pytest.mark.parametrize("stop_above", [0.5, 1.0, 1e3, 1e30, math.inf])
def test_any_number_of_interest_and_any_range_of_values(stop_above: float) -> None:
    matrix = torch.diag(torch.logspace(0, -20, 120, dtype=torch.float64))
    for one in (matrix, matrix.float(), torch.eye(120), torch.zeros(120, 120)):
        bound = float(condition_lower_bound(one, 100, stop_above=stop_above))
        assert bound >= 1 if bool(one.any()) else bound == math.inf
        assert not torch.equal(one, torch.eye(120).to(one)) or bound <= 1


def test_stacks_zeros_and_deficient_matrices() -> None:
    stack = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    stack[0, 1] = 0
    stack[1, 2, :, 3] = stack[1, 2, :, 4]
    bounds = condition_lower_bound(stack)
    assert bounds.shape == (2, 3)
    assert float(bounds[0, 1]) == math.inf
    assert float(bounds[1, 2]) > 1e4
    torch.testing.assert_close(bounds[1, 0], condition_lower_bound(stack[1, 0]))
    for scale in (1e-300, 1e300):
        extreme = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)) * scale
        assert 3.99 < float(condition_lower_bound(extreme)) <= 4
    for scale in (1e-37, 1e37):
        assert 3.99 < float(condition_lower_bound(torch.diag(torch.tensor([4.0, 2.0, 1.0])) * scale)) <= 4


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="steps"):
        condition_lower_bound(torch.eye(2), 0)
    with pytest.raises(ValueError, match="not finite"):
        condition_lower_bound(torch.tensor([[1.0, math.nan]]))
