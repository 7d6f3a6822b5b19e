"""CRReLU's kernels against float64: run by test_crrelu.py, in triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_entropy.functional import crrelu
from lightning_entropy.functional.triton import crrelu as launch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
INF, NAN = float("inf"), float("nan")
SHAPES = [
    ((1271,), (1,)),
    ((41, 101), (1,)),
    ((2, 3, 1030), (3, 1)),
    ((2, 7, 9, 5), (7, 1, 1)),
    ((53, 70), (70,)),
    ((100, 3), (3,)),
    ((1, 1), (1, 1)),
    ((0, 3), (3,)),
]


def exact(x: Tensor, grad: Tensor, eps: Tensor, bump: dict[str, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, e = x.detach().double().requires_grad_(), eps.detach().double().requires_grad_()
    d, s = x - bump.get("mu", 0.0), bump.get("sigma", 1.0)
    y = torch.relu(x) + e * d * torch.exp(-d.square() / (2 * s * s))
    gx, ge = torch.autograd.grad(y, (x, e), grad.double())
    terms = (grad.double() * d.detach() * torch.exp(-d.detach().square() / (2 * s * s))).abs()
    return y.detach(), gx, ge, terms.sum_to_size(e.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bump", [{}, {"mu": 0.3, "sigma": 0.7}], ids=["plain", "calibrated"])
@pytest.mark.parametrize(("shape", "eps_shape"), SHAPES)
def test_against_float64(
    dtype: torch.dtype, bump: dict[str, float], shape: tuple[int, ...], eps_shape: tuple[int, ...], monkeypatch: Any
) -> None:
    monkeypatch.setattr(launch, "BLOCK", 512)
    monkeypatch.setattr(launch, "PARTIALS", 8)  # programs that walk over several blocks
    monkeypatch.setattr(launch, "PROGRAM_ROWS", 32)
    torch.manual_seed(0)
    x = (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    eps = torch.randn(eps_shape, device=DEVICE).requires_grad_()
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    y = crrelu(x, eps, backend="triton", **bump)
    y.backward(grad)
    value, gx, ge, size = exact(x, grad, eps, bump)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 2e-6}
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert x.grad is not None
    assert eps.grad is not None
    torch.testing.assert_close(y.double(), value, **tolerance)
    torch.testing.assert_close(x.grad.double(), gx, **tolerance)
    assert ((eps.grad.double() - ge).abs() <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extremes(dtype: torch.dtype) -> None:
    large = 6e4 if dtype == torch.float16 else 1e30
    x = torch.tensor([INF, -INF, large, -large, 300.0, -300.0, 0.0], dtype=dtype, device=DEVICE).requires_grad_()
    eps = torch.tensor([0.25], device=DEVICE, requires_grad=True)
    y = crrelu(x, eps, backend="triton")
    y.sum().backward()
    assert y.tolist() == [INF, 0.0, x[2].item(), 0.0, 300.0, 0.0, 0.0]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.25]
    assert eps.grad is not None
    assert eps.grad.item() == 0.0
    nan = torch.tensor([1.0, NAN, -1.0], dtype=dtype, device=DEVICE, requires_grad=True)
    y = crrelu(nan, eps, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), nan)
    assert y.isnan().tolist() == slope.isnan().tolist() == [False, True, False]
    assert torch.equal(crrelu(x, 0.0, backend="triton"), torch.relu(x))


@pytest.mark.parametrize("eps_shape", [(1,), (64,), (30, 1)])
def test_it_gives_the_same_bits_every_time(eps_shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "PARTIALS", 8)
    x = torch.randn(5, 30, 64, device=DEVICE).requires_grad_()
    eps = torch.rand(eps_shape, device=DEVICE, requires_grad=True)
    results = [torch.autograd.grad(crrelu(x, eps, backend="triton").sin().sum(), (x, eps)) for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("eps_shape", [(1,), (6, 1, 1)])
def test_layouts(eps_shape: tuple[int, ...]) -> None:
    base = torch.randn(2, 6, 5, 8, device=DEVICE)
    eps = torch.rand(eps_shape, device=DEVICE, requires_grad=True)
    for x in (base.to(memory_format=torch.channels_last), base.transpose(0, 3).contiguous().transpose(0, 3)):
        x = x.detach().requires_grad_()
        grad = torch.ones((), device=DEVICE).expand(x.shape)
        y, plain = crrelu(x, eps, backend="triton"), crrelu(x, eps, backend="formula")
        torch.testing.assert_close(y, plain)
        got, expected = (torch.autograd.grad(v, (x, eps), grad) for v in (y, plain))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert y.stride() == x.stride()
