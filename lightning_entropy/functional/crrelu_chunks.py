"""CRReLU on a CPU from torch's own operations, in chunks that stay in the cache and with scratch that is reused.

Written out as one expression, the formula passes over memory a dozen times. Here each operation meets what the one
before it has left in the cache. Scratch belongs to a thread, and is kept. For any floating dtype; the mathematics is in
float32, or float64 for float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_entropy.functional.crrelu_layout import Layout

CHUNK = 2**18
_FAR_AWAY = 40.0  # exp(-t*t/2) is 0 from here on, in float64 too
_HALF_LOG2E = 0.5 * math.log2(math.e)  # exp2 is more than twice as fast as exp here
_step_backward = torch.ops.aten.threshold_backward.grad_input


def forward(x: Tensor, y: Tensor, parameters: Tensor, layout: Layout) -> None:
    """Write CRReLU of ``x`` into ``y``.

    Args:
        x: flat, contiguous.
        y: like ``x``.
        parameters: eps and, unless the layout is plain, mu, sigma and 1 / sigma of each channel,
            ``(1 or 4, channels)``, float32 or wider.
        layout: how the channels lie in ``x``.
    """
    shape = _shape(layout)
    height, mu, inverse = _height(parameters, layout), *_standardization(parameters, layout)
    for (x_part, y_part), (t, e, w) in _parts((x.view(shape), y.view(shape)), layout, parameters.dtype):
        narrow = x_part.dtype != t.dtype
        x_wide = w.copy_(x_part) if narrow else x_part
        _gaussian(x_wide, t, e, mu, inverse)
        total = torch.clamp_min(x_wide, 0, out=w if narrow else y_part)
        if isinstance(height, float):
            total.addcmul_(t, e, value=height)
        else:
            total.addcmul_(t, e.mul_(height))
        if narrow:
            y_part.copy_(total)


def backward(x: Tensor, grad: Tensor, grad_x: Tensor, parameters: Tensor, layout: Layout) -> Tensor:
    """Write the gradient of ``x`` into ``grad_x`` and return the gradient of eps, ``(channels,)``.

    Args:
        x: as in :func:`forward`.
        grad: gradient of the output, like ``x``.
        grad_x: like ``x``.
        parameters: as in :func:`forward`.
        layout: as in :func:`forward`.
    """
    shape = _shape(layout)
    mu, inverse = _standardization(parameters, layout)
    one = parameters.new_ones(())
    # A sum over a part is in the dtype of the mathematics, the sum of the parts in float64.
    total = parameters.new_zeros(layout.channels, dtype=torch.float64)
    eps: float | Tensor = float(parameters[0]) if layout.channels == 1 else parameters[0].view(-1, 1)
    tensors = (x.view(shape), grad.view(shape), grad_x.view(shape))
    for (x_part, g_part, to), (t, e, w) in _parts(tensors, layout, parameters.dtype):
        narrow = x_part.dtype != t.dtype
        _gaussian(w.copy_(x_part) if narrow else x_part, t, e, mu, inverse)
        step = _step_backward(g_part, x_part, 0, grad_input=to)  # exact in every dtype: g or 0
        e.mul_(w.copy_(g_part) if narrow else g_part)
        if isinstance(eps, float):
            total += torch.dot(e, t)
            torch.addcmul(one, t, t, value=-1, out=t)
        else:
            product = torch.mul(e, t, out=w)
            total += product.sum((0, 2))
            e.addcmul_(t, product, value=-1).mul_(eps)
        target = w.copy_(step) if narrow else to
        if isinstance(eps, float):
            target.addcmul_(e, t, value=eps)
        else:
            target.add_(e)
        if narrow:
            to.copy_(target)
    if layout.plain:
        return total.to(parameters.dtype)
    return (total * parameters[2]).to(parameters.dtype)


def _shape(layout: Layout) -> tuple[int, ...]:
    return (-1,) if layout.channels == 1 else (layout.outer, layout.channels, layout.inner)


def _height(parameters: Tensor, layout: Layout) -> float | Tensor:
    """What the bump is multiplied with: eps, times sigma."""
    height = parameters[0] if layout.plain else parameters[0] * parameters[2]
    return float(height) if layout.channels == 1 else height.view(-1, 1)


def _standardization(parameters: Tensor, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    if layout.plain:
        return None, None
    shape = () if layout.channels == 1 else (-1, 1)
    return parameters[1].view(shape), parameters[3].view(shape)


def _gaussian(x: Tensor, t: Tensor, e: Tensor, mu: Tensor | None, inverse: Tensor | None) -> None:
    """Write the standardised input into ``t`` and its Gaussian into ``e``."""
    if mu is None or inverse is None:
        torch.clamp(x, -_FAR_AWAY, _FAR_AWAY, out=t)
    else:
        torch.sub(x, mu, out=t).mul_(inverse).clamp_(-_FAR_AWAY, _FAR_AWAY)
    torch.addcmul(t.new_zeros(()), t, t, value=-_HALF_LOG2E, out=e)
    e.exp2_()


def _parts(
    tensors: tuple[Tensor, ...], layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]]:
    """Parts of the tensors along their first dimension, each with three pieces of scratch of its shape."""
    step = max(1, CHUNK if layout.channels == 1 else CHUNK // (layout.channels * layout.inner))
    scratch: tuple[Tensor, Tensor, Tensor] | None = None
    for parts in zip(*(tensor.split(step) for tensor in tensors), strict=True):
        if scratch is None or scratch[0].shape != parts[0].shape:
            scratch = _scratch(parts[0].shape, dtype)
        yield parts, scratch


_kept = threading.local()


def _scratch(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors without content; kept for the next call of this thread, since fresh memory is slow."""
    count = shape.numel()
    row = getattr(_kept, str(dtype), None)
    if row is None or row.shape[1] < count:
        row = torch.empty((3, count), dtype=dtype, device="cpu")
        if count <= CHUNK:
            setattr(_kept, str(dtype), row)
    first, second, third = row[:, :count].unbind()
    return first.view(shape), second.view(shape), third.view(shape)
