"""The loops and the chunks against float64, in every layout, with and without a compiler."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_entropy.functional import crrelu, crrelu_chunks, crrelu_compiled, crrelu_kernels
from lightning_entropy.functional.crrelu_layout import layout_of, memory_order

SHAPES = [
    ((300, 301), (1,)),
    ((7, 19), (19,)),
    ((701, 131), (131,)),
    ((5, 7, 9001), (7, 1)),
    ((2, 3, 41, 5), (1, 3, 1, 1)),
    ((3, 1271), (3, 1)),
    ((3, 4), (3, 4)),
    ((1, 1), (1, 1)),
    ((), ()),
    ((0, 3), (3,)),
]


def exact(x: Tensor, grad: Tensor, eps: Tensor, bump: dict[str, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradients of x and eps in float64, and the sum of the magnitudes that the gradient of eps adds up."""
    x, e = x.detach().double().requires_grad_(), eps.detach().double().requires_grad_()
    d, s = x - bump.get("mu", 0.0), bump.get("sigma", 1.0)
    y = torch.relu(x) + e * d * torch.exp(-d.square() / (2 * s * s))
    gx, ge = torch.autograd.grad(y, (x, e), grad.double())
    terms = (grad.double() * d.detach() * torch.exp(-d.detach().square() / (2 * s * s))).abs()
    return y.detach(), gx, ge, terms.sum_to_size(e.shape)


