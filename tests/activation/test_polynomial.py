from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from lightning_entropy.activation import PolyNorm, PolyReLU


def randomized(act: torch.nn.Module) -> torch.nn.Module:
    for p in act.parameters():
        torch.nn.init.normal_(p)
    return act


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_against_the_definition(order: int) -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    act = randomized(PolyReLU(order).double())
    expected = act.bias + sum(w * x.clamp(min=0) ** (i + 1) for i, w in enumerate(act.weight))
    torch.testing.assert_close(act(x), expected)
    act = randomized(PolyNorm(order, floor=0.0).double())
    powers = [x ** (i + 1) for i in range(order)]
    normed = [p / p.square().mean(-1, keepdim=True).sqrt() for p in powers]
    torch.testing.assert_close(act(x), act.bias + sum(w * p for w, p in zip(act.weight, normed, strict=True)))


def test_they_start_at_a_third_each_and_learn() -> None:
    for act in (PolyReLU(), PolyNorm()):
        assert act.weight.tolist() == pytest.approx([1 / 3] * 3)
        assert act.bias.tolist() == [0.0]
        act = randomized(act.double())
        x = (torch.rand(2, 4, dtype=torch.float64) + 0.1).requires_grad_()
        assert gradcheck(lambda x, w, b, a=act: torch.func.functional_call(a, {"weight": w, "bias": b}, x),
                         (x, act.weight, act.bias))  # fmt: skip


def test_a_narrow_input_does_not_overflow_and_zeros_have_a_gradient() -> None:
    x = torch.full((2, 4), 200.0, dtype=torch.float16)  # its cube is not in float16
    y = PolyNorm()(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))
    z = torch.zeros(2, 4, requires_grad=True)
    PolyNorm()(z).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_the_order_is_checked() -> None:
    with pytest.raises(ValueError, match="order must be >= 1, got 0"):
        PolyReLU(0)
    assert repr(PolyNorm(2, inplace=True)) == "PolyNorm(order=2)"
