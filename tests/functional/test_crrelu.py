from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from lightning_entropy.functional import crrelu

INF, NAN = float("inf"), float("nan")
BACKENDS = ["chunked", "compiled", "formula"]
numbers = st.floats(-60, 60, allow_nan=False, width=64)


def reference(x: float, eps: float, mu: float = 0.0, sigma: float = 1.0) -> float:
    """Fifty digits, from the definition."""
    getcontext().prec = 50
    d, e, s = Decimal(x) - Decimal(mu), Decimal(eps), Decimal(sigma)
    return float(max(Decimal(0), Decimal(x)) + e * d * (-d * d / (2 * s * s)).exp())


def written_out(x: Tensor, eps: Tensor, mu: float = 0.0, sigma: float = 1.0) -> Tensor:
    """The definition in torch; autograd differentiates it."""
    d = x - mu
    return torch.relu(x) + eps * d * torch.exp(-d.pow(2) / (2 * sigma**2))


@given(numbers, st.floats(-3, 3), st.floats(-2, 2), st.floats(0.05, 5))
@settings(max_examples=150, deadline=None)
def test_value_against_fifty_digits(x: float, eps: float, mu: float, sigma: float) -> None:
    for backend in ("chunked", "formula"):
        got = crrelu(torch.tensor([x], dtype=torch.float64), eps, mu=mu, sigma=sigma, backend=backend).item()
        assert got == pytest.approx(reference(x, eps, mu, sigma), rel=1e-12, abs=1e-14)