@pytest.fixture
def _compiler() -> None:
    reason = crrelu_compiled.refusal(torch.float32)
    if reason is not None:
        pytest.skip(f"the loops cannot be compiled here: {reason}")


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("backend", ["compiled", "chunked", "formula"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bump", [{}, {"mu": 0.3, "sigma": 0.7}], ids=["plain", "calibrated"])
def test_against_float64(backend: str, dtype: torch.dtype, bump: dict[str, float], monkeypatch: Any) -> None:
    if backend == "compiled" and dtype not in crrelu_compiled.DTYPES:
        pytest.skip("no such loop")
    monkeypatch.setattr(crrelu_chunks, "CHUNK", 1000)  # several chunks, and a last one that is smaller
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ulp = torch.finfo(dtype).eps
    for shape, eps_shape in SHAPES:
        x = (2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
        eps = (0.3 * torch.randn(eps_shape, dtype=torch.float64)).to(wide).requires_grad_()
        grad = torch.randn(shape, dtype=torch.float64).to(dtype)
        y = crrelu(x, eps, backend=backend, **bump)
        y.backward(grad)
        value, gx, ge, size = exact(x, grad, eps, bump)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert x.grad is not None
        assert eps.grad is not None
        # rounding to the dtype, and 8 roundings of the mathematics
        tolerance = {"rtol": ulp, "atol": 8 * torch.finfo(wide).eps}
        torch.testing.assert_close(y.double(), value, **tolerance)
        torch.testing.assert_close(x.grad.double(), gx, **tolerance)
        slack = 16 * torch.finfo(wide).eps * size + 1e-300
        assert ((eps.grad.double() - ge).abs() <= slack + torch.finfo(wide).eps * ge.abs()).all()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("shape", [(1,), (8,)])
def test_any_nan_of_eps_is_one_in_bfloat16(shape: tuple[int, ...]) -> None:
    widest = torch.full(shape, 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding it up would make it -0
    for eps in (widest, -widest):
        x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
        y = crrelu(x, eps, backend="compiled")
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert y.isnan().all()
        assert slope.isnan().all()


def layouts() -> Iterator[tuple[str, Tensor]]:
    x = torch.randn(4, 6, 5, 8)
    yield "contiguous", x
    yield "channels last", x.to(memory_format=torch.channels_last)
    yield "transposed", x.transpose(1, 3)
    yield "every second", torch.randn(4, 6, 5, 16)[..., ::2]
    yield "half of a chunk", torch.randn(4, 12, 5, 8).chunk(2, 1)[1]
    yield "expanded", torch.randn(4, 1, 5, 8).expand(4, 6, 5, 8)
    yield "storage offset", torch.randn(4 * 6 * 5 * 8 + 3)[3:].view(4, 6, 5, 8)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(("name", "base"), layouts(), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("backend", ["compiled", "chunked"])
@pytest.mark.parametrize("channel_dim", [None, 1, -1])
def test_layouts(name: str, base: Tensor, backend: str, channel_dim: int | None) -> None:
    x = base.detach().requires_grad_()
    eps = torch.rand(1 if channel_dim is None else x.shape[channel_dim], requires_grad=True)
    for grad in (torch.randn(x.shape), torch.ones(()).expand(x.shape), torch.randn(x.shape[::-1]).permute(3, 2, 1, 0)):
        y = crrelu(x, eps, backend=backend, channel_dim=channel_dim)
        got = torch.autograd.grad(y, (x, eps), grad)
        plain = crrelu(x, eps, backend="formula", channel_dim=channel_dim)
        torch.testing.assert_close(y, plain)
        for a, b in zip(got, torch.autograd.grad(plain, (x, eps), grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if memory_order(base) is not None:
        assert y.stride() == base.stride()  # as torch's own elementwise functions do


def test_the_order_of_memory() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert memory_order(x) == (0, 1, 2, 3)
    assert memory_order(x.to(memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert memory_order(x[:, :2]) is None
    assert memory_order(torch.empty(3, 1).expand(3, 4)) is None
    eps = torch.empty(3, 1, 1)
    assert layout_of(x, eps, None, None)[:3] == (2, 3, 20)  # type: ignore[index]
    last = layout_of(x.to(memory_format=torch.channels_last), eps, None, None)
    assert last is not None
    assert last[:3] == (40, 3, 1)
    assert layout_of(x, torch.empty(3, 4, 1), None, None) is None
    assert layout_of(x, eps, torch.empty(5), None) is None


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("dtype", crrelu_compiled.DTYPES)
@pytest.mark.parametrize("eps_shape", [(1,), (96,), (50, 1)])
def test_threads_change_no_bit(dtype: torch.dtype, eps_shape: tuple[int, ...]) -> None:
    x = torch.randn(30, 50, 96, dtype=dtype, requires_grad=True)
    eps = torch.rand(eps_shape, requires_grad=True)
    grad = torch.randn(30, 50, 96, dtype=dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = crrelu(x, eps, backend="compiled")
            results.append((y, *torch.autograd.grad(y, (x, eps), grad)))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("backend", ["compiled", "chunked"])
def test_threads_of_the_user(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crrelu_chunks, "CHUNK", 500)

    def run(seed: int) -> Tensor:
        x = torch.randn(4000, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        eps = torch.tensor([seed / 10], requires_grad=True)
        crrelu(x, eps, backend=backend).square().sum().backward()
        assert x.grad is not None
        assert eps.grad is not None
        return torch.cat([x.grad, eps.grad])

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, list(range(8)) * 4))
    assert all(torch.equal(a, b) for a, b in zip(alone * 4, together, strict=True))


@pytest.mark.usefixtures("_compiler")
def test_the_choice_is_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for module, name in ((crrelu_compiled, "compiled"), (crrelu_chunks, "chunked")):
        function = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, f=function, n=name: chosen.append(n) or f(*a))
    for count, dtype in ((2**16 - 1, torch.float32), (2**16, torch.float32), (2**16, torch.bfloat16),
                         (2**16, torch.float64)):  # fmt: skip
        crrelu(torch.randn(count, dtype=dtype), 0.1)
    assert chosen == ["chunked", "compiled", "compiled", "chunked"]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """As in a process that has not compiled the loops yet."""
    crrelu_compiled._compile.cache_clear()
    yield
    crrelu_compiled._compile.cache_clear()


@pytest.mark.usefixtures("uncompiled")
def test_without_a_compiler_the_chunks_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crrelu_compiled.shutil, "which", lambda name: None)
    x = torch.randn(2**16)
    torch.testing.assert_close(crrelu(x, 0.3), crrelu(x, 0.3, backend="formula"))
    with pytest.raises(ValueError, match=r'backend="compiled"\): no C\+\+ compiler was found.*pass backend="auto"'):
        crrelu(x, 0.3, backend="compiled")


@pytest.mark.usefixtures("uncompiled")
def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ENTROPY_COMPILE", "0")
    monkeypatch.setattr(crrelu_compiled.subprocess, "run", lambda *a, **k: pytest.fail("compiled"))
    crrelu(torch.randn(2**16), 0.3)
    assert crrelu_compiled.refusal(torch.float32) == "LIGHTNING_ENTROPY_COMPILE=0 is set"


@pytest.mark.usefixtures("uncompiled")
def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "error: no such header")

    monkeypatch.setattr(crrelu_compiled.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(crrelu_compiled.subprocess, "run", run)
    x = torch.randn(2**16)
    with pytest.warns(UserWarning, match="could not compile its loops.*LIGHTNING_ENTROPY_COMPILE=0.*no such header"):
        crrelu(x, 0.3)
    tried = len(calls)
    torch.testing.assert_close(crrelu(x, 0.3), crrelu(x, 0.3, backend="formula"))
    assert len(calls) == tried == 5


@pytest.mark.usefixtures("_compiler", "uncompiled")
def test_a_compiler_that_knows_no_processor_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crrelu_compiled, "_flag_sets", lambda: [["-march=unknown"], []])
    x = torch.randn(5000)
    torch.testing.assert_close(crrelu(x, 0.3, backend="compiled"), crrelu(x, 0.3, backend="formula"))


@pytest.mark.parametrize("eps_shape", [(1,), (3, 1), (2, 1, 4)])
def test_the_operators_keep_their_promises(eps_shape: tuple[int, ...]) -> None:
    x, eps = torch.randn(2, 3, 4), torch.rand(eps_shape)
    tests = ("test_schema", "test_faketensor")
    for mu, sigma in ((None, None), (torch.rand(1), torch.rand(1) + 1)):
        torch.library.opcheck(crrelu_kernels.forward_operator, (x, eps, mu, sigma, "auto"), test_utils=tests)
        arguments = (x.transpose(0, 2), x.transpose(0, 2), eps.transpose(0, -1), mu, sigma, "auto")
        if eps.dim() == 3:
            torch.library.opcheck(crrelu_kernels.backward_operator, arguments, test_utils=tests)


def test_a_dispatch_mode_sees_one_operation() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, eps = torch.randn(8, requires_grad=True), torch.rand(1, requires_grad=True)
    with Seen() as seen:
        crrelu(x, eps).sum().backward()
    mine = [name for name in seen.names if "crrelu" in name]
    assert mine == ["lightning_entropy.crrelu.default", "lightning_entropy.crrelu_backward.default"]
    assert not [name for name in seen.names if "relu" in name and name not in mine]
