"""Which kernel computes CRReLU and its gradients, and the two operators that hide the choice.

Compilers, exporters, fake tensors and dispatch modes see ``lightning_entropy::crrelu`` and
``lightning_entropy::crrelu_backward`` as one operation each, with known shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from lightning_entropy.functional import crrelu_chunks, crrelu_compiled
from lightning_entropy.functional.crrelu_formula import Terms, crrelu_formula
from lightning_entropy.functional.crrelu_layout import Layout, layout_of, memory_order, parameter_table
from lightning_entropy.functional.triton import crrelu as crrelu_triton

BACKENDS = ("auto", "compiled", "chunked", "triton", "formula")
COMPILED_FROM = 2**16
"""Smallest number of elements for which the compiled loops are used. The choice depends on nothing that changes during
a run, so that a run that is resumed gives the same bits."""


def refusal(backend: str, x: Tensor) -> str | None:
    """Why a backend cannot compute CRReLU of a tensor, or None where it can.

    Args:
        backend: ``"compiled"``, ``"chunked"``, ``"triton"`` or ``"formula"``.
        x: the input of the activation.

    Example:
        >>> refusal("chunked", torch.empty(2, device="meta"))
        'the chunked form runs on CPUs, and the tensor is on meta'
    """
    if backend == "triton":
        return crrelu_triton.refusal(x)
    if backend in ("compiled", "chunked") and x.device.type != "cpu":
        return f"the {backend} form runs on CPUs, and the tensor is on {x.device.type}"
    return crrelu_compiled.refusal(x.dtype) if backend == "compiled" else None


def _module(backend: str, x: Tensor) -> ModuleType | None:
    """The module whose ``forward`` and ``backward`` compute a dense tensor; None for the formula."""
    if backend == "auto":
        if x.device.type == "cuda":
            backend = "triton" if refusal("triton", x) is None else "formula"
        elif x.device.type == "cpu":
            large = x.numel() >= COMPILED_FROM
            backend = "compiled" if large and refusal("compiled", x) is None else "chunked"
        else:
            backend = "formula"
    elif (reason := refusal(backend, x)) is not None:
        raise ValueError(f'crrelu(backend="{backend}"): {reason}; pass backend="auto"')
    return {"compiled": crrelu_compiled, "chunked": crrelu_chunks, "triton": crrelu_triton}.get(backend)


def _kernel(
    x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str
) -> tuple[ModuleType, Layout] | None:
    layout = layout_of(x, eps, mu, sigma)
    module = _module(backend, x) if layout is not None and x.numel() else None
    return None if module is None or layout is None else (module, layout)


@contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        yield


def _as_it_is(x: Tensor) -> AbstractContextManager[None]:
    """Without autocast and without autograd; they are only switched off where they are on, as that takes its time."""
    on = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    return _exactly(x) if on else nullcontext()


def _dense(x: Tensor) -> Tensor:
    return x if memory_order(x) is not None else x.contiguous()


def _forward(x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str) -> Tensor:
    x = _dense(x)
    with _as_it_is(x):
        kernel = _kernel(x, eps, mu, sigma, backend)
        y = torch.empty_like(x)
        if kernel is None:
            return y.copy_(crrelu_formula(x, eps, mu, sigma))
        module, layout = kernel
        table = parameter_table(eps, mu, sigma, torch.promote_types(x.dtype, torch.float32))
        module.forward(layout.flat(x), layout.flat(y), table, layout)
        return y


def _backward(
    x: Tensor, grad: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    with _as_it_is(x):
        kernel = _kernel(x, eps, mu, sigma, backend)
        grad_x = torch.empty_like(x)
        if kernel is None:
            terms = Terms(x, eps, mu, sigma)
            wide = grad.to(terms.t.dtype)
            grad_x.copy_(wide * terms.by_x())
            return grad_x, (wide * terms.by_eps()).sum_to_size(eps.shape).to(eps.dtype)
        module, layout = kernel
        if grad.stride() != x.stride() or grad.dtype != x.dtype:
            grad = torch.empty_like(x).copy_(grad)
        table = parameter_table(eps, mu, sigma, torch.promote_types(x.dtype, torch.float32))
        grad_eps = module.backward(layout.flat(x), layout.flat(grad), layout.flat(grad_x), table, layout)
        return grad_x, grad_eps.reshape(eps.shape).to(eps.dtype)


_library = torch.library.Library("lightning_entropy", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("crrelu(Tensor x, Tensor eps, Tensor? mu, Tensor? sigma, str backend) -> Tensor", tags=_tags)
_library.define(
    "crrelu_backward(Tensor x, Tensor grad, Tensor eps, Tensor? mu, Tensor? sigma, str backend) -> (Tensor, Tensor)",
    tags=_tags,
)
_library.impl("crrelu", _forward, "CompositeExplicitAutograd")
_library.impl("crrelu_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lightning_entropy::crrelu", lib=_library)
def _(x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(_dense(x))


@torch.library.register_fake("lightning_entropy::crrelu_backward", lib=_library)
def _(
    x: Tensor, grad: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense(x)), torch.empty_like(eps, memory_format=torch.contiguous_format)


forward_operator = torch.ops.lightning_entropy.crrelu.default
backward_operator = torch.ops.lightning_entropy.crrelu_backward.default
