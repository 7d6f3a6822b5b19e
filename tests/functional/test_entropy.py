from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lightning_entropy.functional import (
    effective_number,
    effective_number_from_logits,
    entropy,
    entropy_from_logits,
    top_k_entropy_from_logits,
)

INF = float("inf")
rows = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


def reference(logits: list[float]) -> float:
    """Fifty-digit entropy of a softmax, from the definition."""
    getcontext().prec = 50
    exps = [Decimal(s).exp() for s in logits if s != -INF]
    total = sum(exps)
    return float(-sum((e / total) * (e / total).ln() for e in exps)) if exps else 0.0


@given(rows)
@settings(max_examples=60, deadline=None)
def test_logits_against_fifty_digits(row: list[float]) -> None:
    got = entropy_from_logits(torch.tensor(row, dtype=torch.float64))
    assert got.item() == pytest.approx(reference(row), rel=1e-12, abs=1e-13)


@given(rows, st.floats(-100, 100))
@settings(max_examples=60, deadline=None)
def test_logits_properties(row: list[float], shift: float) -> None:
    s = torch.tensor(row, dtype=torch.float64)
    h = entropy_from_logits(s)
    assert -1e-12 <= h.item() <= math.log(len(row)) + 1e-12
    assert torch.allclose(entropy_from_logits(s + shift), h, atol=1e-10)
    assert torch.allclose(entropy_from_logits(s.flip(0)), h, atol=1e-12)
    assert torch.allclose(entropy_from_logits(s.repeat(3)), h + math.log(3), atol=1e-10)
    assert torch.allclose(entropy(s.softmax(0)), h, atol=1e-10)
    padded = torch.cat([s, torch.full((4,), 7.0, dtype=torch.float64)])
    mask = torch.tensor([1] * len(row) + [0] * 4, dtype=torch.uint8)
    assert torch.allclose(entropy_from_logits(padded, mask=mask), h, atol=1e-12)
    assert torch.allclose(
        entropy_from_logits(padded.masked_fill(mask == 0, -INF), normalize=True),
        entropy_from_logits(s, normalize=True),
        atol=1e-12,
    )


def test_closed_forms() -> None:
    n = torch.zeros(1000, dtype=torch.float64)
    assert entropy_from_logits(n).item() == pytest.approx(math.log(1000), rel=1e-14)
    assert effective_number_from_logits(n).item() == pytest.approx(1000)
    gap = 1.7
    p = 1 / (1 + math.exp(-gap))
    two = entropy_from_logits(torch.tensor([gap, 0.0], dtype=torch.float64))
    assert two.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-13)
    block = n.clone()
    block[:20] = 6.0
    assert entropy_from_logits(block).item() == pytest.approx(3.760189, abs=1e-6)


def test_gradient_is_the_analytic_one() -> None:
    s = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    h = entropy_from_logits(s)
    (got,) = torch.autograd.grad(h.sum(), s)
    p = s.detach().softmax(-1)
    torch.testing.assert_close(got, -p * (p.log() + h.detach()[:, None]), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    s = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0]], dtype=torch.bool)

    def masked_entropy(x: torch.Tensor) -> torch.Tensor:
        return entropy_from_logits(x, mask=mask, normalize=normalize)

    assert gradcheck(masked_entropy, s)
    assert gradgradcheck(masked_entropy, s)
    assert gradcheck(lambda x: top_k_entropy_from_logits(x, 3, normalize=normalize), s)
    probs = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p: entropy(p, mask=mask, normalize=normalize), probs)


@pytest.mark.parametrize("gap", [0.0, 1.0, 50.0, 200.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_any_gap(gap: float, dtype: torch.dtype) -> None:
    s = torch.tensor([gap, 0.0, 0.0, -INF], dtype=dtype, requires_grad=True)
    h = entropy_from_logits(s)
    h.backward()
    assert torch.isfinite(h)
    assert torch.isfinite(s.grad).all()
    assert s.grad[3] == 0


def test_official_top_k_regression() -> None:
    """The public code takes the log of renormalised probabilities: NaN at this gap."""
    s = torch.tensor([200.0, 0.0, 0.0, 0.0], requires_grad=True)
    h = top_k_entropy_from_logits(s, 4)
    h.backward()
    assert h.item() == 0.0
    assert torch.isfinite(s.grad).all()


def test_top_k_is_the_renormalised_head() -> None:
    s = torch.randn(4, 30, dtype=torch.float64)
    head = s.softmax(-1).topk(7).values
    head = head / head.sum(-1, keepdim=True)
    torch.testing.assert_close(top_k_entropy_from_logits(s, 7), -(head * head.log()).sum(-1))
    torch.testing.assert_close(top_k_entropy_from_logits(s, 99), entropy_from_logits(s))
    assert torch.equal(top_k_entropy_from_logits(s, 1), torch.zeros(4, dtype=torch.float64))
    constant = top_k_entropy_from_logits(torch.zeros(50, dtype=torch.float64), 8)
    assert constant.item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("function", [entropy, entropy_from_logits])
def test_wholly_masked_rows_and_one_instance(function) -> None:
    x = torch.tensor([[0.3, 0.7], [0.5, 0.5]], requires_grad=True)
    mask = torch.tensor([[0, 0], [1, 0]], dtype=torch.uint8)
    h = function(x, mask=mask)
    assert h[0] == 0
    n = function(x, mask=mask, normalize=True)
    assert n[0] == 0
    (h.sum() + n.sum()).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[mask == 0] == 0).all()
    assert function(torch.ones(1), normalize=True) == 1


def test_wholly_masked_by_infinity() -> None:
    x = torch.full((2, 3), -INF, requires_grad=True)
    h = entropy_from_logits(x)
    h.sum().backward()
    assert torch.equal(h, torch.zeros(2))
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_exact_zeros_have_a_finite_gradient() -> None:
    p = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    entropy(p).backward()
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_reduced_in_float32(dtype: torch.dtype) -> None:
    s = torch.zeros(20_000, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = entropy_from_logits(s)
        hp = entropy(torch.full((1000,), 1e-3, dtype=torch.float32))
    assert h.dtype == torch.float32
    assert h.item() == pytest.approx(math.log(20_000), abs=1e-4)
    assert hp.item() == pytest.approx(math.log(1000), abs=1e-4)
    h.backward()
    assert torch.isfinite(s.grad).all()
    extreme = torch.tensor([torch.finfo(dtype).max, 0.0, torch.finfo(dtype).min], dtype=dtype)
    assert entropy_from_logits(extreme).item() == 0


def test_effective_number() -> None:
    assert effective_number(torch.full((2, 8), 0.125)).tolist() == pytest.approx([8, 8])


def test_errors_name_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) cannot be broadcast.*\(2, 4\)"):
        entropy_from_logits(torch.zeros(2, 4), mask=torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        entropy(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        top_k_entropy_from_logits(torch.zeros(3), 0)


def test_vmap_and_compile_agree() -> None:
    s = torch.randn(6, 11)
    torch.testing.assert_close(torch.vmap(entropy_from_logits)(s), entropy_from_logits(s))
    compiled = torch.compile(entropy_from_logits, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s), entropy_from_logits(s))