@given(st.lists(numbers, min_size=1, max_size=20), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_identities(values: list[float], eps: float) -> None:
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    bump = x.detach() * torch.exp(-x.detach().square() / 2)
    up, down = crrelu(x, eps), crrelu(-x, eps)
    torch.testing.assert_close(up - down, x.detach() + 2 * eps * bump)
    torch.testing.assert_close(up + down, x.detach().abs())
    torch.testing.assert_close(crrelu(x, 2 * eps) - crrelu(x, 0.0), 2 * (crrelu(x, eps) - crrelu(x, 0.0)))
    e = torch.tensor([eps], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(crrelu(x.detach(), e).sum(), e)
    torch.testing.assert_close(slope, bump.sum()[None], atol=1e-12, rtol=1e-12)  # whatever eps is
    both = torch.cat([x.detach(), -x.detach()])
    (slope,) = torch.autograd.grad(crrelu(both, e).sum(), e)
    assert abs(slope.item()) < 1e-12  # odd in x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [0.01, -0.3, 1.5])
def test_known_values(backend: str, eps: float) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 2.0, -3.0])
    expected = [0.0, 1 + 0.6065306597 * eps, -0.6065306597 * eps, 2 + 0.2706705665 * eps, -0.0333269896 * eps]
    torch.testing.assert_close(crrelu(x, eps, backend=backend), torch.tensor(expected), atol=2e-7, rtol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_eps_zero_is_relu_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    if backend == "compiled" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("no such loop")
    x = torch.cat([torch.randn(3000) * 5, torch.tensor([0.0, -0.0, 1e-40, -1e-40, INF, -INF])]).to(dtype)
    assert torch.equal(crrelu(x, 0.0, backend=backend), torch.relu(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("calibrated", [False, True])
def test_extremes(backend: str, dtype: torch.dtype, calibrated: bool) -> None:
    if backend == "compiled" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("no such loop")
    large = 6e4 if dtype == torch.float16 else 1e30
    x = torch.tensor([INF, -INF, large, -large, 300.0, -300.0, 0.0], dtype=dtype, requires_grad=True)
    eps = torch.tensor([0.25], dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    bump = {"mu": 0.5, "sigma": 0.3} if calibrated else {}
    y = crrelu(x, eps, backend=backend, **bump)
    y.backward(torch.ones_like(y))
    assert y[:6].tolist() == [INF, 0.0, x[2].item(), 0.0, 300.0, 0.0]
    assert x.grad is not None
    assert x.grad[:6].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    t = (0 - bump.get("mu", 0)) / bump.get("sigma", 1)
    at_zero = 0.25 * (1 - t * t) * math.exp(-t * t / 2)
    assert x.grad[6].item() == pytest.approx(at_zero, rel=1e-2 if dtype.itemsize == 2 else 1e-6)
    assert eps.grad is not None
    assert eps.grad.item() == pytest.approx(bump.get("sigma", 1) * t * math.exp(-t * t / 2), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_and_stays_alone(backend: str) -> None:
    x = torch.randn(50)
    x[7] = NAN
    x.requires_grad_()
    eps = torch.tensor([0.1], requires_grad=True)
    y = crrelu(x, eps, backend=backend)
    y.sum().backward()
    assert x.grad is not None
    assert y.isnan().nonzero().flatten().tolist() == [7]
    # autograd's own ReLU has a gradient of 1 at NaN, and so the formula has
    assert set(x.grad.isnan().nonzero().flatten().tolist()) <= {7}
    assert eps.grad is not None
    assert eps.grad.isnan().all()


def test_a_subnormal_number_is_kept() -> None:
    x = torch.full((100,), 1e-40)
    for backend in BACKENDS:
        torch.testing.assert_close(crrelu(x, 0.5, backend=backend), 1.5 * x, rtol=1e-4, atol=0)


def parameters(shape: tuple[int, ...], eps_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64)
    x = x + torch.where(x >= 0, 2e-2, -2e-2)  # away from the kink
    return x.requires_grad_(), torch.randn(eps_shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("eps_shape", [(1,), (), (5,), (3, 1), (3, 5)])
@pytest.mark.parametrize("bump", [{}, {"mu": 0.2, "sigma": 0.5}])
def test_gradcheck(eps_shape: tuple[int, ...], bump: dict[str, float]) -> None:
    def f(x: Tensor, eps: Tensor) -> Tensor:
        return crrelu(x, eps, **bump)

    inputs = parameters((3, 5), eps_shape)
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("eps", [0.01, -0.3, 1.5])
def test_second_derivatives_are_the_analytic_ones(eps: float) -> None:
    x, _ = parameters((40,), (1,))
    e = torch.tensor([eps], dtype=torch.float64, requires_grad=True)
    gx, ge = torch.autograd.grad(crrelu(x, e).sum(), (x, e), create_graph=True)
    gxx, gxe = torch.autograd.grad(gx.sum(), (x, e), retain_graph=True)
    gex, gee = torch.autograd.grad(ge.sum(), (x, e), materialize_grads=True)
    v = x.detach()
    gaussian = torch.exp(-v * v / 2)
    torch.testing.assert_close(gxx, eps * (v**3 - 3 * v) * gaussian, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(gex, (1 - v * v) * gaussian, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(gxe, ((1 - v * v) * gaussian).sum()[None], atol=1e-13, rtol=1e-13)
    assert gee.item() == 0


def test_third_derivative() -> None:
    x, _ = parameters((10,), (1,))
    e = torch.tensor([0.7], dtype=torch.float64)
    value = crrelu(x, e).sum()
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    v = x.detach()
    expected = 0.7 * (-(v**4) + 6 * v * v - 3) * torch.exp(-v * v / 2)
    torch.testing.assert_close(value.detach(), expected, atol=1e-13, rtol=1e-12)


def compositions() -> dict[str, Callable[[Any], Any]]:
    return {
        "hessian": lambda f: hessian(f, (0, 1)),
        "reverse reverse": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1)),
        "reverse forward": lambda f: jacrev(jacfwd(f, (0, 1)), (0, 1)),
        "forward forward": lambda f: jacfwd(jacfwd(f, (0, 1)), (0, 1)),
    }


@pytest.mark.parametrize("name", compositions())
def test_transforms_of_transforms(name: str) -> None:
    x, _ = parameters((6,), (1,))
    v, e = x.detach(), torch.tensor([0.3], dtype=torch.float64)
    got = compositions()[name](lambda x, eps: crrelu(x, eps).pow(2).sum())(v, e)
    expected = hessian(lambda x, eps: written_out(x, eps).pow(2).sum(), (0, 1))(v, e)
    for i, j in itertools.product(range(2), repeat=2):
        torch.testing.assert_close(got[i][j], expected[i][j])


def test_vmap_over_either_or_both() -> None:
    x, eps = torch.randn(4, 7), torch.randn(4)
    torch.testing.assert_close(vmap(crrelu)(x, eps), crrelu(x, eps[:, None]))
    torch.testing.assert_close(vmap(crrelu)(x, eps[:, None]), crrelu(x, eps[:, None]))
    torch.testing.assert_close(vmap(crrelu, (1, None), 1)(x, eps), crrelu(x, eps[:, None]))
    torch.testing.assert_close(vmap(crrelu, (None, 0))(x[0], eps), torch.stack([crrelu(x[0], e) for e in eps]))
    twice = vmap(vmap(crrelu, (0, None)), (0, 0))(x, eps)
    torch.testing.assert_close(twice, crrelu(x, eps[:, None]))
    point = vmap(crrelu, (0, None))(x[:, 0], eps[:1])  # numbers, and an eps of shape (1,)
    torch.testing.assert_close(point, crrelu(x[:, 0], eps[:1]))


def test_gradient_of_each_sample() -> None:
    x, eps = torch.randn(4, 7, dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    got = vmap(grad(lambda e, row: crrelu(row, e).sin().sum()), (None, 0))(eps, x)
    expected = [grad(lambda e, row: written_out(row, e).sin().sum())(eps, row) for row in x]
    torch.testing.assert_close(got, torch.stack(expected))


def test_jvp() -> None:
    x, eps = torch.randn(3, 4), torch.rand(4)
    tangents = (torch.randn(3, 4), torch.randn(4))
    for a, b in zip(jvp(crrelu, (x, eps), tangents), jvp(written_out, (x, eps), tangents), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(jvp(lambda x: crrelu(x, eps), (x,), tangents[:1])[1],
                               jvp(lambda x: written_out(x, eps), (x,), tangents[:1])[1])  # fmt: skip


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_what_gelu_keeps(dtype: torch.dtype) -> None:
    x = torch.randn(64, 256, dtype=dtype, requires_grad=True)
    eps = torch.tensor([0.01], requires_grad=True)
    gelu = saved_bytes(torch.nn.functional.gelu, x)
    assert saved_bytes(lambda x: crrelu(x, eps), x) == gelu + eps.element_size()
    assert saved_bytes(lambda x: written_out(x, eps), x) >= 4 * gelu
    compiled = torch.compile(lambda x: crrelu(x, eps), fullgraph=True)
    assert saved_bytes(compiled, x) == gelu + eps.element_size()


def test_no_second_copy_of_the_input_is_held() -> None:
    import weakref

    z = torch.randn(100, requires_grad=True) * 1
    held = weakref.ref(z)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):  # an offloading of saved tensors
        y = crrelu(z, 0.1)
    del z
    assert held() is None
    y.sum().backward()


@pytest.mark.parametrize("device_type", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_returns_the_dtype_of_the_input(device_type: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    eps = torch.tensor([0.1], requires_grad=True)
    plain = crrelu(x, eps)
    with torch.autocast(device_type, torch.bfloat16):
        y = crrelu(x, eps)
        y.float().sum().backward()
    assert y.dtype == x.dtype
    assert torch.equal(y, plain)
    assert eps.grad is not None
    assert (x.grad.dtype, eps.grad.dtype) == (dtype, torch.float32)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], 0.1), TypeError, "floating-point tensors, got int64"),
        (([1.0, 2.0], torch.zeros(3)), ValueError, r"eps of shape \(3,\) does not broadcast to x of shape \(2,\)"),
        (([1.0, 2.0], torch.zeros(2, 2)), ValueError, r"eps of shape \(2, 2\)"),
        (([1.0], 0.1, {"sigma": 0.0}), ValueError, r"sigma must be > 0, got 0\.0"),
        (([1.0], 0.1, {"mu": torch.zeros(4)}), ValueError, "mu of shape"),
        (([1.0], 0.1, {"backend": "fast"}), ValueError, "backend must be one of auto, compiled"),
        (([1.0], 0.1, {"backend": "triton"}), ValueError, r"triton.*the kernels run on CUDA.*backend=\"auto\""),
        (([[1.0, 2.0]], torch.zeros(3), {"channel_dim": 0}), ValueError, r"eps has 3 channels, which dimension 0"),
        (([[1.0, 2.0]], torch.zeros(2), {"channel_dim": 2}), ValueError, "dimension 2"),
    ],
)
def test_what_does_not_fit_is_named(
    arguments: tuple[Any, ...], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, eps, *options = arguments
    with pytest.raises(error, match=message):
        crrelu(torch.tensor(x), eps, **(options[0] if options else {}))


def test_eps_along_a_dimension() -> None:
    x, eps, mu = torch.randn(2, 3, 5), torch.rand(3), torch.rand(3)
    got = crrelu(x, eps, mu=mu, sigma=eps + 1, channel_dim=1)
    torch.testing.assert_close(got, crrelu(x, eps[:, None], mu=mu[:, None], sigma=eps[:, None] + 1))


def test_a_centre_and_a_width_that_learn() -> None:
    x = torch.randn(9, dtype=torch.float64)
    p = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2, 0.7)]
    assert gradcheck(lambda eps, mu, sigma: crrelu(x, eps, mu=mu, sigma=sigma), p)


def test_a_mode_sees_one_call_and_a_trace_has_one_node() -> None:
    class Calls(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Calls() as calls:
        crrelu(torch.zeros(3), torch.zeros(1))
    assert crrelu in calls.seen
    assert torch.nn.functional.relu not in calls.seen
