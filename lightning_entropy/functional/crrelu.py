r"""Correction regularised ReLU: ReLU with a learnable bump around zero, at the price of the activation it replaces.

.. math:: f(x) = \max(0, x) + \varepsilon (x - \mu) e^{-(x - \mu)^2 / (2 \sigma^2)}

with :math:`\mu = 0, \sigma = 1` in the paper (Sun et al., arXiv 2405.12954). The kernels, the double backward, forward
mode and the rule for ``vmap`` are ours.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import handle_torch_function, has_torch_function

from lightning_entropy.functional.crrelu_formula import Terms, along_channels, crrelu_formula
from lightning_entropy.functional.crrelu_kernels import BACKENDS, backward_operator, forward_operator


def crrelu(
    x: Tensor,
    eps: Tensor | float,
    *,
    mu: Tensor | float = 0.0,
    sigma: Tensor | float = 1.0,
    channel_dim: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""CRReLU, :math:`\max(0, x) + \varepsilon (x - \mu) \exp(-(x - \mu)^2 / (2 \sigma^2))`.

    Only *x* is kept for backward, as for GELU, and the gradient of eps is summed in the pass that makes the gradient
    of x. The derivative at 0 is eps (ReLU's part counts as 0 there); f(inf) is inf, f(-inf) is 0, NaN stays NaN.
    Differentiable any number of times in reverse and forward mode, and under ``torch.func`` and ``torch.compile``.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        eps: height of the bump, a number or broadcastable to ``x``; keep it in float32 beside a narrower x. ReLU at 0.
        mu: centre of the bump, likewise. No gradient reaches it unless it asks for one (then the formula is used).
        sigma: width of the bump, > 0, likewise.
        channel_dim: where eps, mu and sigma have one value for each channel, ``(channels,)``, the dimension of ``x``
            that they belong to; None broadcasts them from the last one.
        backend: ``"auto"``; ``"compiled"`` (one C++ loop each way, float32 and bfloat16 on a CPU), ``"chunked"``
            (torch's operations on a CPU in pieces that fit the cache), ``"triton"`` (CUDA), ``"formula"`` (written
            out, which keeps four tensors). Inside compiled, exported or traced code it is always the formula.

    Returns:
        Shape and dtype of ``x``. The mathematics is in float32, or float64 for float64.

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if eps, mu or sigma do not broadcast to ``x``, sigma is a number that is not positive, or the
            backend is unknown or cannot compute this.

    Reference:
        Sun et al. (2024), A Method on Searching Better Activation Functions, arXiv 2405.12954.

    Example:
        >>> crrelu(torch.tensor([-1.0, 0.0, 1.0]), 0.01)
        tensor([-0.0061,  0.0000,  1.0061])
    """
    if not torch.compiler.is_compiling() and has_torch_function((x, eps, mu, sigma)):
        overriding = (x, eps, mu, sigma)
        return handle_torch_function(
            crrelu, overriding, x, eps, mu=mu, sigma=sigma, channel_dim=channel_dim, backend=backend
        )
    if not x.is_floating_point():
        raise TypeError(f"crrelu takes floating-point tensors, got {str(x.dtype)[6:]}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not isinstance(sigma, Tensor) and not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    eps = _parameter(eps, x, "eps", channel_dim)
    centre = None if not isinstance(mu, Tensor) and mu == 0 else _parameter(mu, x, "mu", channel_dim)
    width = None if not isinstance(sigma, Tensor) and sigma == 1 else _parameter(sigma, x, "sigma", channel_dim)
    if backend == "formula" or _traced() or type(x) not in _PLAIN or any(_learned(p) for p in (centre, width)):
        return crrelu_formula(x, eps, centre, width)
    result: Tensor = _CRReLU.apply(x, eps, centre, width, backend)
    return result


_PLAIN = (Tensor, torch.nn.Parameter)  # other classes (DTensor) have rules for torch's operations, not for ours


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _forward_over_forward()


def _forward_over_forward() -> bool:
    """Whether ``torch.func.jvp`` runs inside itself: there torch takes the derivative of a custom function as constant,
    and its second derivative comes out as 0.
    """
    return bool(getattr(sys.modules.get("torch._functorch.eager_transforms"), "JVP_NESTING", 0) > 1)


def _learned(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _parameter(value: Tensor | float, x: Tensor, name: str, channel_dim: int | None) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if torch.jit.is_tracing():  # where sizes are tensors, which cannot be asked
        return value if channel_dim is None else along_channels(value, x.dim(), channel_dim)
    if value.numel() == 1:
        return value if value.dim() <= x.dim() else value.reshape([1] * x.dim())
    if channel_dim is not None and value.dim() == 1:
        if not -x.dim() <= channel_dim < x.dim() or x.shape[channel_dim] != value.numel():
            raise ValueError(
                f"{name} has {value.numel()} channels, which dimension {channel_dim} of x {tuple(x.shape)} has not"
            )
        return along_channels(value, x.dim(), channel_dim)
    if value.dim() > x.dim() or any(n not in (1, m) for n, m in zip(reversed(value.shape), reversed(x.shape))):
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not broadcast to x of shape {tuple(x.shape)}")
    return value


class _CRReLU(torch.autograd.Function):
    """Keeps x and the parameters; backward is a function of its own, so that it can be differentiated and batched."""

    @staticmethod
    def forward(x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str) -> Tensor:
        result: Tensor = forward_operator(x, eps, mu, sigma, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, eps, mu, sigma = ctx.saved_tensors
        differentiated = torch.is_grad_enabled() or any(unpack_dual(t).tangent is not None for t in (x, grad, eps))
        function = _Gradients.apply if differentiated else backward_operator
        grad_x, grad_eps = function(x, grad, eps, mu, sigma, ctx.backend)
        for_x, for_eps, *_ = ctx.needs_input_grad
        return grad_x if for_x else None, grad_eps if for_eps else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, d_eps: Tensor | None, *_: None) -> Tensor:  # type: ignore[override]
        x, eps, mu, sigma = ctx.saved_tensors
        terms = Terms(x, eps, mu, sigma)
        moved = torch.zeros_like(terms.t)
        if d_x is not None:
            moved = moved + terms.by_x() * d_x
        if d_eps is not None:
            moved = moved + terms.by_eps() * d_eps
        return moved.to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, backend = inputs
        x, eps, mu, sigma = _batched(info.batch_size, in_dims, tensors, like=0, always=(0,))
        return _CRReLU.apply(x, eps, mu, sigma, backend), 0


class _Gradients(torch.autograd.Function):
    """Gradients of x and eps from the gradient of the output, in one pass."""

    @staticmethod
    def forward(
        x: Tensor, grad: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = backward_operator(x, grad, eps, mu, sigma, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.save_for_forward(*inputs[:-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, for_x: Tensor | None, for_eps: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, grad, eps, mu, sigma = ctx.saved_tensors
        terms = Terms(x, eps, mu, sigma)
        g = grad.to(terms.t.dtype)
        to_x, to_grad, to_eps = torch.zeros_like(terms.t), torch.zeros_like(terms.t), torch.zeros_like(eps)
        if for_x is not None:
            to_x = to_x + for_x * g * terms.by_x_twice()
            to_grad = to_grad + for_x * terms.by_x()
            to_eps = to_eps + (for_x * g * terms.by_x_and_eps()).sum_to_size(eps.shape)
        if for_eps is not None:
            to_x = to_x + for_eps * g * terms.by_x_and_eps()
            to_grad = to_grad + for_eps * terms.by_eps()
        return to_x.to(x.dtype), to_grad.to(grad.dtype), to_eps.to(eps.dtype), None, None, None

    @staticmethod
    def jvp(  # type: ignore[override]
        ctx: Any, d_x: Tensor | None, d_grad: Tensor | None, d_eps: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        x, grad, eps, mu, sigma = ctx.saved_tensors
        terms = Terms(x, eps, mu, sigma)
        g = grad.to(terms.t.dtype)
        moved_x, moved_eps = torch.zeros_like(terms.t), torch.zeros_like(terms.t)
        if d_x is not None:
            moved_x = moved_x + g * terms.by_x_twice() * d_x
            moved_eps = moved_eps + g * terms.by_x_and_eps() * d_x
        if d_grad is not None:
            moved_x = moved_x + terms.by_x() * d_grad
            moved_eps = moved_eps + terms.by_eps() * d_grad
        if d_eps is not None:
            moved_x = moved_x + g * terms.by_x_and_eps() * d_eps
        return moved_x.to(x.dtype), moved_eps.sum_to_size(eps.shape).to(eps.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _batched_gradients(_Gradients.apply, info, in_dims, inputs)


def _batched_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    *tensors, backend = inputs
    shape = _logical_shape(tensors[2], in_dims[2])
    x, grad, eps, mu, sigma = _batched(info.batch_size, in_dims, tensors, like=0, always=(0, 1, 2))
    grad_x, grad_eps = function(x, grad, eps, mu, sigma, backend)
    return (grad_x, grad_eps.reshape(info.batch_size, *shape)), (0, 0)


if hasattr(torch.library, "register_vmap"):  # for a batch of gradients, which torch.autograd.grad can take at once

    @torch.library.register_vmap("lightning_entropy::crrelu_backward")
    def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _batched_gradients(backward_operator, info, in_dims, inputs)


for _function in (_CRReLU.forward, _Gradients.forward):
    # Function.apply asks for the signature at each call; kept here, it costs 20 us less
    _function.__signature__ = inspect.signature(_function)  # type: ignore[union-attr]


def _logical_shape(x: Tensor, dim: int | None) -> list[int]:
    return [size for d, size in enumerate(x.shape) if dim is None or d != dim % x.dim()]


def _batched(
    size: int, in_dims: tuple[int | None, ...], tensors: list[Tensor | None], *, like: int, always: tuple[int, ...]
) -> list[Tensor | None]:
    """The batch first; tensors in ``always`` get one, the others keep broadcasting to ``tensors[like]``."""
    leader = tensors[like]
    assert leader is not None
    rank = len(_logical_shape(leader, in_dims[like]))
    result: list[Tensor | None] = []
    for i, (tensor, dim) in enumerate(zip(tensors, in_dims)):
        if tensor is not None and (dim is not None or i in always):
            tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
            tensor = tensor.reshape(size, *[1] * (rank - tensor.dim() + 1), *tensor.shape[1:])
        result.append(tensor)
    return result
