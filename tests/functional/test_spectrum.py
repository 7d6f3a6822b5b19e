"""The lower bound of attention entropy against minimisation and random rows, and top singular vectors against SVD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_entropy.functional import attention_entropy_lower_bound, power_iteration, top_singular_vectors


def entropy(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)


def as_printed(r: float, t: int) -> float:
    b = math.exp(-r * math.sqrt(t / (t - 1)))
    return math.log(1 + (t - 1) * b) + r * math.sqrt(t * (t - 1)) * b / (1 + (t - 1) * b)


@pytest.mark.parametrize("keys", [2, 3, 5, 16, 64, 4096])
@pytest.mark.parametrize("norm", [0.0, 0.1, 1.0, 3.0, 10.0])
def test_the_bound_is_the_papers_and_is_attained(norm: float, keys: int) -> None:
    bound = attention_entropy_lower_bound(norm, keys)
    assert bound.dtype == torch.float64
    assert float(bound) == pytest.approx(as_printed(norm, keys), abs=1e-13)
    extremal = torch.full((keys,), -1 / math.sqrt(keys * (keys - 1)), dtype=torch.float64)
    extremal[0] = math.sqrt((keys - 1) / keys)
    assert float(extremal.norm()) == pytest.approx(1.0)
    assert float(bound) == pytest.approx(float(entropy(norm * extremal)), abs=1e-12)


@pytest.mark.parametrize(("norm", "keys"), [(0.5, 2), (2.0, 5), (4.0, 16)])
def test_no_row_found_by_minimisation_is_below_it(norm: float, keys: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(32, keys, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        entropy(norm * torch.nn.functional.normalize(rows, dim=-1)).sum().backward()
        optimizer.step()
    least = entropy(norm * torch.nn.functional.normalize(rows.detach(), dim=-1)).min()
    bound = attention_entropy_lower_bound(norm, keys)
    assert least >= bound - 1e-12
    assert float(least) == pytest.approx(float(bound), abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 40),
    st.floats(0, 50),
    st.floats(-30, 30),
    st.integers(0, 2**31 - 1),
    st.sampled_from(["l2", "centred"]),
)
def test_every_row_is_above_it(keys: int, spread: float, shift: float, seed: int, norm: str) -> None:
    row = torch.randn(keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread + shift
    r = (row if norm == "l2" else row - row.mean()).norm()
    assert entropy(row) >= attention_entropy_lower_bound(r, keys) - 1e-10


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 10_000), st.floats(0, 500), st.floats(0, 100))
def test_it_falls_in_the_norm_and_stays_between_0_and_log_n(keys: int, norm: float, more: float) -> None:
    bound, lower = attention_entropy_lower_bound(torch.tensor([norm, norm + more], dtype=torch.float64), keys)
    assert 0 <= lower <= bound + 1e-12  # the norm may grow by less than the rounding of log n
    assert bound <= math.log(keys) + 1e-12


def test_shapes_types_and_limits() -> None:
    norms = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16)
    bound = attention_entropy_lower_bound(norms, torch.tensor([0, 1, 2, 7]))
    assert bound.shape == (2, 4)
    assert bound.dtype == torch.float32
    assert bound[:, :2].eq(0).all()
    torch.testing.assert_close(bound[0, 2:], torch.tensor([2.0, 7.0]).log())
    huge = torch.tensor([1e3, 1e30, float("inf")], requires_grad=True)
    value = attention_entropy_lower_bound(huge, 10)
    value.sum().backward()
    assert value.eq(0).all()
    assert huge.grad is not None
    assert huge.grad.eq(0).all()
    assert attention_entropy_lower_bound(2.0, torch.tensor([3, 4])).shape == (2,)


def test_the_tightest_bound_comes_from_the_centred_row() -> None:
    row = torch.randn(12, dtype=torch.float64) + 5
    by_norm = attention_entropy_lower_bound(row.norm(), 12)
    by_centred = attention_entropy_lower_bound((row - row.mean()).norm(), 12)
    assert by_norm < by_centred <= entropy(row)


def test_gradient() -> None:
    norms = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: attention_entropy_lower_bound(r, torch.tensor([2, 9, 300])), norms)


def test_impossible_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="norm must be >= 0, got -1"):
        attention_entropy_lower_bound(-1.0, 3)
    with pytest.raises(ValueError, match="norm must be >= 0, got nan"):
        attention_entropy_lower_bound(float("nan"), 3)
    with pytest.raises(ValueError, match="keys must be >= 0, got -2"):
        attention_entropy_lower_bound(1.0, -2)


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 3), (3, 5), (1, 4), (4, 1), (2, 7, 4), (2, 3, 4, 9), (1030, 1100), (2, 1100, 1030)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_top_singular_vectors(shape: tuple[int, ...], scale: float) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * scale
    state = torch.get_rng_state()
    u, v = top_singular_vectors(matrix)
    assert torch.equal(torch.get_rng_state(), state)
    wide = matrix.double()
    sigma = torch.einsum("...r,...rc,...c->...", u.double(), wide, v.double())
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(wide, 2), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(shape[:-2]))
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(shape[:-2]))


def test_a_large_matrix_of_low_rank() -> None:
    matrix = torch.randn(1100, 2, dtype=torch.float64) @ torch.randn(2, 1050, dtype=torch.float64)
    u, v = top_singular_vectors(matrix)
    torch.testing.assert_close(u @ matrix @ v, torch.linalg.matrix_norm(matrix, 2))


def test_power_iteration_converges_and_keeps_what_it_cannot_divide() -> None:
    matrix = torch.randn(2, 6, 4, dtype=torch.float64)
    u, v = torch.ones(2, 6, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    for _ in range(300):
        u, v = power_iteration(matrix, u, v)
    sigma = torch.einsum("br,brc,bc->b", u, matrix, v)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix, 2))
    for broken in (torch.zeros(2, 6, 4, dtype=torch.float64), torch.full((2, 6, 4), torch.nan, dtype=torch.float64)):
        kept_u, kept_v = power_iteration(broken, u, v)
        assert torch.equal(kept_u, u)
        assert torch.equal(kept_v, v)
